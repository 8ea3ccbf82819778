"""Generation of images from prompts with the base model and a ControlNet."""

from typing import Any

import torch
from PIL import Image

from data_scripts.dad.diffusion import BaseModel, import_diffusers
from data_scripts.dad.sections import GenerateSection
from mra.common.pretrained import load_pretrained


_SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "dpm": "DPMSolverMultistepScheduler",
}


def make_pipeline(
    base: BaseModel, controlnet: Any, scheduler: str, safety_checker: Any = None, extractor: Any = None
) -> Any:
    """Build the image pipeline from its parts.

    Args:
        base: the base model.
        controlnet: the ControlNet, on the same device and in the same precision.
        scheduler: a sampler of `generate.scheduler`, with the base model's noise schedule and prediction type.
        safety_checker: the base model's safety checker, or None.
        extractor: image processor of the safety checker.
    """
    diffusers = import_diffusers()
    sampler = getattr(diffusers, _SCHEDULERS[scheduler]).from_config(base.scheduler.config)
    pipeline = diffusers.StableDiffusionControlNetPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        controlnet=controlnet,
        scheduler=sampler,
        safety_checker=safety_checker,
        feature_extractor=extractor,
        requires_safety_checker=safety_checker is not None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_safety_checker(name: str, revision: str | None) -> tuple[Any, Any]:
    """Load the safety checker of a base model and its image processor.

    Raises:
        ValueError: if the model has none.
    """
    import_diffusers()
    from diffusers.pipelines.stable_diffusion import (
        StableDiffusionSafetyChecker,  # pyright: ignore[reportPrivateImportUsage]  # exported lazily
    )
    from transformers import CLIPImageProcessor

    argument = "`generate.safety_checker`: `common.base_model`"
    checker = load_pretrained(
        StableDiffusionSafetyChecker, name, argument, subfolder="safety_checker", revision=revision
    )
    extractor = load_pretrained(CLIPImageProcessor, name, argument, subfolder="feature_extractor", revision=revision)
    return checker, extractor


def draw(
    pipeline: Any, prompts: list[str], seeds: list[int], conditions: torch.Tensor, section: GenerateSection
) -> list[Image.Image]:
    """Generate one image per prompt, each with its own random generator.

    Args:
        pipeline: pipeline from [`make_pipeline`].
        prompts: prompts of any length; the tokenizer truncates them.
        seeds: one seed per prompt.
        conditions: `(prompts, 3, height, width)` in 0..1; it also sets the image size.
        section: steps, guidance and negative prompt.
    """
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same for every device
    return pipeline(
        prompt=[prompt + section.prompt_suffix for prompt in prompts],
        image=conditions.to(pipeline.device, pipeline.dtype),
        height=conditions.shape[2],
        width=conditions.shape[3],
        num_inference_steps=section.num_inference_steps,
        guidance_scale=section.guidance_scale,
        negative_prompt=None if section.negative_prompt is None else [section.negative_prompt] * len(prompts),
        controlnet_conditioning_scale=section.controlnet_scale,
        generator=generators,
    ).images
