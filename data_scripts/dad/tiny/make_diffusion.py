"""Build a small Stable Diffusion folder without downloads, for tests and for the demo.

    python -m data_scripts.dad.tiny.make_diffusion --output outputs/dad/base --images data/sample/images/SDA

All weights are random, except that the autoencoder is fitted to the given images, if any, because otherwise its output would
always be noise. The folder has the parts of Stable Diffusion 1.5 (without safety checker), so the same code loads both.
"""

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from data_scripts.dad.command import with_plain_errors
from data_scripts.dad.diffusion import import_diffusers, to_pixels
from data_scripts.dad.language.word_list import ATTRIBUTES_FILE
from images_mra import read_picture
from mra.common.arguments import option, parse_arguments, require
from mra.common.files import whole_folder


BEGIN, END = "<|startoftext|>", "<|endoftext|>"
SUFFIX = "</w>"
_LETTERS = "a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 . , ; : ' - ! ? ( ) / &"
_SENTENCE = "a an the and with in of on is has wears wearing dressed carrying holding walking standing photo person"
_LEARNING_RATE = 1.2e-2  # peak
_IMAGES = 2000  # most images to read: the autoencoder sees no more in its few hundred steps


def make_tokenizer() -> CLIPTokenizer:
    """Train a CLIP tokenizer on the factory's own vocabulary."""
    words = re.findall(r"[a-z]+", ATTRIBUTES_FILE.read_text(encoding="utf-8"))
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=SUFFIX, unk_token=END))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = _LETTERS.split()
    # Defined in advance to fix their ids, which break ties between equally frequent pairs.
    units = [BEGIN, END, *letters, *(letter + SUFFIX for letter in letters)]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=units, end_of_word_suffix=SUFFIX, show_progress=False
    )
    tokenizer.train_from_iterator([_SENTENCE, *words], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    merges: Any = [tuple(pair) for pair in learned["merges"]]  # annotated as `str`, but pairs in the code
    return CLIPTokenizer(vocab=learned["vocab"], merges=merges, model_max_length=77)


def make_parts(channels: Sequence[int], prediction_type: str, seed: int) -> dict:
    """Build the pipeline's parts with random weights.

    Args:
        channels: channels of the UNet's blocks, at least two multiples of 8; the autoencoder halves the image twice.
        prediction_type: what the scheduler expects the UNet to predict: `epsilon`, `v_prediction` or `sample`.
        seed: seed of the weights.
    """
    diffusers = import_diffusers()
    torch.manual_seed(seed)
    tokenizer, width = make_tokenizer(), 4 * channels[0]
    ids: dict[str, Any] = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    text_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        **ids,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=tuple(channels),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * (len(channels) - 1) + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (len(channels) - 1),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    open_residual_path(unet)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        mid_block_add_attention=False,
        scaling_factor=1.0,
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    text_encoder = CLIPTextModel(text_config)
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}


def open_residual_path(unet: nn.Module) -> None:
    """Zero the last layer of every residual branch, a common initialisation of residual networks.

    The UNet then is a short path from its input and the ControlNet's residuals to its output. Frozen random branches would
    hide the ControlNet's residuals.
    """
    for module in unet.modules():
        for layer in (getattr(module, "conv2", None), getattr(module, "proj_out", None)):
            if layer is not None:
                torch.nn.init.zeros_(layer.weight)
                torch.nn.init.zeros_(layer.bias)


def fit_autoencoder(vae: Any, images: torch.Tensor, steps: int, seed: int, batch_size: int = 8) -> float:
    """Fit the autoencoder to images and scale its latents to unit variance.

    Args:
        vae: trained in place; its config gets the `scaling_factor`.
        images: `(images, 3, height, width)` in 0..1.
        steps: steps of Adam.
        seed: seed of the batches.
        batch_size: images per step.

    Returns:
        Mean squared error of the last tenth of the steps, pixels in -1..1.
    """
    generator, errors = torch.Generator().manual_seed(seed), []
    optimizer = torch.optim.Adam(vae.parameters(), lr=_LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=_LEARNING_RATE, total_steps=steps)
    vae.train()
    for _ in tqdm(range(steps), desc="autoencoder"):
        pixels = 2 * images[torch.randint(len(images), (batch_size,), generator=generator)] - 1
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        error = F.mse_loss(vae.decode(posterior.mean + posterior.std * noise).sample, pixels)
        loss = error + 1e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        errors.append(error.item())
    with torch.no_grad():
        latents = vae.eval().encode(2 * images[:256] - 1).latent_dist.mean
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    last = errors[-max(1, steps // 10) :]
    return sum(last) / len(last)


def read_images(folder: str | Path, image_size: Sequence[int], seed: int) -> torch.Tensor:
    """Read some images below a folder, drawn by the seed: `(images, 3, height, width)` in 0..1.

    Raises:
        ValueError: if there are none.
    """
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not paths:
        raise ValueError(f"--images {folder} holds no .jpg or .png file")
    paths = random.Random(seed).sample(paths, min(_IMAGES, len(paths)))
    return torch.stack([to_pixels(read_picture(path), list(image_size)) for path in paths])


def build(
    output: str | Path,
    images: torch.Tensor | None = None,
    channels: Sequence[int] = (64, 64),
    steps: int = 600,
    prediction_type: str = "epsilon",
    seed: int = 0,
) -> Path:
    """Write the pipeline folder.

    Args:
        output: folder to write.
        images: images to fit the autoencoder to; None leaves it random.
        channels: channels of the UNet's blocks.
        steps: steps of the autoencoder's training.
        prediction_type: what the scheduler expects the UNet to predict.
        seed: seed of the weights and the training.
    """
    parts = make_parts(channels, prediction_type, seed)
    if images is not None:
        fit_autoencoder(parts["vae"], images, steps, seed)
    pipeline = import_diffusers().StableDiffusionPipeline(
        **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    with whole_folder(output, replaces="model_index.json") as folder:
        pipeline.save_pretrained(folder)
    return Path(output)


@dataclass
class DiffusionArguments:
    """Options of the tiny diffusion model."""

    output: str = option(help="folder to write")
    images: str | None = option(None, "folder of images to fit the autoencoder to; random weights when left out")
    image_size: list[int] = option([64, 32], "height and width in pixels")
    channels: list[int] = option([64, 64], "channels of the UNet's blocks")
    steps: int = option(600, "steps of the autoencoder's training")
    prediction_type: Literal["epsilon", "v_prediction", "sample"] = option(
        "sample", "prediction type of the UNet; sample needs the least training"
    )
    seed: int = option(0, "seed of weights and training")

    def __post_init__(self) -> None:
        require(len(self.image_size) == 2, "image_size", "height and width", self.image_size)


def main(argv: list[str] | None = None) -> None:
    """Build the model that the command line describes."""
    (options,) = parse_arguments(
        [DiffusionArguments], prog="make_diffusion", description=__doc__, argv=argv, config=False
    )

    def work() -> None:
        images = options.images and read_images(options.images, options.image_size, options.seed)
        build(options.output, images, options.channels, options.steps, options.prediction_type, options.seed)
        print(f"{options.output}: a small Stable Diffusion for images of {options.image_size}")

    with_plain_errors("make_diffusion", work, options.output)


if __name__ == "__main__":
    main()
