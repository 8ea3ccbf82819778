"""data_scripts/row_checks.py: limits at their edges, and what the messages hold."""

import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_scripts.row_checks import (
    RowError,
    check_box,
    check_captions,
    check_identity,
    check_number,
    check_object,
    check_regions,
    check_text,
    list_names,
    shorten,
)


LARGEST_FLOAT32 = float(np.finfo(np.float32).max)


def refused(check, *arguments) -> RowError:
    with pytest.raises(RowError) as caught:
        check(*arguments)
    return caught.value


def test_an_error_reads_as_one_sentence_and_survives_another_process():
    error = RowError("boxes", "box without area", "expected w above 0, got 0", "Measure the box again")
    text = (
        "a.json, row 7 (counting from 0), field boxes: box without area: expected w above 0, got 0. "
        "Measure the box again, or pass --on_error skip to leave such rows out."
    )
    assert str(error) == error.problem == "expected w above 0, got 0"
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert same.describe("a.json", 7) == text
    assert "Correct the row, or pass" in RowError("boxes", "wrong type", "expected a list").describe("a.json", 0)


def test_long_values_are_cut_to_the_length_and_others_are_not():
    assert shorten("x" * 118) == repr("x" * 118)
    assert shorten("x" * 119) == "'" + "x" * 116 + "..." and len(shorten("x" * 119)) == 120
    assert shorten([1, 2, 3], 9) == "[1, 2, 3]" and shorten([1, 2, 3], 8) == "[1, 2..."
    nested = []
    for _ in range(100_000):
        nested = [nested]
    assert shorten(nested) == "a deeply nested list"


def test_names_stand_on_one_line_without_their_quotes():
    assert list_names(["a", "b\nc", "it's"]) == r"a, b\nc, it's"
    assert list_names(["x" * 1000]) == "x" * 1000
    assert list_names(["x" * 1001]) == "x" * 997 + "..."


def test_a_row_is_an_object_with_every_field():
    check_object({"a": None, "b": 0, "more": 1}, ("a", "b"))
    assert (
        refused(check_object, ["a"], ("a",))
        .describe("f", 0)
        .startswith("f, row 0 (counting from 0), field (all): wrong type: expected an object, got ['a']")
    )
    error = refused(check_object, {"a": 1}, ("a", "b"))
    assert (error.field, error.reason, error.problem) == ("b", "missing field", "expected a, b, got a")
    assert refused(check_object, {}, ("a",)).problem == "expected a, got nothing"
    unread = RowError("(all)", "wrong type", "nested too deeply")
    assert refused(check_object, unread, ("a",)) is unread


@pytest.mark.parametrize("text", ["word", " 7", "... 人", "a", "mit Tür"])
def test_a_text_with_a_letter_or_digit_is_kept_as_it_is(text):
    assert check_text(text, "caption") == text


@pytest.mark.parametrize(
    ("text", "field", "reason"),
    [
        ("", "caption", "empty caption"),
        (" .,!\n", "captions[3]", "empty caption"),
        ("-", "phrases[0]", "empty phrase"),
        (7, "caption", "wrong type"),
        (None, "caption", "wrong type"),
        (["word"], "caption", "wrong type"),
        ("a \ud800 b", "caption", "invalid text"),
    ],
)
def test_other_texts_are_refused(text, field, reason):
    error = refused(check_text, text, field)
    assert (error.field, error.reason) == (field, reason)


def test_the_half_character_is_named():
    assert refused(check_text, "ab\udc01c", "caption").problem.startswith(
        r"expected Unicode text, got the half character '\udc01' in "
    )


def test_captions_are_a_list_of_at_least_one():
    assert check_captions(["a man", "a coat"], "captions") == ["a man", "a coat"]
    for value, field, reason in (
        ("a man", "captions", "wrong type"),
        (None, "captions", "wrong type"),
        ([], "captions", "empty caption"),
        (["a man", " "], "captions[1]", "empty caption"),
        ([3], "captions[0]", "wrong type"),
    ):
        error = refused(check_captions, value, "captions")
        assert (error.field, error.reason) == (field, reason)


@pytest.mark.parametrize("value", [0, -1, 2**31, 2**62, 2**63 - 1, -(2**63), np.int64(5), np.uint8(200)])
def test_identities_are_64_bit_integers(value):
    identity = check_identity(value, "id")
    assert identity == value and type(identity) is int


@pytest.mark.parametrize("value", [True, False, 2**63, 2**64, 10**30, -(2**63) - 1, 1.0, "7", None, float("nan")])
def test_other_identities_are_refused(value):
    error = refused(check_identity, value, "id")
    assert (error.field, error.reason) == ("id", "wrong type") and "expected an integer" in error.problem


@pytest.mark.parametrize(
    "value", [0, -3, 0.5, LARGEST_FLOAT32, -LARGEST_FLOAT32, 2**100, Fraction(1, 4), np.float32(0.25)]
)
def test_numbers_are_those_of_32_bits(value):
    number = check_number(value, "logits[0]")
    assert number == value and type(number) is float


@pytest.mark.parametrize(
    "value", [True, False, 3.5e38, -3.5e38, 2**128, 10**400, float("inf"), float("nan"), "1", None, [1]]
)
def test_other_numbers_are_refused(value):
    error = refused(check_number, value, "logits[0]")
    assert (error.field, error.reason) == ("logits[0]", "wrong type") and "a finite number" in error.problem


