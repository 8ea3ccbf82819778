"""Fusion and depth: the choice against a plain loop, its file, and what it answers for."""

import dataclasses
import json

import pytest
import torch

from mra.common.weight_files import weights_digest
from mra.retrieval import RetrievalChoice, choose_retrieval, evaluate_retrieval, fuse_scores, retrieval_metrics
from mra.retrieval.retrieval_choice import MATCH_WEIGHTS, fusion_candidates
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor


CHOICE = RetrievalChoice(
    rerank_k=4,
    chosen_on="CUHK validation",
    gallery_size=100,
    score_fusion="posterior",
    match_weight=0.4,
    flip=True,
    tolerance=0.05,
    tried={8: {"R1": 50.0, "mAP": 40.0}},
    tried_fusions={"similarity": {"R1": 51.0, "mAP": 39.0}}
    | {name: {"R1": 40.0, "mAP": 40.0} for name in ("published", "single")}
    | {f"posterior {weight:g}": {"R1": 50.0 - weight, "mAP": 40.0} for weight in MATCH_WEIGHTS},
    num_queries=200,
    dtype="float32",
)

# What versions saved that chose the number of re-ranked images alone.
OLD = {
    "rerank_k": 4,
    "chosen_on": "CUHK validation",
    "gallery_size": 100,
    "score_fusion": "single",
    "match_weight": None,
    "flip": True,
    "tolerance": 0.05,
    "tried": {"8": {"R1": 50.0, "mAP": 40.0}},
}


@pytest.fixture(scope="module")
def world():
    return tiny_model(), tiny_processor(), tiny_dataset(num_ids=8)


def made(logits, similarity, query_ids, gallery_ids, temperature=0.1):
    """A result of given (queries, images, 2) logits, all images re-ranked, in one view."""
    ids = torch.tensor(query_ids), torch.tensor(gallery_ids)
    result = evaluate_retrieval(tiny_model(), tiny_processor(), tiny_dataset(num_ids=2), rerank_k=2)
    return dataclasses.replace(
        result,
        metrics={"similarity": retrieval_metrics(similarity, *ids)},
        rerank_k=similarity.shape[1],
        similarity=similarity,
        top_indices=similarity.argsort(dim=1, descending=True),
        match_logits=logits.gather(
            1, similarity.argsort(dim=1, descending=True)[..., None].expand(-1, -1, 2)
        )[None],
        query_ids=ids[0],
        gallery_ids=ids[1],
        temperature=temperature,
        captions=["a"] * len(similarity),
    )  # fmt: skip


def brute_force(result):
    """Every fusion written out, the best mean of R@1 and mAP, the earliest among those equal to a hundredth."""
    no, yes = result.match_logits.unbind(-1)
    ids = result.query_ids, result.gallery_ids
    runs = [("published", None, fuse_scores(result.similarity, result.top_indices, yes, "published"))]
    for weight in (1.0, 0.8, 0.6, 0.4, 0.3, 0.2, 0.1, 0.05, 1.5, 2.0):
        fused = fuse_scores(
            result.similarity, result.top_indices, yes - no, "posterior", temperature=result.temperature,
            match_weight=weight,
        )  # fmt: skip
        runs.append(("posterior", weight, fused))
    runs.append(("single", None, fuse_scores(result.similarity, result.top_indices, yes, "single")))
    best = None
    for fusion, weight, fused in runs:
        metrics = retrieval_metrics(fused, *ids)
        score = round((metrics["R1"] + metrics["mAP"]) / 2, 2)
        if best is None or score > best[0]:
            best = score, fusion, weight, metrics
    return best[1:]


