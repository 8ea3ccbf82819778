"""Validation between epochs, and the selection of the best model."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast
from transformers import PreTrainedModel

from mra.common.tables import Table
from mra.retrieval import RetrievalChoice, RetrievalResult, choose_retrieval, evaluate_retrieval
from mra.retrieval.evaluation import METRIC_TITLES
from mra.training.arguments import EvaluationArguments
from mra.training.checkpointing import TrainingState, keep_aside
from mra.training.runtime import autocast_dtype, whole_model
from processing_mra import MRAProcessor


logger = get_logger(__name__)

_SELECTED_BY = {"R1": ("R1",), "mAP": ("mAP",), "mean": ("R1", "mAP")}


def validate(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: MRAProcessor,
    dataset: Table,
    args: EvaluationArguments,
    evaluated_on: str,
    num_workers: int = 0,
    num_queries: int | None = None,
    seed: int = 0,
) -> tuple[RetrievalResult, RetrievalChoice | None]:
    """Evaluate the model being trained; every process must call this, and all get the same metrics.

    Args:
        accelerator: the accelerator that prepared the model.
        model: the prepared model.
        processor: the `MRAProcessor`.
        dataset: the validation split.
        args: an `EvaluationArguments`.
        evaluated_on: name of its dataset.
        num_workers: worker processes that decode images.
        num_queries: captions to draw as queries; None for all.
        seed: seed of the draw.

    Returns:
        The result, with the `metrics` `similarity` and, with re-ranking, `reranked`: R1, R5, R10, mAP and mINP in percent;
        and the choice of fusion and depth used by `reranked`, None without re-ranking.
    """
    unwrapped: Any = accelerator.unwrap_model(model, keep_torch_compile=False)
    # BatchNorm statistics differ between processes after a step; those of the main process are saved.
    broadcast(list(unwrapped.buffers()))
    result = evaluate_retrieval(
        whole_model(unwrapped),
        processor,
        dataset,
        rerank_k=min(args.eval_rerank_k, len(dataset)),
        flip=args.eval_flip,
        batch_size=args.eval_batch_size,
        num_workers=num_workers,
        num_queries=num_queries,
        seed=seed,
        dtype=autocast_dtype(accelerator) if args.eval_dtype == "training" else torch.float32,
    )
    if not result.rerank_k:
        return result, None
    choice = choose_retrieval(
        result, f"validation data of {evaluated_on}", args.eval_score_fusion, args.eval_match_weight
    )
    result = result.with_fusion(choice.score_fusion, choice.match_weight)
    logger.info(choice.describe())
    if choice.warning():
        logger.warning(choice.warning())
    return result, choice


def count_queries(args: EvaluationArguments, epochs_left: int) -> int | None:
    """Return how many captions a validation draws as queries; None for all.

    Args:
        args: an `EvaluationArguments`.
        epochs_left: epochs after the one to validate, 0 for the last.
    """
    return None if epochs_left < args.eval_whole_epochs else args.eval_queries


def selection_metric(metrics: dict[str, dict[str, float]], metric: str) -> float:
    """Return the value in percent that selects the best model: after re-ranking if it was done.

    Args:
        metrics: metrics of a `RetrievalResult`.
        metric: a `selection_metric` of `EvaluationArguments`.
    """
    values, names = metrics.get("reranked", metrics["similarity"]), _SELECTED_BY[metric]
    return sum(values[name] for name in names) / len(names)


def describe_selection(args: EvaluationArguments, sample: str | None = None) -> str:
    """Describe how the value that selects the best model is measured; only equally measured values are comparable.

    Args:
        args: an `EvaluationArguments`.
        sample: the `sample` of the `RetrievalResult`.
    """
    how = "by similarity alone"
    if args.eval_rerank_k:
        weight = "" if args.eval_match_weight is None else f" {args.eval_match_weight:g}"
        how = f"with {args.eval_rerank_k} images re-ranked, score fusion {args.eval_score_fusion}{weight}"
    precision = "" if args.eval_dtype == "training" else f", in {args.eval_dtype}"
    metric = " and ".join(METRIC_TITLES[name] for name in _SELECTED_BY[args.selection_metric])
    metric = f"the mean of {metric}" if args.selection_metric == "mean" else metric
    drawn = "" if sample is None else f", on {sample}"
    return f"{metric} {how}{'' if args.eval_flip else ', without mirror images'}{precision}{drawn}"


def record_best(
    accelerator: Accelerator,
    state: TrainingState,
    result: RetrievalResult,
    args: EvaluationArguments,
    output_dir: str | Path,
    name: str = "best",
) -> bool:
    """Decide whether a validated model is the best so far, and record it in the state; every process must call this.

    If the best value so far was measured differently, because the run was resumed with other arguments or this validation is
    the first one with all captions, the selection starts again, and the earlier model is kept, see `keep_aside`.

    Args:
        accelerator: the run's accelerator.
        state: updated in place.
        result: result of the validation.
        args: an `EvaluationArguments`.
        output_dir: folder of the run.
        name: folder of the best model: `best`, or `best_ema` for the averaged weights.
    """
    best_metric, best_epoch, best_measure = (
        getattr(state, f"{name}_{field}") for field in ("metric", "epoch", "measure")
    )
    selected_by = describe_selection(args, result.sample)
    if best_epoch and best_measure != selected_by:
        before = best_measure or "R@1 in an older version, which did not record how it was measured"
        aside = keep_aside(accelerator, output_dir, best_epoch, name)
        logger.warning(
            f"the model in {name} ({best_metric:.2f} after epoch {best_epoch}) was selected by {before}, but "
            f"from now on it is {selected_by}, which is not comparable: the selection starts again and the earlier model is "
            f"kept as {aside}"
        )
        best_metric = -1.0
    metric = selection_metric(result.metrics, args.selection_metric)
    if metric <= best_metric:
        return False
    for field, value in (("metric", metric), ("epoch", state.epoch), ("measure", selected_by)):
        setattr(state, f"{name}_{field}", value)
    return True
