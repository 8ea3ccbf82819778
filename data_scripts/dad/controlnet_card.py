"""Atomic saving of a trained ControlNet with its card."""

from pathlib import Path
from typing import Any

import yaml
from accelerate import Accelerator
from huggingface_hub import ModelCardData

from data_scripts.dad.config import FactoryConfig
from mra.common.cards import fill_card
from mra.common.command_line import writing_to
from mra.common.digests import write_digests
from mra.common.files import whole_folder


_TEMPLATE = Path(__file__).parent / "templates" / "controlnet_card.md"


def build_controlnet_card(config: FactoryConfig, step: int, errors: dict[int, float]) -> str:
    """Write the model card.

    Args:
        config: the factory's configuration.
        step: optimizer steps done.
        errors: validation errors by step, from [`~data_scripts.dad.training_validation.read_errors`].
    """
    common, train = config.common, config.train
    height, width = common.image_size
    repository = train.hub_model_id or "controlnet"
    settings = {"common": config.deciding("common"), "train": config.deciding("train")}
    data = ModelCardData(
        license="other",
        license_name="base-model-and-target-set",
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=["controlnet", "stable-diffusion", "text-based-person-retrieval"],
        base_model=None if common.base_model and Path(common.base_model).exists() else common.base_model,
    )
    return fill_card(
        _TEMPLATE,
        data,
        name=repository.split("/")[-1],
        base=common.base_model,
        dataset=common.dataset,
        steps=step,
        errors=errors,
        repository=repository,
        condition=common.condition,
        height=height,
        width=width,
        settings=yaml.safe_dump(settings, sort_keys=False, allow_unicode=True),
    )


def save_controlnet(accelerator: Accelerator, controlnet: Any, folder: str | Path, card: str) -> None:
    """Write a ControlNet for `from_pretrained`; every process must call this.

    Args:
        accelerator: the accelerator that prepared the model.
        controlnet: the prepared model.
        folder: replaced if it exists.
        card: text of the `README.md`.
    """
    folder = Path(folder)
    if accelerator.is_main_process:
        with writing_to(folder), whole_folder(folder) as unfinished:
            unwrapped: Any = accelerator.unwrap_model(controlnet)
            unwrapped.save_pretrained(unfinished)
            write_digests(unfinished)
            (unfinished / "README.md").write_text(card, encoding="utf-8")
    accelerator.wait_for_everyone()
