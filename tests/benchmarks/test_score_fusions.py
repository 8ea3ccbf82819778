"""The comparison of score fusions at a tiny size: what is chosen where, and what table and JSON say of it."""

import functools
import json

import pytest

from benchmarks import score_fusions
from mra.retrieval import evaluate_retrieval, retrieval_metrics
from mra.retrieval.evaluation import RetrievalResult
from tests.helpers.retrieval import tiny_dataset, tiny_model, tiny_processor


K = 3


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """Two saved models and a set whose splits hold other people."""
    folder = tmp_path_factory.mktemp("fusions")
    for seed in (0, 1):
        tiny_model(seed=seed).save_pretrained(folder / f"model_seed{seed}")
        tiny_processor().save_pretrained(folder / f"model_seed{seed}")
    (folder / "data").mkdir()
    for split, people in (("validation", 4), ("test", 6)):
        rows = tiny_dataset(num_ids=people, seed=people)
        rows.to_parquet(str(folder / "data" / f"{split}-00000-of-00001.parquet"))
    models = [str(folder / f"model_seed{seed}") for seed in (0, 1)]
    return ["--models", *models, "--dataset", str(folder), "--rerank_k", str(K)]


@functools.cache
def evaluated(seed: int, people: int) -> RetrievalResult:
    rows = tiny_dataset(num_ids=people, seed=people)
    return evaluate_retrieval(tiny_model(seed=seed), tiny_processor(), rows, rerank_k=K)


def metrics_of(seed: int, people: int, fusion: str) -> dict[str, float]:
    """R@1 and mAP of a model by one fusion, the plain way."""
    result = evaluated(seed, people)
    name, _, weight = fusion.partition(" ")
    scores = result.similarity if fusion == "similarity" else result.fuse(name, float(weight) if weight else None)
    metrics = retrieval_metrics(scores, result.query_ids, result.gallery_ids)
    return {metric: metrics[metric] for metric in ("R1", "mAP")}


def test_chosen_on_validation_and_measured_on_test(arguments, capsys, monkeypatch):
    chosen_on = []
    choose = score_fusions.choose_retrieval
    monkeypatch.setattr(
        score_fusions, "choose_retrieval", lambda result, name: chosen_on.append(name) or choose(result, name)
    )
    score_fusions.main(arguments)
    lines = capsys.readouterr().out.splitlines()
    report = json.loads(lines[-1])
    assert report["benchmark"] == "score_fusions" and report["rerank_k"] == K
    assert [name.split()[-1] for name in chosen_on] == ["validation", "test"] * 2

    results = report["results"]
    assert list(results) == [*score_fusions.FIXED, score_fusions.CHOSEN]
    for seed, model in enumerate(report["models"]):
        fusion = report["choices"][model]
        expected = {name: metrics_of(seed, 6, name) for name in score_fusions.FIXED}
        expected[score_fusions.CHOSEN] = metrics_of(seed, 6, fusion)
        for name, metrics in expected.items():
            found = {metric: results[name][metric][seed] for metric in metrics}
            assert found == pytest.approx(metrics), (model, name)
        others = [metrics_of(seed, 4, name) for name in score_fusions.FIXED if name != "similarity"]
        ours = metrics_of(seed, 4, fusion)
        assert all(sum(ours.values()) >= sum(other.values()) - 0.02 for other in others)

    row = next(line for line in lines if line.startswith("single"))
    differences = [a - b for a, b in zip(results["single"]["R1"], results["chosen"]["R1"], strict=True)]
    assert score_fusions.show(results["single"]["R1"]) in row and score_fusions.show(differences) in row


def test_mean_and_deviation():
    assert score_fusions.show([1.0, 3.0]) == "2.00 ± 1.41"
    assert score_fusions.show([1.0]) == "1.00 ± 0.00"  # one model has no deviation
