"""Ranking of `eval_retrieval.py`: as requested, as saved with the model, or as chosen on validation and saved."""

import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from mra.common.sharding import Shard
from mra.common.tables import load_split, split_names
from mra.common.weight_files import weights_digest
from mra.retrieval.arguments import RetrievalArguments
from mra.retrieval.evaluation import evaluate_retrieval
from mra.retrieval.rerank_depth import LARGEST_K
from mra.retrieval.retrieval_choice import (
    AUTO,
    FILE_NAME,
    Fusion,
    RetrievalChoice,
    choose_retrieval,
    fusion_candidates,
)
from mra.retrieval.score_fusion import DEFAULT_SCORE_FUSION, fusion_name
from processing_mra import MRAProcessor


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Ranking:
    """Fusion, weight and depth of a ranking, and where they come from.

    Attributes:
        rerank_k: images re-ranked per query.
        score_fusion: fusion of scores, never "auto".
        match_weight: weight of the matching log-odds, or None.
        choice: the applied choice on validation, or None.
        notes: messages on choices that are saved but not applied, and on where the choice was saved.
        warnings: messages on what makes the metrics too low or too high.
    """

    rerank_k: int
    score_fusion: str
    match_weight: float | None
    choice: RetrievalChoice | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()


def given_fusion(args: RetrievalArguments) -> Fusion | None:
    """Return the fusion if the arguments leave nothing to choose; None if a choice is saved or to be made."""
    if args.rerank_k == 0:
        return DEFAULT_SCORE_FUSION, None
    candidates = fusion_candidates(args.score_fusion, args.match_weight)
    return candidates[0] if len(candidates) == 1 and args.rerank_k != AUTO else None


def find_ranking(model: PreTrainedModel, processor: MRAProcessor, args: RetrievalArguments, options: dict) -> Ranking:
    """Find fusion, weight and depth: as given, as saved with the model, or as chosen now on the validation split.

    If several processes share the work, every process must call this.

    Args:
        model: the model, as for `evaluate_retrieval`.
        processor: the model's MRAProcessor.
        args: arguments of `eval_retrieval.py`; used are model, dataset, split, output_dir, rerank_k, score_fusion,
            match_weight, flip and dtype.
        options: further arguments of `evaluate_retrieval`.

    Raises:
        ValueError: if `rerank_k` is to be chosen but no matching choice is saved and the dataset has no validation split, or
            the choice saved with the model cannot be read.
    """
    fusion = given_fusion(args)
    if fusion is not None:
        assert not isinstance(args.rerank_k, str)  # then it is chosen
        notes = describe_overruled(args, fusion) if args.rerank_k else ()
        return Ranking(args.rerank_k, *fusion, notes=notes)
    choice, notes = find_saved_choice(args)
    if choice is None:
        choice, more = choose_now(model, processor, args, options)
        notes += more
    if choice is None:
        fusion = (DEFAULT_SCORE_FUSION, None) if args.score_fusion == AUTO else (args.score_fusion, 1.0)
        warning = (
            f"score fusion {fusion_name(*fusion)} was not chosen on data: no matching choice is saved with the model and "
            f"{args.dataset} has no validation split; evaluate the model once on a dataset that has one, or name "
            "--score_fusion"
        )
        assert not isinstance(args.rerank_k, str)  # `choose_now` has refused it
        return Ranking(args.rerank_k, *fusion, notes=tuple(notes), warnings=(warning,))
    if choice.dtype not in (None, args.dtype):
        notes.append(f"score fusion and weight were chosen in {choice.dtype} and are applied in {args.dtype}")
    warnings = [warning for warning in [choice.warning()] if warning]
    if choice.chosen_on in {f"{args.dataset} {name}" for name in split_names(args.split)}:
        warnings.append("this is the split that the fusion was chosen on: the re-ranked metrics are too optimistic")
    rerank_k = choice.rerank_k if args.rerank_k == AUTO else args.rerank_k
    return Ranking(rerank_k, choice.score_fusion, choice.match_weight, choice, tuple(notes), tuple(warnings))


