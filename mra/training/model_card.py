"""Model cards, and the upload of models to the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import yaml
from accelerate.logging import get_logger
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from mra.common.cards import fill_card, markdown_table
from mra.common.weight_files import first_line
from mra.retrieval import RetrievalChoice, RetrievalResult
from mra.retrieval.evaluation import below_similarity


logger = get_logger(__name__)

_METRICS = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mAP": "mAP", "mINP": "mINP"}
_LOCAL = ("output_dir", "resume", "overwrite_output_dir", "push_to_hub", "hub_model_id", "hub_private")
_STAGES = {"similarity": "similarity alone", "reranked": "after re-ranking"}
_TEMPLATES = Path(__file__).parent / "templates"


def build_card(
    recipe: dict[str, Any],
    epochs: int,
    result: RetrievalResult | None = None,
    evaluated_on: str | None = None,
    choice: RetrievalChoice | None = None,
    selected_by: str | None = None,
    is_averaged: bool = False,
) -> str:
    """Write the card of a trained model.

    Args:
        recipe: resolved arguments of the run.
        epochs: epochs that the weights were trained for.
        result: result of [`~mra.training.validation.validate`]; None if nothing was evaluated.
        evaluated_on: name of the dataset with the validation data.
        choice: ranking chosen on that data, or None.
        selected_by: what selected the model as the best of the run; None for the last one.
        is_averaged: whether the weights are the moving average of those of training.

    Returns:
        Text of a `README.md`, starting with its metadata.
    """
    start, metrics = recipe["model_name_or_path"], result.metrics if result else {}
    repository = recipe["hub_model_id"] or Path(recipe["output_dir"]).name
    base_model = start if start and not Path(start).exists() else None
    entries = _index_entries(result, str(evaluated_on)) if result else None
    shown = {name: value for name, value in recipe.items() if name not in _LOCAL}
    return _fill(
        "trained_model_card.md",
        repository,
        {"base_model": base_model, "eval_results": entries},
        dataset=recipe["dataset"],
        start=start,
        metrics=_metrics_table(result) if result else None,
        sample=result.sample if result else None,
        warning=below_similarity(metrics) if metrics else None,
        evaluated_on=evaluated_on,
        epochs=epochs,
        choice=choice,
        selected_by=selected_by,
        ema_decay=recipe["ema_decay"] if is_averaged else None,
        fusions=_fusions_table(choice) if choice else None,
        recipe=yaml.safe_dump(shown, sort_keys=False, allow_unicode=True),
    )


def build_converted_card(repository: str, source: str, config: Mapping[str, Any], has_processor: bool) -> str:
    """Write the card of a model converted from a released checkpoint.

    Args:
        repository: Hub id, or name of the folder.
        source: name of the checkpoint file.
        config: facts about the architecture, name -> value.
        has_processor: whether the folder includes a processor.

    Returns:
        Text of a `README.md`, starting with its metadata.
    """
    return _fill(
        "converted_model_card.md",
        repository,
        {},
        source=source,
        facts=list(config.items()),
        has_processor=has_processor,
    )


def _fill(template: str, repository: str, metadata: dict[str, Any], **values: object) -> str:
    """Fill a template with the metadata and values shared by both cards, and its own values."""
    name = repository.split("/")[-1]
    data = ModelCardData(
        language="en",
        license="other",
        license_name="research-only",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["text-based-person-retrieval", "image-text-retrieval", "mra"],
        model_name=name,
        **metadata,
    )
    return fill_card(_TEMPLATES / template, data, name=name, repository=repository, **values)


def _metrics_table(result: RetrievalResult) -> str:
    labels = _STAGES | {"reranked": f"{_STAGES['reranked']} ({result.ranking})"}
    rows = [[labels[stage], *(f"{values[key]:.2f}" for key in _METRICS)] for stage, values in result.metrics.items()]
    return markdown_table(["", *_METRICS.values()], rows)


def _index_entries(result: RetrievalResult, evaluated_on: str) -> list[EvalResult]:
    """Return the entries of the card's model-index."""
    both = {"flip": result.flip} | ({} if result.sample is None else {"queries": result.sample})
    ways = {
        "similarity": both,
        "reranked": {
            **both,
            "rerank_k": result.rerank_k,
            "score_fusion": result.score_fusion,
            "match_weight": result.match_weight,
        },
    }
    return [
        EvalResult(
            task_type="text-to-image-retrieval",
            dataset_type=evaluated_on,
            dataset_name=Path(evaluated_on).name,
            dataset_split="validation",
            metric_type=key.lower(),
            metric_name=f"{label} ({_STAGES[stage]})",
            metric_value=round(values[key], 2),
            metric_args=ways[stage],
        )
        for stage, values in result.metrics.items()
        for key, label in _METRICS.items()
    ]


def _fusions_table(choice: RetrievalChoice) -> str:
    """Return a table of the fusions that were tried for a choice."""
    rows = [
        [name, f"{values['R1']:.2f}", f"{values['mAP']:.2f}", "chosen" if name == choice.fusion else ""]
        for name, values in choice.tried_fusions.items()
    ]
    return markdown_table([f"k {max(choice.tried)}", "R@1", "mAP", ""], rows)


class HubTarget(Protocol):
    """Repository to push to, as in `HubArguments` of [`mra.training.arguments`]."""

    hub_model_id: Any
    hub_private: bool


def push_folder(folder: str | Path, args: HubTarget, message: str = "Upload model") -> str:
    """Upload a finished folder to the Hub in one commit.

    Args:
        folder: folder with model, processor, code and card.
        args: a `HubArguments`.
        message: commit message.

    Returns:
        URL of the commit.

    Raises:
        ValueError: if the folder's card is not valid, or the upload fails; the folder is unchanged.
    """
    ModelCard.load(Path(folder) / "README.md")
    api = HfApi()
    try:
        repository = api.create_repo(args.hub_model_id, private=args.hub_private, exist_ok=True).repo_id
        commit = api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message)
    except Exception as error:  # each HTTP library raises its own
        raise ValueError(
            f"{folder} is complete but was not pushed to {args.hub_model_id} ({first_line(error)}): check the connection and "
            f"`hf auth login`, then push it with `hf upload {args.hub_model_id} {folder}`"
        ) from error
    logger.info(f"pushed {folder} to {commit.commit_url}")
    return commit.commit_url