@pytest.mark.parametrize(
    ("box", "kept"),
    [
        ([0.5, 0.5, 1, 1], [0.5, 0.5, 1, 1]),  # the whole image
        ([0, 0, 0.04, 0.04], [0, 0, 0.04, 0.04]),  # 2% of the side beyond the left and upper edges
        ([1, 1, 0.04, 0.04], [1, 1, 0.04, 0.04]),  # and beyond the right and lower ones
        ([0.3, 0.5, 0.6, 1e-6], [0.3, 0.5, 0.6, 1e-6]),
        ([-0.001, -0.0009, 0.02, 0.02], [0, 0, 0.02, 0.02]),  # rounded coordinates
        ([1.001, 1.0009, 0.02, 0.02], [1, 1, 0.02, 0.02]),
        ([0.5, 0.5, 1.001, 1.0005], [0.5, 0.5, 1, 1]),
    ],
)
def test_boxes_at_the_edges_are_kept_and_rounded_ones_clipped(box, kept):
    assert check_box(box, "boxes[0]") == kept


OUTSIDE, EMPTY, TYPE = "box outside 0..1", "box without area", "wrong type"


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([-0.0011, 0.5, 0.002, 0.5], OUTSIDE),
        ([0.5, 1.0011, 0.5, 0.002], OUTSIDE),
        ([0.5, 0.5, 1.0011, 0.5], OUTSIDE),
        ([1.5, 0.5, 0.1, 0.1], OUTSIDE),
        ([0, 0.5, 0.041, 0.1], OUTSIDE),  # left
        ([0.5, 0, 0.1, 0.041], OUTSIDE),  # above
        ([1, 0.5, 0.041, 0.1], OUTSIDE),  # right
        ([0.5, 1, 0.1, 0.041], OUTSIDE),  # below
        ([0.5, 0.9, 0.1, 0.3], OUTSIDE),
        ([0.5, 0.5, 0, 0.5], EMPTY),
        ([0.5, 0.5, 0.5, 0], EMPTY),
        ([0.5, 0.5, -0.0005, 0.5], EMPTY),
        ([0.5, 0.5, 0.5], TYPE),
        ([0.5] * 5, TYPE),
        ([], TYPE),
        ((0.5, 0.5, 0.5, 0.5), TYPE),
        ("1234", TYPE),
        ([0.5, 0.5, True, 0.5], TYPE),
        ([0.5, 0.5, float("nan"), 0.5], TYPE),
    ],
)
def test_other_boxes_are_refused(box, reason):
    error = refused(check_box, box, "boxes[0]")
    assert (error.field, error.reason) == ("boxes[0]", reason)


def test_the_remedy_fits_the_likely_mistake():
    assert "Divide pixel coordinates" in refused(check_box, [100, 200, 50, 80], "boxes[0]").advice
    corners = refused(check_box, [0.25, 0.25, 0.75, 0.875], "boxes[0]")
    assert "(not corners)" in corners.advice
    assert corners.problem.endswith("which reaches from (-0.125, -0.188) to (0.625, 0.688)")


coordinates = st.floats(-0.2, 1.2) | st.sampled_from([-0.001, 0.0, 0.02, 0.04, 0.5, 1.0, 1.001])


@given(box=st.lists(coordinates, min_size=4, max_size=4))
def test_any_box_is_kept_if_and_only_if_it_is_inside(box):
    cx, cy, width, height = clipped = [min(1.0, max(0.0, value)) for value in box]
    near = all(-0.001 <= value <= 1.001 for value in box)
    inside = all(-0.02 <= edge <= 1.02 for edge in (cx - width / 2, cx + width / 2, cy - height / 2, cy + height / 2))
    if near and inside and width > 0 and height > 0:
        assert check_box(box, "boxes[0]") == clipped
    else:
        assert refused(check_box, box, "boxes[0]").reason in (OUTSIDE, EMPTY)


def test_regions_belong_together():
    row = {"boxes": [[0.5, 0.5, 0.5, 1], [0.25, 0.5, 0.5, 0.5]], "logits": [1, 0.25], "phrases": ["a hat", "a bag"]}
    boxes, logits, phrases = check_regions(row)
    assert (boxes, logits, phrases) == (row["boxes"], [1.0, 0.25], row["phrases"])
    assert json.dumps(logits) == "[1.0, 0.25]"
    empty = {"boxes": [], "logits": [], "phrases": []}
    for row in ({}, empty, {"boxes": None, "phrases": []}):
        assert check_regions(row) == ([], [], [])


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"boxes": "none"}, "boxes", "wrong type"),
        ({"logits": {"0": 1}}, "logits", "wrong type"),
        ({"phrases": "a hat"}, "phrases", "wrong type"),
        ({"boxes": []}, "boxes", "different lengths"),
        ({"logits": None}, "boxes", "different lengths"),
        ({"phrases": ["a hat", "a bag"]}, "boxes", "different lengths"),
        ({"boxes": [[0.5, 0.5, 0, 1]]}, "boxes[0]", "box without area"),
        ({"logits": [True]}, "logits[0]", "wrong type"),
        ({"phrases": ["."]}, "phrases[0]", "empty phrase"),
    ],
)
def test_regions_that_do_not_are_refused(change, field, reason):
    row = {"boxes": [[0.5, 0.5, 0.5, 1]], "logits": [0.5], "phrases": ["a hat"]}
    error = refused(check_regions, row | change)
    assert (error.field, error.reason) == (field, reason)


def test_the_lengths_are_told():
    row = {"boxes": [], "logits": [0.5], "phrases": ["a", "b"]}
    assert refused(check_regions, row).problem == (
        "expected as many boxes as logits and phrases, got 0 boxes, 1 logits, 2 phrases"
    )