def would_apply_choice(args: RetrievalArguments, recorded: dict | None) -> bool:
    """Return whether an evaluation with these arguments would apply the choice that an earlier one recorded.

    Args:
        args: arguments of the evaluation.
        recorded: `choice` of the earlier one's `metrics.json`.

    Raises:
        ValueError: if the choice saved with the model cannot be read.
    """
    if given_fusion(args) is not None:
        return recorded is None
    choice, _ = find_saved_choice(args)
    if choice is None:
        can_choose = load_split(args.dataset, "validation", argument="--dataset", optional=True) is not None
        return recorded is None and not can_choose
    found = json.loads(json.dumps(asdict(choice)))
    return recorded is not None and recorded | {"model": None} == found | {"model": None}  # it names where it is saved


def describe_overruled(args: RetrievalArguments, fusion: Fusion) -> tuple[str, ...]:
    """Describe the saved choice that the command line overrides."""
    try:
        saved = RetrievalChoice.load(args.model)
    except ValueError as error:  # the choice is not needed
        return (str(error),)
    if saved is None or (saved.score_fusion, saved.match_weight) == fusion:
        return ()
    return (f"--score_fusion overrides the choice saved with the model: {saved.describe()}",)


def find_saved_choice(args: RetrievalArguments) -> tuple[RetrievalChoice | None, list[str]]:
    """Read the choice saved with the model, or for it in the output folder, and describe why one is not applied."""
    notes = []
    for folder in (args.model, args.output_dir):
        if folder == args.output_dir and not (Path(folder) / FILE_NAME).is_file():
            continue  # a missing folder would be looked up on the Hub
        saved = RetrievalChoice.load(folder, None if folder == args.model else args.model)
        if saved is None:
            continue
        reason = saved.misfit(args.score_fusion, args.match_weight, args.flip)
        if reason is None:
            return saved, notes
        notes.append(f"{FILE_NAME} of {folder} is not applied: {reason}")
    return None, notes


def choose_now(
    model: PreTrainedModel, processor: MRAProcessor, args: RetrievalArguments, options: dict
) -> tuple[RetrievalChoice | None, list[str]]:
    """Choose on the validation split and save the choice; return None if there is no such split.

    Raises:
        ValueError: if there is none and `rerank_k`, which has no default, is to be chosen.
    """
    validation = load_split(args.dataset, "validation", argument="--dataset", optional=True)
    if validation is None:
        if args.rerank_k != AUTO:
            return None, []
        raise ValueError(
            f"--rerank_k {AUTO}: no choice is saved with model {args.model} for --score_fusion {args.score_fusion} "
            f"{'--flip' if args.flip else '--no_flip'}, and {args.dataset} has no validation split to choose on: give a "
            "number, or choose first on a dataset that has one"
        )
    largest = LARGEST_K if args.rerank_k == AUTO else args.rerank_k
    result = evaluate_retrieval(model, processor, validation, rerank_k=min(largest, len(validation)), **options)
    choice = choose_retrieval(result, f"{args.dataset} validation", args.score_fusion, args.match_weight)
    if not Shard.current().is_main:
        return choice, []
    choice = replace(choice, weights=weights_digest(args.model))  # for this run's report too
    logger.info("%s", choice.format_table())
    return choice, keep_choice(choice, args)


def keep_choice(choice: RetrievalChoice, args: RetrievalArguments) -> list[str]:
    """Save a choice in the model's folder, or in the output folder if that fails or would lose another choice."""
    reason = f"{args.model} is not a folder"
    if Path(args.model).is_dir():
        reason = f"{args.model} keeps its {FILE_NAME}, which was chosen among more fusions or for other views"
        if choice.supersedes(RetrievalChoice.load(args.model)):
            try:
                logger.info("saved the choice of fusion and rerank_k in %s", choice.save(args.model))
                return []
            except OSError as error:
                reason = f"{args.model} cannot be written ({error.strerror or error})"
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    path = replace(choice, model=args.model).save(args.output_dir)
    return [
        f"{reason}: the choice is saved in {path} and used again with this --output_dir; copy it to the model's folder "
        "to keep it there"
    ]
