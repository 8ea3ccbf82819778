"""Compare the fusions of scores on several models: each fusion on the test split, and the one chosen on validation.

    python benchmarks/score_fusions.py --models outputs/augmentation/ours_seed*/final --dataset data/sample/arrow/pedes

Models that differ only in their seed give paired differences to the chosen fusion. The choice is `choose_retrieval`'s on the
validation split; the test split is read once per model and not used for choices. The last line is one JSON object.
"""

import json
import statistics
from dataclasses import dataclass
from typing import Literal

from mra.common.arguments import option, parse_arguments
from mra.common.loading import load_model, load_processor
from mra.common.tables import Table, load_split
from mra.retrieval import choose_retrieval, evaluate_retrieval
from mra.retrieval.evaluation import RetrievalResult


CHOSEN = "chosen"
FIXED = ("similarity", "single", "published", "posterior 1")


@dataclass
class ScoreFusionBenchmark:
    """Options of this benchmark."""

    models: list[str] = option(help="model folders")
    dataset: str = option(help="prepared dataset with the splits validation and test")
    rerank_k: int = option(16, "images re-ranked per query")
    attn_implementation: Literal["sdpa", "eager"] = option("eager", "attention implementation")


def main(argv: list[str] | None = None) -> None:
    """Evaluate every model on both splits and print the mean metrics of each fusion and their difference to the chosen one."""
    (args,) = parse_arguments([ScoreFusionBenchmark], description=__doc__, argv=argv, config=False)
    splits = {split: load_split(args.dataset, split, argument="--dataset") for split in ("validation", "test")}
    runs, choices = [], {}
    for model in args.models:
        validation = choose_retrieval(evaluate(model, splits["validation"], args), f"{args.dataset} validation")
        tried = choose_retrieval(evaluate(model, splits["test"], args), f"{args.dataset} test").tried_fusions
        choices[model] = validation.fusion
        runs.append({name: tried[name] for name in FIXED} | {CHOSEN: tried[validation.fusion]})
        print(f"{model}: {validation.fusion} is chosen; R@1 {runs[-1][CHOSEN]['R1']:.2f}", flush=True)
    print(f"\n{'':<14}{'R@1':>16}{'mAP':>16}{'R@1 - chosen':>18}{'mAP - chosen':>18}")
    results = {name: {metric: [run[name][metric] for run in runs] for metric in ("R1", "mAP")} for name in runs[0]}
    for name, metrics in results.items():
        pairs = [zip(values, results[CHOSEN][metric], strict=True) for metric, values in metrics.items()]
        cells = [show(values) for values in metrics.values()]
        cells += [show([ours - chosen for ours, chosen in pair]) for pair in pairs]
        print(f"{name:<14}{cells[0]:>16}{cells[1]:>16}{cells[2]:>18}{cells[3]:>18}")
    settings = {name: getattr(args, name) for name in ("dataset", "rerank_k", "models")}
    print(json.dumps({"benchmark": "score_fusions"} | settings | {"choices": choices, "results": results}))


def evaluate(model: str, split: Table, args: ScoreFusionBenchmark) -> RetrievalResult:
    """Evaluate a model with re-ranking on one split."""
    loaded = load_model(model, args.attn_implementation)
    return evaluate_retrieval(loaded, load_processor(model), split, rerank_k=args.rerank_k)


def show(values: list[float]) -> str:
    """Format mean and standard deviation over the models."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {deviation:.2f}"


if __name__ == "__main__":
    main()
