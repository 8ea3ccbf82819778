"""Measure what searches save and lose on a labelled split: matched views, precision of cached tokens, early stopping.

    python benchmarks/matched_pairs.py --model outputs/sample/finetune/best --dataset data/sample/arrow/pedes

Log-odds of all pairs are computed once for each precision. The pairs that early stopping matches follow from them for every
caption; some captions are also searched in a gallery, for time and to compare the hits. The bound is the one saved with the
model, else that of its validation split at `--bound_rerank`. The last line is one JSON object.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/matched_pairs.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import time

import numpy as np
import torch

from mra.common.arguments import option, parse_arguments
from mra.common.tables import Table, load_split
from mra.gallery.gallery import Gallery
from mra.gallery.searching import round_size
from mra.gallery.types import DEFAULT_RERANK, TOKEN_DTYPES
from mra.retrieval.early_stopping import match_in_rounds
from mra.retrieval.encoders import Encoder, TorchEncoder, match_nearest
from mra.retrieval.evaluation import evaluate_retrieval, read_captions
from mra.retrieval.metrics import retrieval_metrics
from mra.retrieval.reranking import similarity_matrix, top_k
from mra.retrieval.retrieval_choice import choose_retrieval
from mra.retrieval.score_fusion import fuse_scores


DTYPES = (*TOKEN_DTYPES, "bfloat16")


@dataclass
class MatchedPairsBenchmark:
    """Options of this benchmark."""

    model: str = option(help="model folder or Hub id")
    dataset: str = option(help="prepared dataset with the splits validation and test")
    split: str = option("test", "split to measure on")
    rerank: int = option(DEFAULT_RERANK, "images to re-rank per caption")
    tops: list[int] = option([10, 20], "numbers of first hits to settle")
    bound_rerank: int = option(16, "images per validation caption for a bound that is not saved with the model")
    searches: int = option(100, "captions to search in a gallery, evenly spaced; 0 for none")
    device: str | None = option(None, "device to run on; the GPU if there is one")
    dtype: Literal["auto", "float32", "bfloat16"] = option("float32", "precision of the forward passes")
    threads: int = option(1, "CPU threads; more than one would also count waiting as CPU time")


@dataclass
class Scores:
    """Scores of the captions of a split.

    Attributes:
        similarity: `(captions, images)`.
        nearest: images to re-rank, `(captions, k)`.
        log_odds: by dtype of the tokens, `(2, captions, k)`, the upright image first.
        query_ids: identities `(captions,)`.
        gallery_ids: identities `(images,)`.
        temperature: of the model.
        weight: of the matching log-odds.
    """

    similarity: torch.Tensor
    nearest: torch.Tensor
    log_odds: dict[str, torch.Tensor]
    query_ids: torch.Tensor
    gallery_ids: torch.Tensor
    temperature: float
    weight: float

    def fused(self, dtype: str, views: int) -> torch.Tensor:
        """Return the posterior `(captions, images)`."""
        log_odds = self.log_odds[dtype][:views]
        return self.fuse(self.similarity, self.nearest, log_odds)

    def fuse(self, similarity: torch.Tensor, matched: torch.Tensor, log_odds: torch.Tensor) -> torch.Tensor:
        """Return the posterior of some captions, as from `fuse_scores`."""
        temperature, weight = self.temperature, self.weight
        return fuse_scores(similarity, matched, log_odds, "posterior", temperature=temperature, match_weight=weight)

    def first_hits(self, dtype: str, views: int, top: int) -> torch.Tensor:
        """Return the first images of the ranking in order, `(captions, top)`."""
        return self.fused(dtype, views).argsort(dim=1, descending=True, stable=True)[:, :top]


def main(argv: list[str] | None = None) -> None:
    """Measure, print tables and the JSON object."""
    (args,) = parse_arguments([MatchedPairsBenchmark], description=__doc__, argv=argv, config=False)
    torch.set_num_threads(args.threads)
    split = load_split(args.dataset, args.split, argument="--dataset")
    encoder = TorchEncoder(args.model, args.device, args.dtype)
    bounds = encoder.largest_log_odds or measure_bounds(encoder, args)
    scores = score(encoder, split, args.rerank)
    captions = len(scores.query_ids)
    print(f"{captions:,} captions, {len(split):,} images, weight {scores.weight:g}, bounds {bounds}")
    rows = [row for views in (1, 2) for row in compare_dtypes(scores, views, max(args.tops))]
    print_table(rows)
    stopped = [stop_early(scores, views, top, bounds[views], encoder) for views in (1, 2) for top in args.tops]
    print_table(stopped)
    searched = search_gallery(encoder, split, bounds, args) if args.searches else []
    print_table(searched)
    found = {"captions": captions, "images": len(split), "weight": scores.weight, "largest_log_odds": bounds}
    results = {"rankings": rows, "early_stopping": stopped, "searches": searched}
    print(json.dumps({"benchmark": "matched_pairs", "rerank": args.rerank} | found | results))


def measure_bounds(encoder: TorchEncoder, args: MatchedPairsBenchmark) -> dict[int, float]:
    """Measure the bound of early stopping on the validation split, as training and evaluation do."""
    validation = load_split(args.dataset, "validation", argument="--dataset")
    rerank_k = min(args.bound_rerank, len(validation))
    result = evaluate_retrieval(encoder.model, encoder.processor, validation, rerank_k=rerank_k)
    return choose_retrieval(result, f"{args.dataset} validation").largest_log_odds


def score(encoder: TorchEncoder, split: Table, rerank: int) -> Scores:
    """Match every caption with its nearest images, with tokens of every precision."""
    captions, query_rows, gallery_ids = read_captions(split)
    images, texts = encoder.encode_images(split), encoder.encode_texts(captions)  # pyright: ignore[reportArgumentType]  # rows
    assert images.hidden_states is not None, "encoders keep hidden states"
    similarity = similarity_matrix(texts.embeds, images.embeds)
    nearest = top_k(similarity, min(rerank, len(gallery_ids)))
    log_odds = {}
    for dtype in DTYPES:
        rounded = replace(images, hidden_states=images.hidden_states.to(getattr(torch, dtype)))
        log_odds[dtype] = match_nearest(encoder, texts, rounded, nearest)
    weight = 1.0 if encoder.match_weight is None else encoder.match_weight
    ids = gallery_ids[query_rows], gallery_ids
    return Scores(similarity, nearest, log_odds, *ids, encoder.temperature, weight)


def compare_dtypes(scores: Scores, views: int, top: int) -> list[dict]:
    """Return R@1, mAP and the share of captions whose first hits are those of float32, for each precision."""
    rows = []
    exact = scores.first_hits(DTYPES[0], views, top)
    for dtype in DTYPES:
        metrics = retrieval_metrics(scores.fused(dtype, views), scores.query_ids, scores.gallery_ids)
        hits = scores.first_hits(dtype, views, top)
        difference = (
            (scores.log_odds[dtype][:views] - scores.log_odds[DTYPES[0]][:views]).mean(dim=0).abs().max().item()
        )
        rows.append({"views": views, "tokens": dtype, "R1": metrics["R1"], "mAP": metrics["mAP"]})
        rows[-1] |= {"max_difference": difference, f"same_top_{top}": (hits == exact).all(dim=1).float().mean().item()}
        rows[-1] |= {"same_first": (hits == exact)[:, 0].float().mean().item()}
    return rows


def stop_early(scores: Scores, views: int, top: int, bound: float, encoder: TorchEncoder) -> dict:
    """Return how many images early stopping matches, and for how many captions the first hits are those of matching all."""
    expected = scores.first_hits(DTYPES[0], views, top)
    matched, same = [], []
    for row, nearest in enumerate(scores.nearest):
        log_odds = scores.log_odds[DTYPES[0]][:views, row].numpy()
        places, _ = match_in_rounds(
            scores.similarity[row, nearest].numpy(),
            lambda places, log_odds=log_odds: (list(places), log_odds[:, places.start : places.stop]),
            top=top,
            rerank=len(nearest),
            temperature=scores.temperature,
            match_weight=scores.weight,
            largest_log_odds=bound,
            round_size=round_size(encoder),
        )
        matched.append(len(places))
        of_row = torch.from_numpy(log_odds[:, None, places])
        fused = scores.fuse(scores.similarity[row : row + 1], nearest[None, places], of_row)
        order = fused[0].argsort(descending=True, stable=True)
        same.append(torch.equal(order[:top], expected[row]))
    found = {"views": views, "top": top, "matched_mean": float(np.mean(matched))}
    found |= {"matched_90_percent": float(np.quantile(matched, 0.9)), "matched_most": max(matched)}
    return found | {"same": sum(same), "different": len(same) - sum(same)}


def search_gallery(encoder: TorchEncoder, split: Table, bounds: dict[int, float], args: MatchedPairsBenchmark) -> list:
    """Search a gallery of the split with and without early stopping: CPU time of a search, and equal hits."""
    captions = read_captions(split)[0]
    captions = [captions[int(row)] for row in np.linspace(0, len(captions) - 1, min(args.searches, len(captions)))]
    rows = []
    for views in (1, 2):
        with Gallery(":memory:", encoder=cast(Encoder, _Bounded(encoder, bounds)), matched_views=views) as gallery:
            gallery.build(split)  # pyright: ignore[reportArgumentType]  # a Dataset
            for top in args.tops:
                seconds, matched, same = {True: 0.0, False: 0.0}, 0, 0
                for caption in captions:
                    hits = {}
                    for early_stop in (False, True):
                        start = time.process_time()
                        result = gallery.search(caption, top=top, rerank=args.rerank, early_stop=early_stop)
                        seconds[early_stop] += time.process_time() - start
                        hits[early_stop] = [hit.key for hit in result.hits]
                    matched += result.matched
                    same += hits[True] == hits[False]
                times = {
                    "cpu_ms": 1e3 * seconds[True] / len(captions),
                    "cpu_ms_all": 1e3 * seconds[False] / len(captions),
                }
                found = {"views": views, "top": top, "matched_mean": matched / len(captions)} | times
                rows.append(found | {"same": same, "different": len(captions) - same})
    return rows


class _Bounded:
    """An encoder with another bound of the log-odds."""

    def __init__(self, encoder: TorchEncoder, bounds: dict[int, float]) -> None:
        self._encoder, self.largest_log_odds = encoder, bounds

    def __getattr__(self, name: str) -> object:
        return getattr(self._encoder, name)


def print_table(rows: list[dict]) -> None:
    """Print rows of equal keys as a table."""
    for line in [list(rows[0]), *[row.values() for row in rows]] if rows else []:
        print("".join(f"{value:>20.4f}" if isinstance(value, float) else f"{value:>20}" for value in line))


if __name__ == "__main__":
    main()
