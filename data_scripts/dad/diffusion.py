"""Stable Diffusion and its ControlNet: loading, trained parts, conditions, latents and targets."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from images_mra import read_picture
from mra.common.extras import extra_needed
from mra.common.pretrained import load_pretrained


_EMBEDDING_CHANNELS = (16, 32, 96, 256)  # of the published ControlNet, with a halving between each two
CONDITION_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def import_diffusers() -> Any:
    """Import diffusers, an optional library.

    Raises:
        ValueError: if it cannot be imported.
    """
    try:
        import diffusers
    except ImportError as error:
        raise extra_needed("the data factory", "dad", error) from error
    diffusers.utils.logging.disable_progress_bar()
    return diffusers


@dataclass
class BaseModel:
    """A frozen Stable Diffusion without its safety checker.

    Attributes:
        unet: the denoiser.
        vae: the autoencoder between pixels and latents.
        text_encoder: encoder of the prompts.
        tokenizer: tokenizer of the prompts.
        scheduler: noise schedule of training, with the base model's settings.
    """

    unet: Any
    vae: Any
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    scheduler: Any

    @property
    def latent_factor(self) -> int:
        """Pixels per side of a latent."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    def latent_shape(self, image_size: list[int]) -> tuple[int, int, int]:
        """Return the `(channels, rows, columns)` of an image's latents."""
        height, width = (side // self.latent_factor for side in image_size)
        return self.vae.config.latent_channels, height, width

    def to(self, device: torch.device, dtype: torch.dtype) -> "BaseModel":
        """Move all parts."""
        for part in (self.unet, self.vae, self.text_encoder):
            part.to(device, dtype)  # pyright: ignore[reportArgumentType]  # a decorator hides `self`
        return self


def load_base(name: str | None, revision: str | None = None) -> BaseModel:
    """Load the parts of a Stable Diffusion pipeline needed for training.

    Args:
        name: folder or Hub id.
        revision: commit or branch on the Hub.

    Raises:
        ValueError: if no base model is named, or it is not a Stable Diffusion pipeline.
    """
    diffusers = import_diffusers()
    name = require_base(name)

    def load(cls: Any, subfolder: str) -> Any:
        return load_pretrained(cls, name, "`common.base_model`", subfolder=subfolder, revision=revision)

    parts = BaseModel(
        unet=load(diffusers.UNet2DConditionModel, "unet"),
        vae=load(diffusers.AutoencoderKL, "vae"),
        text_encoder=load(CLIPTextModel, "text_encoder"),
        tokenizer=load(CLIPTokenizer, "tokenizer"),
        scheduler=load(diffusers.DDPMScheduler, "scheduler"),
    )
    for part in (parts.unet, parts.vae, parts.text_encoder):
        part.requires_grad_(False).eval()
    return parts


def require_base(name: str | None) -> str:
    """Return the name of the base model, which must be set."""
    if name is None:
        raise ValueError(
            "`common.base_model` is not set: name the folder or Hub id of a Stable Diffusion pipeline with a licence that "
            "suits you; docs/dad.md lists some"
        )
    return name


# ---------------------------------------------------------------- ControlNet


def create_controlnet(base: BaseModel, condition: str) -> Any:
    """Create a ControlNet from the base's UNet: a copy of its encoder and middle block with zero convolutions.

    With `condition: none` the embedding of the condition image is frozen. Its last layer is zero, so it never adds anything.

    Args:
        base: the frozen model.
        condition: kind of condition image.
    """
    halvings = int(math.log2(base.latent_factor))
    channels = _EMBEDDING_CHANNELS[: halvings + 1]
    channels += (_EMBEDDING_CHANNELS[-1],) * (halvings + 1 - len(channels))
    controlnet = import_diffusers().ControlNetModel.from_unet(
        base.unet, conditioning_embedding_out_channels=channels, load_weights_from_unet=True
    )
    controlnet.requires_grad_(True)
    controlnet.controlnet_cond_embedding.requires_grad_(condition != "none")
    return controlnet


class Conditions:
    """Condition images of one kind.

    Args:
        kind: `none` (zeros), `white` (ones) or `folder`.
        image_size: height and width in pixels.
        folder: folder with one image per row of the train split, named `17.png` or with another of [`CONDITION_SUFFIXES`].

    Raises:
        ValueError: if the folder does not exist.
    """

    def __init__(self, kind: str, image_size: list[int], folder: str | None = None) -> None:
        self.kind = kind
        self.image_size = list(image_size)
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None and not self.folder.is_dir():
            raise ValueError(f"`common.condition_dir` {folder!r} is not a folder")

    def require(self, rows: Iterable[int]) -> None:
        """Check before the work that the images of rows exist.

        Raises:
            ValueError: if one is missing.
        """
        if self.folder is not None:
            for row in sorted(set(rows)):
                self._find(self.folder, row)

    def __call__(self, row: int) -> torch.Tensor:
        """Return the condition image of a row of the train split: `(3, height, width)` in 0..1.

        Raises:
            ValueError: if the folder has no image for the row.
        """
        if self.folder is None:
            return torch.full((3, *self.image_size), float(self.kind == "white"))
        return to_pixels(read_picture(self._find(self.folder, row)), self.image_size)

    def _find(self, folder: Path, row: int) -> Path:
        paths = [folder / f"{row}{suffix}" for suffix in CONDITION_SUFFIXES]
        path = next((path for path in paths if path.is_file()), None)
        if path is None:
            raise ValueError(
                f"`common.condition_dir` {str(folder)!r} has no image of row {row} of the train split: expected "
                f"{paths[0].name} or with another suffix of {', '.join(CONDITION_SUFFIXES[1:])}"
            )
        return path


# ---------------------------------------------------------------- images and targets


def to_pixels(image: Image.Image, image_size: list[int]) -> torch.Tensor:
    """Convert an RGB image to `(3, height, width)` in 0..1, resized bicubically."""
    resized = image.resize((image_size[1], image_size[0]), Image.Resampling.BICUBIC)
    return F.to_dtype(torch.from_numpy(np.array(resized)).permute(2, 0, 1), torch.float32, scale=True)


def to_latents(vae: Any, pixels: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Draw the latents of images.

    Args:
        vae: the autoencoder.
        pixels: `(batch, 3, height, width)` in 0..1.
        noise: standard normal noise of the draw, `(batch, channels, rows, columns)`.
    """
    posterior = vae.encode((2 * pixels - 1).to(vae.dtype)).latent_dist
    return (posterior.mean + posterior.std * noise.to(vae.dtype)) * vae.config.scaling_factor


def training_target(
    scheduler: Any, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return the denoiser's target for the scheduler's `prediction_type`.

    Raises:
        ValueError: if the type is unknown.
    """
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    if kind == "sample":
        return latents
    raise ValueError(
        f"`common.base_model`: its scheduler's prediction_type is {kind!r}; expected epsilon, v_prediction or sample"
    )
