"""metrics/retrieval through evaluate.load, against mra.retrieval.metrics."""

from pathlib import Path

import evaluate
import pytest
import torch

from mra.retrieval.metrics import match_ranks, retrieval_metrics


FOLDER = str(Path(__file__).parents[2] / "metrics" / "retrieval")


@pytest.fixture
def module(tmp_path):
    return evaluate.load(FOLDER, cache_dir=str(tmp_path))


def test_equals_torch_metrics(module):
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(60, 25, generator=generator)
    gallery_ids = torch.arange(25) % 7
    query_ids = torch.randint(0, 7, (60,), generator=generator)
    ranks, counts = match_ranks(scores, query_ids, gallery_ids)
    lists = [part.tolist() for part in ranks.split(counts.tolist())]
    expected = pytest.approx(retrieval_metrics(scores, query_ids, gallery_ids), abs=1e-9)
    assert module.compute(ranks=lists) == expected
    for start in range(0, 60, 16):
        module.add_batch(ranks=lists[start : start + 16])
    assert module.compute() == expected


@pytest.mark.parametrize("ranks", [[], [0, 3], [2, 2]])
def test_ranks_are_checked(module, ranks):
    with pytest.raises(ValueError, match="query 1: ranks must be one or more different positions counted from 1"):
        module.compute(ranks=[[1, 2], ranks])
