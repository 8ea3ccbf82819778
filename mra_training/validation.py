"""Evaluation between epochs on the validation split."""

import torch
from accelerate.utils import broadcast

from mra_retrieval import RerankDepth, RetrievalResult, choose_rerank_depth, evaluate_retrieval
from mra_training.runtime import autocast_dtype, whole_model


def validate(accelerator, model, processor, dataset, args, num_workers: int = 0) -> RetrievalResult:
    """
    Evaluates the model under training; every process must call this, and all get the same figures.

    Args:
        accelerator: the one that prepared the model.
        model: the prepared model.
        processor: the `MRAProcessor`.
        dataset: the validation split.
        args: an `EvaluationArguments`.
        num_workers: processes that decode images.

    Returns:
        Its `metrics` are `similarity` and, with re-ranking, `reranked`: R1, R5, R10, mAP and mINP in percent.
    """
    unwrapped = accelerator.unwrap_model(model, keep_torch_compile=False)
    # BatchNorm statistics differ between processes after a step; the main process's are those that are saved.
    broadcast(list(unwrapped.buffers()))
    return evaluate_retrieval(
        whole_model(unwrapped),
        processor,
        dataset,
        rerank_k=min(args.eval_rerank_k, len(dataset)),
        flip=args.eval_flip,
        score_fusion=args.eval_score_fusion,
        batch_size=args.eval_batch_size,
        num_workers=num_workers,
        dtype=autocast_dtype(accelerator) if args.eval_dtype == "training" else torch.float32,
    )


def selection_metric(metrics: dict[str, dict[str, float]]) -> float:
    """R@1 in percent that chooses the best model: after re-ranking where it was done."""
    return metrics.get("reranked", metrics["similarity"])["R1"]


def rerank_depth(result: RetrievalResult | None, evaluated_on: str | None) -> RerankDepth | None:
    """How deep to re-rank with the model that gave a validation result; None where nothing was re-ranked."""
    if result is None or not result.rerank_k:
        return None
    return choose_rerank_depth(result, f"validation data of {evaluated_on}")
