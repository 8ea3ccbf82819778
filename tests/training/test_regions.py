"""Region geometry against hand-drawn cases and the vectors of the published code."""

import json
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from mra.training.regions import (
    WHOLE_IMAGE,
    Crop,
    box_to_pixels,
    crop_ranges,
    draw_crop,
    move_box,
    region_attention_mask,
)


REFERENCE = Path(__file__).parents[1] / "reference"
MASK_CASES = json.loads((REFERENCE / "image_attns.json").read_text())["cases"]
GEOMETRY_CASES = json.loads((REFERENCE / "region_geometry.json").read_text())["cases"]


def tokens_inside(mask):
    """Indices of the patch tokens of a mask that lie inside, the global token checked and left out."""
    assert mask.dtype == torch.int64 and mask[0] == 1 and set(mask.tolist()) <= {0, 1}
    return (mask[1:].nonzero().flatten() + 1).tolist()


@pytest.mark.parametrize("case", MASK_CASES, ids=lambda case: f"{case['h']}x{case['w']}-{case['box_xywh'][:2]}")
def test_fidelity_patch_mask(case):
    mask = region_attention_mask(case["box_xywh"], (case["h"], case["w"]), (case["h"] // 32, case["w"] // 32))
    assert len(mask) == case["len"]
    assert tokens_inside(mask) == case["zeros"]


@pytest.mark.parametrize("case", GEOMETRY_CASES, ids=range(len(GEOMETRY_CASES)))
def test_fidelity_region_geometry(case):
    size = (case["out_h"], case["out_w"])
    box = WHOLE_IMAGE if case["box_index"] is None else case["boxes_cxcywh_rel"][case["box_index"]]
    pixels = box_to_pixels(box, case["W"], case["H"])
    draws = case["randint_calls_lo_hi_value (x0,y0,x1,y1)"]
    padded = [[low + 10, high + 10] for low, high in crop_ranges(pixels, case["W"], case["H"])]
    assert padded == [draw[:2] for draw in draws]
    crop = Crop(*(draw[2] - 10 for draw in draws))
    moved = move_box(pixels, crop, case["hflip"], *size)
    assert moved == pytest.approx(case["final_box_xywh"], abs=1e-9)
    assert tokens_inside(region_attention_mask(moved, size, (size[0] // 32, size[1] // 32))) == case["zeros"]


@pytest.mark.parametrize(
    ("box", "pixels"),
    [
        ((0.5, 0.5, 1, 1), (0, 0, 101, 50)),  # the odd side loses half a pixel on the left, which is clipped
        ((0.5, 0.5, 0.5, 0.5), (25, 12.5, 50, 25)),
        ((0.0, 0.0, 0.4, 0.4), (0, 0, 40, 20)),
        ((1.0, 1.0, 0.4, 0.4), (81, 40, 20, 10)),
        ((0.5, 0.5, 0.001, 0.001), (49.5, 24.5, 1, 1)),
        ((0.5, 0.9, 0.5, 0.5), (25, 32.5, 50, 17.5)),  # hangs over below, and is cut at the edge
        ((0.9, 0.5, 0.5, 0.5), (65, 12.5, 36, 25)),  # on the right
        ((0.5, 0.1, 0.5, 0.5), (25, 0, 50, 25)),  # above and on the left it is moved inside
        ((0.1, 0.5, 0.5, 0.5), (0, 12.5, 50, 25)),
    ],
)
def test_box_to_pixels(box, pixels):
    assert box_to_pixels(box, 101, 50) == pixels


BAD_BOXES = [(0.5, 0.5, 0, 1), (0.5, 0.5, 1, 0), (0.5, 0.5, -1, 1), (0.5, 0.5, 1, -1), (60.0, 30.0, 20.0, 9.0)]
BAD_BOXES += [(1.2, 0.5, 0.1, 0.1), (0.5, 1.2, 0.1, 0.1), (-0.1, 0.5, 0.1, 0.1), (0.5, -0.1, 0.1, 0.1)]
BAD_BOXES += [(0.5, 0.5, 1), (0.5, 0.5, 1, 1, 1), (float("nan"), 0.5, 1, 1), (0.5, 0.5, 1, float("nan"))]


@pytest.mark.parametrize("box", BAD_BOXES, ids=str)
def test_bad_box(box):
    with pytest.raises(ValueError, match="`box` must be"):
        box_to_pixels(box, 101, 50)


# ---------------------------------------------------------------- any box


EIGHTHS = st.integers(1, 8).map(lambda count: count / 8)  # exact in every way of computing
SHARES = st.floats(0, 1, exclude_min=True) | EIGHTHS
CENTERS = st.floats(0, 1) | EIGHTHS | st.just(0)
BOXES = st.tuples(CENTERS, CENTERS, SHARES, SHARES)
SIDES = st.integers(1, 600)


@given(box=BOXES, width=SIDES, height=SIDES)
@example(box=WHOLE_IMAGE, width=7, height=5)
@example(box=(1, 1, 1e-9, 1e-9), width=3, height=1)
def test_boxes_lie_inside_the_image_where_their_numbers_say(box, width, height):
    left, top, box_width, box_height = box_to_pixels(box, width, height)
    for start, length, center, side, limit in (
        (left, box_width, box[0], box[2], width),
        (top, box_height, box[1], box[3], height),
    ):
        assert start >= 0 and length >= 0.5 and start + length <= limit
        # Three numbers are truncated to pixels or cut at an edge of the image.
        exact = (Fraction(center) * limit - Fraction(side) * limit / 2, Fraction(center + side / 2) * limit)
        assert abs(start - max(exact[0], 0)) <= 2
        assert abs(start + length - min(exact[1], limit)) <= 2 or exact[0] < 0  # moved to the right with its left edge


@given(box=BOXES, width=SIDES, height=SIDES, seed=st.integers(0, 2**32), flip=st.booleans())
def test_crops_contain_the_box_and_carry_it_along(box, width, height, seed, flip):
    pixels = box_to_pixels(box, width, height)
    crop = draw_crop(pixels, width, height, random.Random(seed))
    assert -10 <= crop.left <= pixels[0] and pixels[0] + pixels[2] <= crop.right <= width + 10
    assert -10 <= crop.top <= pixels[1] and pixels[1] + pixels[3] <= crop.bottom <= height + 10
    left, top, box_width, box_height = move_box(pixels, crop, flip, 64, 32)
    assert left >= -1e-9 and top >= -1e-9 and left + box_width <= 32 + 1e-9 and top + box_height <= 64 + 1e-9
    # Its corners lie where resizing puts the pixels of the crop.
    scale_x, scale_y = 32 / (crop.right - crop.left), 64 / (crop.bottom - crop.top)
    corners = [(pixels[0] - crop.left) * scale_x, (pixels[0] + pixels[2] - crop.left) * scale_x]
    if flip:
        corners = [32 - corners[1], 32 - corners[0]]
    assert [left, left + box_width] == pytest.approx(corners, abs=1e-9)
    rows = [(pixels[1] - crop.top) * scale_y, (pixels[1] + pixels[3] - crop.top) * scale_y]
    assert [top, top + box_height] == pytest.approx(rows, abs=1e-9)


@pytest.mark.parametrize(
    ("box", "ranges"),
    [
        ((2.5, 3.0, 4.0, 2.5), [(-10, 2), (-10, 3), (7, 30), (6, 18)]),
        ((0, 0, 20, 8), [(-10, 0), (-10, 0), (20, 30), (8, 18)]),
    ],
)
def test_every_crop_around_a_box_is_drawn(box, ranges):
    """Between the box and ten pixels beyond the image, both ends included."""
    rng = random.Random(0)
    crops = [draw_crop(box, 20, 8, rng) for _ in range(1000)]
    for edge, (low, high) in zip(("left", "top", "right", "bottom"), ranges, strict=True):
        assert {getattr(crop, edge) for crop in crops} == {*range(low, high + 1)}, edge


QUARTERS = st.integers(0, 4 * 96).map(lambda count: count / 4)


@given(
    left=QUARTERS,
    top=QUARTERS,
    width=QUARTERS,
    height=QUARTERS,
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    stride=st.integers(1, 20),
)
def test_tokens_inside_are_those_that_the_box_overlaps(left, top, width, height, grid, stride):
    (rows, columns), size = grid, (grid[0] * stride, grid[1] * stride)
    left, top = min(left, size[1]), min(top, size[0])
    box = (left, top, max(width, 0.25), max(height, 0.25))
    overlapped = [
        1 + row * columns + column
        for row in range(rows)
        for column in range(columns)
        if box[0] < (column + 1) * stride and box[0] + box[2] > column * stride
        if box[1] < (row + 1) * stride and box[1] + box[3] > row * stride
    ]
    inside = tokens_inside(region_attention_mask(box, size, grid))
    assert inside == overlapped or (not overlapped and len(inside) >= 1)  # a box at the very edge has the last token


@pytest.mark.parametrize("box", [(64, 20, 5, 5), (20, 96, 5, 5), (64, 96, 1, 1)])
def test_a_box_behind_the_edge_has_the_last_token(box):
    mask = region_attention_mask(box, (96, 64), (3, 2))[1:].view(3, 2)
    assert mask.sum() == 1 and mask[min(int(box[1] // 32), 2), min(int(box[0] // 32), 1)] == 1


def test_flip_twice_is_identity():
    crop = Crop(-3, 2, 40, 60)
    box = (1.5, 4.0, 20.0, 30.0)
    left, top, width, height = move_box(box, crop, True, crop.height, crop.width)
    back = move_box((left, top, width, height), Crop(0, 0, crop.width, crop.height), True, crop.height, crop.width)
    assert back == pytest.approx((4.5, 2.0, 20.0, 30.0))


@pytest.mark.parametrize("size", [(100, 64), (96, 65)])
def test_grid_must_fit(size):
    with pytest.raises(ValueError, match="does not divide"):
        region_attention_mask((0, 0, 1, 1), size, (3, 2))