@pytest.mark.parametrize("seed", range(6))
def test_choice_is_that_of_a_plain_loop(seed):
    generator = torch.Generator().manual_seed(seed)
    query_ids, gallery_ids = [number // 2 for number in range(24)], [number // 3 for number in range(36)]
    is_own = torch.tensor(query_ids)[:, None] == torch.tensor(gallery_ids)
    similarity = (0.3 * torch.randn(24, 36, generator=generator) + 0.4 * is_own).sigmoid()
    logits = torch.randn(24, 36, 2, generator=generator) * (1 + 3 * (seed % 3))
    logits[..., 1] += is_own * (seed % 2 + 1) + 4 * torch.randn(24, 1, generator=generator)
    result = made(logits, similarity, query_ids, gallery_ids)
    choice = choose_retrieval(result, "drawn")
    fusion, weight, metrics = brute_force(result)
    assert (choice.score_fusion, choice.match_weight) == (fusion, weight)
    assert choice.tried[36] == choice.tried_fusions[choice.fusion] == {name: metrics[name] for name in ("R1", "mAP")}
    assert list(choice.tried_fusions)[:2] == ["similarity", "published"] and len(choice.tried_fusions) == 13
    deepest, found = choice.tried[36], choice.tried[choice.rerank_k]
    assert all(deepest[name] - found[name] <= 0.05 for name in found)


def test_one_pass_gives_what_an_evaluation_by_each_fusion_gives(world):
    result = evaluate_retrieval(*world, rerank_k=6)
    for fusion, weight in (("single", None), ("published", None), ("posterior", 0.3)):
        options = {} if weight is None else {"match_weight": weight}
        alone = evaluate_retrieval(*world, rerank_k=6, score_fusion=fusion, **options)
        derived = result.with_fusion(fusion, weight)
        assert derived.metrics == alone.metrics and torch.equal(derived.reranked, alone.reranked)
        assert torch.equal(derived.match_scores, alone.match_scores)
        assert (derived.score_fusion, derived.match_weight) == (alone.score_fusion, alone.match_weight)


def test_among_equals_the_published_fusion_is_taken():
    """One image a person and every ranking perfect."""
    similarity = torch.eye(6)
    choice = choose_retrieval(made(torch.zeros(6, 6, 2), similarity, range(6), range(6)), "perfect")
    assert (choice.score_fusion, choice.match_weight, choice.rerank_k) == ("published", None, 1)
    assert choice.warning() is None


def test_reranking_below_similarity_is_said():
    """A head that prefers the wrong images: no fusion can do better than similarity alone."""
    logits = torch.zeros(6, 6, 2)
    logits[..., 1] = 100 * (1 - torch.eye(6))
    choice = choose_retrieval(made(logits, torch.eye(6), range(6), range(6)), "adverse", "single")
    assert choice.warning().startswith("re-ranking is below similarity alone: R@1 0.00 against 100.00, mAP ")
    assert choice.warning().endswith(" on adverse, single at k 6")


def test_given_fusion_or_weight_is_kept(world):
    result = evaluate_retrieval(*world, rerank_k=6)
    assert choose_retrieval(result, "tiny", "single").fusion == "single"
    assert choose_retrieval(result, "tiny", "posterior", 0.7).fusion == "posterior 0.7"
    posterior = choose_retrieval(result, "tiny", "posterior")
    assert posterior.match_weight in MATCH_WEIGHTS and "published" not in posterior.tried_fusions
    bare = choose_retrieval(dataclasses.replace(result, temperature=None), "tiny")
    assert set(bare.tried_fusions) == {"similarity", "published", "single"}


def test_settings_are_checked():
    assert [name for name, _ in fusion_candidates("auto")] == ["published", *["posterior"] * 10, "single"]
    for fusion in ("auto", "single", "published"):
        with pytest.raises(ValueError, match=r"match_weight 0.4 is given with .* only posterior has a weight"):
            fusion_candidates(fusion, 0.4)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="match_weight must be finite and at least 0"):
            fusion_candidates("posterior", weight)
    with pytest.raises(ValueError, match="score_fusion must be one of auto, single, published, posterior, got 'sum'"):
        fusion_candidates("sum")


def test_file_is_read_back_and_answers_for_what_it_was_chosen_for(tmp_path):
    assert CHOICE.save(tmp_path).name == "retrieval.json"
    assert [path.name for path in tmp_path.iterdir()] == ["retrieval.json"]
    choice = RetrievalChoice.load(str(tmp_path))
    assert choice == CHOICE
    for fusion, weight in (("auto", None), ("posterior", None), ("posterior", 0.4)):
        assert choice.misfit(fusion, weight, True) is None
        assert choice.misfit(fusion, weight, False) == "it was chosen with mirror images"
    for fusion, weight in (("single", None), ("posterior", 0.5)):
        assert choice.misfit(fusion, weight, True) == "it was chosen for the fusion posterior 0.4"
    given = dataclasses.replace(CHOICE, tried_fusions={"similarity": {"R1": 1.0, "mAP": 1.0}})
    assert given.misfit("auto", None, True) == "its fusion posterior 0.4 was given, not chosen among all"
    assert (
        "on CUHK validation (200 captions, 100 images)" in choice.describe()
        and "among 12 fusions" in choice.describe()
    )
    assert [line.split()[-1] for line in choice.format_table().splitlines()].count("chosen") == 1
    assert choice.warning() == (
        "re-ranking is below similarity alone: R@1 50.00 against 51.00 on CUHK validation, posterior 0.4 at k 8"
    )


def test_old_file_of_the_depth_alone(tmp_path):
    (tmp_path / "retrieval.json").write_text(json.dumps(OLD))
    old = RetrievalChoice.load(str(tmp_path))
    assert (old.rerank_k, old.fusion, old.tried_fusions, old.dtype) == (4, "single", {}, None)
    assert old.misfit("single", None, True) is None and old.posterior_weight() is None and old.warning() is None
    assert old.misfit("auto", None, True) == "its fusion single was given, not chosen among all"
    assert "score fusion single, given" in old.describe()
    assert CHOICE.supersedes(old) and CHOICE.supersedes(None) and not old.supersedes(CHOICE)
    assert not dataclasses.replace(CHOICE, flip=False).supersedes(CHOICE)


