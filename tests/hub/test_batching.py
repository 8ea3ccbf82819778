"""Rows of one process, of all and of a fusion pass, packing, and lengths that the host knows."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from batching_mra import (
    TEXT_ARGUMENTS,
    FusionRows,
    ImageTokens,
    MatchingPairs,
    Packing,
    TextBatch,
    TextLengths,
    TextRows,
    gather_constant,
    gather_features,
    own_rows,
    place_rows,
    plan_routes,
    read_masked_text,
    read_text,
)


def make_text(kind, size=3, length=5, pairs=None, rows=None, **fields):
    tokens = torch.ones(size, length, dtype=torch.long)
    text = TextBatch(kind, tokens, tokens, **fields)
    text.pairs, text.rows = pairs, rows
    return text


def make_pairs(size=3):
    rows = torch.arange(size)
    exists = torch.ones(size, dtype=torch.bool)
    exists[1] = False
    return MatchingPairs.join(rows, rows.roll(1), exists, rows.roll(-1), ~exists)


def test_one_process_gathers_nothing():
    features, identities = torch.randn(3, 4), torch.arange(3)
    assert gather_features(features) is features
    assert gather_features(features, "published") is features
    assert gather_constant(identities) is identities and own_rows(identities) is identities


def test_pairs_are_matched_then_with_negative_images_then_with_negative_texts():
    pairs = make_pairs()
    assert pairs.text_rows.tolist() == [0, 1, 2, 0, 1, 2, 1, 2, 0]
    assert pairs.image_rows.tolist() == [0, 1, 2, 2, 0, 1, 0, 1, 2]
    assert pairs.labels.tolist() == [1, 1, 1, 0, -100, 0, -100, 0, -100]


def test_lengths_of_drawn_texts_are_read_where_the_host_has_them():
    pairs = make_pairs()
    assert pairs.lengths([2, 5, 4]) == [2, 5, 4, 2, 5, 4, 5, 4, 2]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        pairs.text_rows = mode.from_tensor(pairs.text_rows)
        assert pairs.lengths([2, 5, 4]) == [2, 5, 4, 2, 5, 4, 5, 5, 5]


def test_rows_of_a_pass():
    labels = torch.full((3, 5), -100)
    labels[0, 2], labels[1, 1:3], labels[2, 0] = 7, 8, 9
    caption = make_text("caption", lengths=[2, 5, 4], pairs=make_pairs())
    masked = make_text("masked", lengths=[3, 5, 4], labels=labels, max_masked=2)
    rows = place_rows([caption, masked], 3)
    assert rows.text_index.tolist() == [*caption.pairs.text_rows.tolist(), 3, 4, 5]
    assert rows.image_index.tolist() == [*caption.pairs.image_rows.tolist(), 0, 1, 2]
    assert rows.positions.tolist() == [[0, 0]] * 9 + [[2, 0], [1, 2], [0, 1]]
    assert rows.text_lengths == [2, 5, 4, 3, 5, 4] and rows.pair_lengths == [2, 5, 4, 2, 5, 4, 5, 4, 2, 3, 5, 4]
    assert rows.position_counts == [1] * 9 + [2] * 3 and rows.longest(9) == 5


def test_rows_of_a_pass_of_several_processes(monkeypatch):
    """Of two processes this is the second: its masked captions are its own, lengths of the first's texts are unknown."""
    monkeypatch.setattr("batching_mra.own_rows", lambda rows: rows.chunk(2)[1])
    caption = make_text("caption", lengths=[2, 3, 4], pairs=make_pairs(6))
    masked = make_text("masked", lengths=[2, 3, 4], labels=torch.full((3, 5), -100))
    rows = place_rows([caption, masked], 6)
    placed = [
        0,
        1,
        2,
        6,
        7,
        8,
    ]  # captions and masked captions of the first process come first, then those of the second
    assert caption.rows.text_index.tolist() == [placed[row] for row in caption.pairs.text_rows.tolist()]
    assert masked.rows.text_index.tolist() == [9, 10, 11] and masked.rows.image_index.tolist() == [3, 4, 5]
    assert rows.text_lengths is None and rows.pair_lengths[: len(caption.pairs.text_rows)] == [5] * 18


def test_phrases_alone_see_the_regions():
    images = ImageTokens(torch.randn(2, 2, 4), torch.tensor([[0, 1], [1, 1]]), torch.tensor([[1, 0], [1, 0]]))
    rows, first = torch.arange(2), torch.zeros(2, 1)
    phrase = make_text("phrase", 2, rows=TextRows(rows, torch.tensor([1, 0]), first, [5, 5], [1, 1]))
    caption = make_text("caption", 2, rows=TextRows(rows, torch.tensor([1, 1]), first, [5, 5], [1, 1]))
    assert images.mask_of([phrase, caption]).tolist() == [[1, 1], [0, 1], [1, 0], [1, 0]]
    assert ImageTokens(images.tokens).mask_of([caption]) is None and images.gathered().tokens is images.tokens


def test_every_kind_names_its_arguments():
    for kind, names in TEXT_ARGUMENTS.items():
        assert make_text(kind).names is names


def test_kinds_that_were_not_passed_are_absent():
    tokens, lengths = torch.ones(2, 3, dtype=torch.long), TextLengths(phrase=[3, 2], masked=[2, 2], max_masked=1)
    assert read_text("phrase", None, None, lengths) is None
    assert read_masked_text(None, None, tokens, lengths) is None
    phrase, masked = read_text("phrase", tokens, tokens, lengths), read_masked_text(tokens, tokens, tokens, lengths)
    assert (phrase.lengths, masked.lengths, masked.max_masked) == ([3, 2], [2, 2], 1)
    for mask in (None, tokens):
        with pytest.raises(ValueError, match="`phrase_input_ids` and `phrase_attention_mask` go together"):
            read_text("phrase", None if mask is tokens else tokens, mask, lengths)
    with pytest.raises(ValueError, match="`mlm_input_ids` and `labels` go together"):
        read_masked_text(tokens, None, tokens, lengths)


def test_the_first_layer_pairs_and_the_last_picks_positions():
    rows = FusionRows(torch.tensor([1, 0, 1]), torch.tensor([0, 0, 1]), torch.zeros(3, 1, dtype=torch.long))
    routes, result = plan_routes(rows, (2, 4), torch.device("cpu"), 3)
    assert [route.pairing is not None for route in routes] == [True, False, False]
    assert [route.reading is not None for route in routes] == [False, False, True]
    assert [route.packing.shape for route in routes] == [(2, 4), (3, 4), (3, 4)] and result.shape == (3, 1)
    assert routes[-1].reading[0].tolist() == [0, 4, 8]


def test_packing_takes_tokens_out_and_puts_them_back():
    states = torch.arange(1.0, 19).view(3, 3, 2)
    packing = Packing((3, 3), states.device, [2, 3, 1])
    packed = packing.pack(states)
    assert torch.equal(packed, torch.cat([states[0, :2], states[1], states[2, :1]]))
    assert torch.equal(packed[packing.starts()], states[:, 0])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0]])
    assert torch.equal(packing.unpack(packed), states * mask[..., None])
    for lengths in (None, [3, 3, 3]):
        packing = Packing((3, 3), states.device, lengths)
        assert packing.pack(states).data_ptr() == states.data_ptr()  # a view
        assert torch.equal(packing.pack(states)[packing.starts()], states[:, 0])
        assert torch.equal(packing.unpack(packing.pack(states)), states)
