"""Rows of one process, of all and of a fusion pass, packing, and lengths that the host knows."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist
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
    has_values,
    is_distributed,
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


def run_process(function, folder, world, rank):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_processes(function, folder, world):
    """What a function of the rank returns in each of several processes of one group."""
    processes = [
        multiprocessing.get_context("fork").Process(target=run_process, args=(function, folder, world, rank))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [torch.load(folder / f"{rank}.pt") for rank in range(world)]


def own_features(rank):
    return torch.arange(4.0).view(2, 2) + 10 * rank


def gather_everything(rank):
    features = own_features(rank).requires_grad_()
    weights = torch.arange(1.0, 9).view(4, 2) * (rank + 1)
    gathered = {mode: gather_features(features, mode) for mode in ("exact", "published")}
    gathered["default"] = gather_features(features)
    gradients = {mode: torch.autograd.grad((tensor * weights).sum(), features)[0] for mode, tensor in gathered.items()}
    identities = torch.tensor([[2 * rank, 7], [2 * rank + 1, 8]])[:, 0]  # not contiguous
    images = ImageTokens(features, torch.tensor([[rank, 1]]), torch.tensor([[1, rank]])).gathered()
    tokens, constant = gathered["exact"].detach(), gather_constant(identities)
    return {
        "gathered": {mode: tensor.detach() for mode, tensor in gathered.items()},
        "gradients": gradients,
        "constant": (constant, own_rows(constant), own_rows(tokens)),
        "images": (images.tokens.detach(), images.seen_by_phrase, images.seen_by_others),
        "is_distributed": is_distributed(),
    }


def test_two_processes_gather_rows_masks_and_gradients(tmp_path):
    """The exact gradient is the sum over both processes' losses of the own slice, the published one of the own loss alone."""
    results = run_processes(gather_everything, tmp_path, 2)
    whole, weights = torch.cat([own_features(0), own_features(1)]), torch.arange(1.0, 9).view(4, 2)
    for rank, result in enumerate(results):
        rows = slice(2 * rank, 2 * rank + 2)
        assert all(torch.equal(tensor, whole) for tensor in result["gathered"].values())
        assert torch.equal(result["gradients"]["exact"], 3 * weights[rows])
        assert torch.equal(result["gradients"]["default"], 3 * weights[rows])
        assert torch.equal(result["gradients"]["published"], (rank + 1) * weights[rows])
        gathered, own, own_tokens = result["constant"]
        assert gathered.tolist() == [0, 1, 2, 3] and own.tolist() == [2 * rank, 2 * rank + 1]
        assert torch.equal(own_tokens, own_features(rank)) and result["is_distributed"]
        tokens, phrase, others = result["images"]
        assert torch.equal(tokens, whole)
        assert (phrase.tolist(), others.tolist()) == ([[0, 1], [1, 1]], [[1, 0], [1, 1]])


def is_left_alone(rank):
    features = own_features(rank)
    same = (gather_features(features), gather_features(features, "published"), gather_constant(features))
    return all(other is features for other in (*same, own_rows(features))) and not is_distributed()


def test_a_group_of_one_process_gathers_nothing(tmp_path):
    assert run_processes(is_left_alone, tmp_path, 1) == [True]


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


def test_masked_tokens_are_read_to_the_end_of_the_longest_text():
    """At as many positions as a row may have labels, or as it has tokens."""
    labels = torch.full((3, 6), -100)
    labels[0, 0], labels[1, 4], labels[2, 2] = 7, 8, 9
    masked = make_text("masked", length=6, lengths=[1, 5, 3], labels=labels, max_masked=2)
    rows = place_rows([masked], 3)
    assert rows.text_index.tolist() == rows.image_index.tolist() == [0, 1, 2]
    assert rows.positions.tolist() == [[0, 1], [4, 0], [2, 0]] and rows.position_counts == [1, 2, 2]
    masked.max_masked = None
    assert place_rows([masked], 3).positions.shape == (3, 5)
    masked.lengths = None  # unknown where labels may lie in the padding
    rows = place_rows([masked], 3)
    assert rows.positions.shape == (3, 6) and rows.position_counts == [6, 6, 6]


def test_positions_to_read_of_a_text():
    text = make_text("caption", lengths=[2, 5, 4])
    assert text.counts() == [2, 5, 4] and text.counts(with_padding=True) == [5, 5, 5]
    assert make_text("caption").counts() == [5, 5, 5]


def test_the_longest_text_of_a_pass():
    for rows in (
        FusionRows(text_lengths=[3]),
        FusionRows(pair_lengths=[2, 3]),
        FusionRows(None, None, None, [1], [3]),
    ):
        assert rows.has_lengths and rows.longest(9) == 3
    assert not FusionRows().has_lengths and FusionRows().longest(9) == 9


def test_values_that_are_there_may_be_read(monkeypatch):
    tensor = torch.ones(2)
    assert has_values(tensor) and not has_values(tensor.to("meta"))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert not has_values(mode.from_tensor(tensor))
    monkeypatch.setattr("batching_mra.is_tracing", lambda: True)
    assert not has_values(tensor)


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
    assert ImageTokens(images.tokens).mask_of([caption]) is None and images.gathered() == images


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


def test_all_positions_are_computed_unless_some_are_read():
    device = torch.device("cpu")
    routes, result = plan_routes(FusionRows(torch.tensor([1, 0, 1])), (2, 4), device, 2)
    assert result.shape == (3, 4) and all(route.reading is None for route in routes)
    routes, result = plan_routes(FusionRows(image_index=torch.tensor([1, 0])), (2, 4), device, 2)
    assert result.shape == (2, 4) and all(route.pairing is None for route in routes)
    assert all(route.image_index.tolist() == [1, 0] for route in routes)


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