def test_file_is_tied_to_the_weights(tmp_path, caplog):
    """Weights of one architecture have one size and one header; exchanged ones must be told apart all the same."""
    model, kept = tmp_path / "model", tmp_path / "kept"
    kept.mkdir()
    tiny_model(seed=0).save_pretrained(model)
    first = (model / "model.safetensors").read_bytes()
    CHOICE.save(model)
    dataclasses.replace(CHOICE, model=str(model)).save(kept)  # where the model's folder cannot be written
    assert RetrievalChoice.load(str(model)) == dataclasses.replace(CHOICE, weights=weights_digest(model))
    assert RetrievalChoice.load(str(kept), str(model)) is not None
    assert RetrievalChoice.load(str(kept), "another") is None and not caplog.records

    tiny_model(seed=1).save_pretrained(model)
    assert len(first) == (model / "model.safetensors").stat().st_size
    assert first != (model / "model.safetensors").read_bytes()
    for where in ([str(model)], [str(kept), str(model)]):
        caplog.clear()
        assert RetrievalChoice.load(*where) is None and RetrievalChoice.load(*where) is None
        assert len(caplog.records) == 1
        assert f"it was chosen with other weights than the current ones of {model}" in caplog.text

    (model / "model.safetensors").write_bytes(first)
    assert RetrievalChoice.load(str(model)) is not None
    old = json.loads((model / "retrieval.json").read_text())
    del old["weights"]
    (model / "retrieval.json").write_text(json.dumps(old))
    assert RetrievalChoice.load(str(model)) == CHOICE  # of a version that did not keep it


def test_digest_covers_every_shard_and_every_graph(tmp_path):
    sharded, graphs = tmp_path / "sharded", tmp_path / "graphs"
    tiny_model(seed=0).save_pretrained(sharded, max_shard_size="50KB")
    shards = sorted(sharded.glob("model-*.safetensors"))
    graphs.mkdir()
    for name in ("a", "b"):
        (graphs / f"{name}.onnx").write_bytes(name.encode())
    assert len(shards) > 1 and weights_digest(tmp_path) is None
    for folder, file in ((sharded, shards[-1]), (graphs, graphs / "b.onnx")):
        before = weights_digest(folder)
        assert before == weights_digest(folder)
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        assert weights_digest(folder) != before


def test_weight_for_searching():
    assert CHOICE.posterior_weight() == 0.4
    published = dataclasses.replace(CHOICE, score_fusion="published", match_weight=None)
    assert published.posterior_weight() == 0.05  # the best of those tried: 50 - 0.05


def test_model_without_a_choice(tmp_path):
    assert RetrievalChoice.load(str(tmp_path)) is None


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{}",
        "no json",
        json.dumps({"rerank_k": 4}),
        json.dumps(OLD | {"rerank_k": "4"}),
        json.dumps(OLD | {"score_fusion": "sum"}),
        json.dumps(OLD | {"score_fusion": "posterior"}),
        json.dumps(OLD | {"score_fusion": "posterior", "match_weight": float("nan")}),
        json.dumps(OLD | {"tried": {}}),
        json.dumps(OLD | {"tried": {"8": {"R1": None, "mAP": 1.0}}}),
        json.dumps(OLD | {"flip": "yes"}),
        json.dumps(OLD | {"unknown": 1}),
    ],
)
def test_damaged_file_is_named(tmp_path, text):
    (tmp_path / "retrieval.json").write_text(text)
    with pytest.raises(ValueError, match=r"retrieval\.json of model .* is not a saved choice .*: remove it"):
        RetrievalChoice.load(str(tmp_path))


def test_largest_log_odds_are_measured_for_one_view_and_for_the_mean_of_two(world, tmp_path):
    result = evaluate_retrieval(*world, rerank_k=6)
    no, yes = result.match_logits.unbind(-1)
    log_odds = yes - no
    expected = {1: log_odds[0].max().item(), 2: ((log_odds[0] + log_odds[1]) / 2).max().item()}
    choice = choose_retrieval(result, "tiny")
    assert choice.largest_log_odds == expected
    choice.save(tmp_path)
    assert RetrievalChoice.load(str(tmp_path)).largest_log_odds == expected
    upright = evaluate_retrieval(*world, rerank_k=6, flip=False)
    assert choose_retrieval(upright, "tiny").largest_log_odds.keys() == {1}
    for wrong in ({3: 1.0}, {1: float("nan")}):
        with pytest.raises(ValueError, match="largest_log_odds must be finite numbers by 1 or 2 views"):
            dataclasses.replace(CHOICE, largest_log_odds=wrong)
