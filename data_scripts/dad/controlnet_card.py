"""A trained ControlNet as a folder with a card, whole or not at all."""

from pathlib import Path

import yaml
from huggingface_hub import ModelCardData

from mra.common.command_line import writing_to
from mra.common.environment import describe_environment
from mra.common.files import whole_folder


_BODY = """
# {name}

ControlNet that pulls `{base}` towards the look of `{dataset}`: pedestrian crops with captions. It is the first step of
the data factory of *Minimizing the Pretraining Gap: Domain-aligned Text-Based Person Retrieval*
(Pattern Recognition 2026, arXiv [2507.10195](https://arxiv.org/abs/2507.10195)), trained with the base model frozen, {steps:,} optimizer steps.

{errors}

## Use it

```python
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

controlnet = ControlNetModel.from_pretrained("{repository}")
pipeline = StableDiffusionControlNetPipeline.from_pretrained("{base}", controlnet=controlnet)
control = {control}
image = pipeline("a woman in a red coat and black trousers", image=control, height={height}, width={width}).images[0]
```

## Settings

```yaml
{settings}```

{environment}

## Licence and limits

The weights derive from the base model and from the target set: the terms of both hold. Person-retrieval sets are
released for research alone. The people in the images are not real, but the target set may be remembered in part.
"""
_CONTROLS = {
    "none": "torch.zeros(1, 3, {height}, {width})  # the ControlNet cannot see it",
    "white": "torch.ones(1, 3, {height}, {width})",
    "folder": "...  # (1, 3, {height}, {width}) in 0..1: a condition image such as those it was trained with",
}


def build_controlnet_card(config, step: int, errors: dict[int, float]) -> str:
    """
    Writes the card.

    Args:
        config: the factory's configuration.
        step: optimizer steps done.
        errors: of [`~data_scripts.dad.training_validation.read_errors`].
    """
    common, train = config.common, config.train
    height, width = common.image_size
    repository = train.hub_model_id or "controlnet"
    measured = "Nothing was measured in training."
    if errors:
        first, last = min(errors), max(errors)
        measured = (
            f"Denoising error on the validation split, same noise and timesteps: {errors[first]:.4f} at step {first}, "
            f"{errors[last]:.4f} at step {last}."
        )
    environment = describe_environment()
    versions = ", ".join(f"{library} {version}" for library, version in environment["libraries"].items())
    settings = {"common": config.deciding("common"), "train": config.deciding("train")}
    body = _BODY.format(
        name=repository.split("/")[-1],
        base=common.base_model,
        dataset=common.dataset,
        steps=step,
        errors=measured,
        repository=repository,
        control=_CONTROLS[common.condition].format(height=height, width=width),
        height=height,
        width=width,
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
        environment=f"Python {environment['python']}, {versions}; revision {environment['git_revision'] or 'unknown'}.",
    )
    data = ModelCardData(
        license="other",
        license_name="base-model-and-target-set",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["controlnet", "stable-diffusion", "text-based-person-retrieval"],
        base_model=None if Path(common.base_model).exists() else common.base_model,
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def save_controlnet(accelerator, controlnet, folder: str | Path, card: str) -> None:
    """
    Writes a ControlNet for `from_pretrained`; every process must call this.

    Args:
        accelerator: knows the model that `prepare` wrapped.
        controlnet: the prepared model.
        folder: replaced if it exists.
        card: text of the `README.md`.
    """
    folder = Path(folder)
    if accelerator.is_main_process:
        with writing_to(folder), whole_folder(folder) as unfinished:
            accelerator.unwrap_model(controlnet).save_pretrained(unfinished)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
    accelerator.wait_for_everyone()
