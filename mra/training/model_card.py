"""Model card of a trained folder, and its way to the Hub."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from accelerate.logging import get_logger
from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData

from mra.common.environment import describe_environment
from mra.retrieval import RetrievalChoice, RetrievalResult
from mra.retrieval.evaluation import below_similarity


logger = get_logger(__name__)

_METRICS = {"R1": "R@1", "R5": "R@5", "R10": "R@10", "mAP": "mAP", "mINP": "mINP"}
_LOCAL = ("output_dir", "resume", "overwrite_output_dir", "push_to_hub", "hub_model_id", "hub_private")
_STAGES = {"similarity": "similarity alone", "reranked": "after re-ranking"}

_SUMMARY = """
# {name}

MRA model for text-based person retrieval (Yang et al., "Minimizing the Pretraining Gap: Domain-aligned Text-Based Person
Retrieval", Pattern Recognition 2026, arXiv [2507.10195](https://arxiv.org/abs/2507.10195)): a Swin image encoder, a BERT
text encoder and a fusion encoder that re-ranks. It finds the photographs of a person in a gallery of pedestrian crops from
a description in English.

{origin}

## Results

{results}
"""

_USAGE = """
## Load it

```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{repository}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{repository}", trust_remote_code=True)
```

## Search with it

```python
images = [Image.open(path) for path in paths]
with torch.no_grad():
    gallery = model.get_image_features(processor(images=images)["pixel_values"])
    query = model.get_text_features(**processor(text="a woman in a red coat with a black backpack"))
ranking = (query @ gallery.T)[0].argsort(descending=True)
```

The first results can be ordered again, more slowly and better, with `model.match_logits`.
"""

_WEIGHTS_ALONE = """
## Load it

```python
from transformers import AutoModel

model = AutoModel.from_pretrained("{repository}", trust_remote_code=True).eval()
```

The folder holds weights alone: it was converted without a tokenizer, so there is no processor for images and captions.
"""

_RECIPE = """
## Recipe

```yaml
{recipe}```

{environment}
"""

_LIMITS = """
## Intended use and limits

For research on text-based person retrieval. The data sets behind it are released for research alone, and show people
who did not choose to be found: do not use it to identify, follow or watch people. It reads English, expects one person
per crop, and ranks what it is given; it does not say that a person is absent.

## Licence

The weights follow the terms of the data they were trained on: research, not commercial. The code is under its own
licence.
"""


def build_card(
    recipe: dict[str, Any],
    epochs: int,
    result: RetrievalResult | None = None,
    evaluated_on: str | None = None,
    choice: RetrievalChoice | None = None,
) -> str:
    """
    Writes the card of a trained model.

    Args:
        recipe: resolved arguments of the run.
        epochs: epochs that the weights have seen.
        result: as [`~mra.training.validation.validate`] gives it; None if nothing was evaluated.
        evaluated_on: name of the set whose validation data it was measured on.
        choice: how to rank with the model, as chosen on that data.

    Returns:
        Text of a `README.md`, its metadata first.
    """
    repository = recipe["hub_model_id"] or Path(recipe["output_dir"]).name
    results, index = (
        _describe_results(result, evaluated_on, epochs) if result else ("Not evaluated in training.", None)
    )
    if choice is not None:
        results += f"\n\n{_describe_choice(choice)}"
    start = recipe["model_name_or_path"]
    environment = describe_environment()
    versions = ", ".join(f"{library} {version}" for library, version in environment["libraries"].items())
    shown = {name: value for name, value in recipe.items() if name not in _LOCAL}
    body = (_SUMMARY + _USAGE + _RECIPE + _LIMITS).format(
        name=repository.split("/")[-1],
        origin=f"Trained on `{recipe['dataset']}`" + (f", starting from `{start}`." if start else "."),
        results=results,
        repository=repository,
        recipe=yaml.safe_dump(shown, sort_keys=False, allow_unicode=True),
        environment=f"Python {environment['python']}, {versions}; revision {environment['git_revision'] or 'unknown'}.",
    )
    base_model = start if start and not Path(start).exists() else None
    return _with_metadata(body, repository, base_model=base_model, eval_results=index)


def build_converted_card(repository: str, source: str, config: Mapping[str, Any], has_processor: bool) -> str:
    """
    Writes the card of a model converted from a released checkpoint.

    Args:
        repository: Hub id, or name of the folder.
        source: name of the checkpoint file.
        config: what is worth telling of the architecture, name -> value.
        has_processor: whether the folder prepares images and captions too.

    Returns:
        Text of a `README.md`, its metadata first.
    """
    usage = _USAGE if has_processor else _WEIGHTS_ALONE
    facts = "\n".join(f"| {name} | {value} |" for name, value in config.items())
    origin = f"Converted from the released checkpoint `{source}`, tensor by tensor.\n\n| | |\n| --- | --- |\n{facts}"
    body = (_SUMMARY + usage + _LIMITS).format(
        name=repository.split("/")[-1],
        origin=origin,
        results="Nothing was measured in the conversion; `mra evaluate` measures the folder on a test split.",
        repository=repository,
    )
    return _with_metadata(body, repository)


def _with_metadata(body: str, repository: str, **fields) -> str:
    data = ModelCardData(
        language="en",
        license="other",
        license_name="research-only",
        library_name="transformers",
        pipeline_tag="feature-extraction",
        tags=["text-based-person-retrieval", "image-text-retrieval", "mra"],
        model_name=repository.split("/")[-1],
        **fields,
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _describe_results(result: RetrievalResult, evaluated_on, epochs) -> tuple[str, list[EvalResult]]:
    """A table for the reader and the entries of the card's model-index."""
    metrics = result.metrics
    labels = _STAGES | {"reranked": f"{_STAGES['reranked']} ({result.ranking})"}
    rows = [
        f"| {labels[stage]} | " + " | ".join(f"{values[key]:.2f}" for key in _METRICS) + " |"
        for stage, values in metrics.items()
    ]
    header = "| | " + " | ".join(_METRICS.values()) + " |\n|" + " --- |" * (len(_METRICS) + 1)
    table = "\n".join([header, *rows])
    if lower := below_similarity(metrics):
        table += f"\n\n**Warning:** {lower}."
    ways = {
        "similarity": {"flip": result.flip},
        "reranked": {
            "flip": result.flip,
            "rerank_k": result.rerank_k,
            "score_fusion": result.score_fusion,
            "match_weight": result.match_weight,
        },
    }
    index = [
        EvalResult(
            task_type="text-to-image-retrieval",
            dataset_type=str(evaluated_on),
            dataset_name=Path(str(evaluated_on)).name,
            dataset_split="validation",
            metric_type=key.lower(),
            metric_name=f"{label} ({_STAGES[stage]})",
            metric_value=round(values[key], 2),
            metric_args=ways[stage],
        )
        for stage, values in metrics.items()
        for key, label in _METRICS.items()
    ]
    return f"On the validation data of `{evaluated_on}`, in percent, after epoch {epochs}:\n\n{table}", index


def _describe_choice(choice: RetrievalChoice) -> str:
    """What evaluation takes where it is told nothing else, and what else was tried."""
    rows = [
        f"| {name} | {values['R1']:.2f} | {values['mAP']:.2f} |" + (" chosen |" if name == choice.fusion else " |")
        for name, values in choice.tried_fusions.items()
    ]
    header = f"| k {max(choice.tried)} | R@1 | mAP | |\n| --- | --- | --- | --- |"
    return (
        f"`mra evaluate` takes the {choice.describe()}. `--rerank_k auto` takes {choice.rerank_k}: "
        f"{choice.describe_depth()}.\n\n" + "\n".join([header, *rows])
    )


def push_folder(folder: str | Path, args, message: str = "Upload model") -> str:
    """
    Uploads a finished folder to the Hub in one commit.

    Args:
        folder: with model, processor, code and card.
        args: a `HubArguments`.
        message: of the commit.

    Returns:
        The commit's address.

    Raises:
        ValueError: if the folder's card is not valid.
    """
    ModelCard.load(Path(folder) / "README.md")
    api = HfApi()
    repository = api.create_repo(args.hub_model_id, private=args.hub_private, exist_ok=True).repo_id
    commit = api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message)
    logger.info(f"Pushed {folder} to {commit.commit_url}")
    return commit.commit_url
