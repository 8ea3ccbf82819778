"""Count the operations and parameters of the factory's full-size models, without their weights.

    python -m benchmarks.diffusion_cost
    python -m benchmarks.diffusion_cost --teraflops 125 --bandwidth 2.0

The costs are those of one 384 x 256 image with Stable Diffusion 1.5, filter, captioner and detector. A multiply-add counts as
two operations. With `--teraflops`, the card's sustained rate in the model's precision (about 40% of its peak), and its memory
`--bandwidth` in TB/s, hours for 100,000 images are printed too.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from data_scripts.dad.diffusion import import_diffusers
from mra.common.arguments import option, parse_arguments


IMAGE_SIZE = (384, 256)
STEPS = 30  # of generation
PROMPT_TOKENS, CAPTION_TOKENS, CAPTION_BATCH = 10, 30, 16
_GROUNDING_SIZE = (1200, 800)  # 384 x 256 as resized by the detector's processor
_SWINS = {
    "tiny": {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7},
    "base": {"embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32], "window_size": 12},
}
Cost = tuple[float | None, float, float]  # parameters in millions, TFLOP an image, GB of weights read for an image


def count(run: Callable[[], object]) -> float:
    """Return the teraflops of a call, and of the backward passes in it."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e12


def millions(model: torch.nn.Module) -> float:
    """Return the parameters in millions."""
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def _on_meta(make: Callable[[], torch.nn.Module]) -> Any:
    with torch.device("meta"):
        return make().eval().requires_grad_(False)


def stable_diffusion() -> dict[str, Cost]:
    """Return the costs of UNet, ControlNet and autoencoder, of a generated image and of a training pair."""
    diffusers = import_diffusers()
    unet = _on_meta(lambda: diffusers.UNet2DConditionModel(cross_attention_dim=768))
    controlnet = _on_meta(lambda: diffusers.ControlNetModel(cross_attention_dim=768))
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = _on_meta(
        lambda: diffusers.AutoencoderKL(**blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    )
    height, width = (side // 8 for side in IMAGE_SIZE)
    with torch.device("meta"):
        pixels, noisy = torch.empty(1, 3, *IMAGE_SIZE), torch.empty(1, 4, height, width)
        text, time = torch.empty(1, 77, 768), torch.ones(1, dtype=torch.long)
    encode, decode = count(lambda: vae.encode(pixels)), count(lambda: vae.decode(noisy))
    one, control = count(lambda: unet(noisy, time, text)), count(lambda: controlnet(noisy, time, text, pixels))
    controlnet.requires_grad_(True)

    def train() -> None:
        down, middle = controlnet(noisy, time, text, pixels, return_dict=False)
        residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        unet(noisy, time, text, **residuals).sample.sum().backward()

    return {
        "UNet, one pass": (millions(unet), one, 0),
        "ControlNet, one pass": (millions(controlnet), control, 0),
        "autoencoder, encode": (millions(vae.encoder), encode, 0),
        "autoencoder, decode": (millions(vae.decoder), decode, 0),
        f"**an image**: {STEPS} steps, twice each for guidance, decoded": (
            None,
            2 * STEPS * (one + control) + decode,
            0,
        ),
        "**a training pair**: encoded, there and back": (None, encode + count(train), 0),
    }


def captioners() -> dict[str, Cost]:
    """Return the costs of BLIP-2 with OPT 2.7B and BLIP base: encoding, and a decoder pass per token of the caption."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, BlipConfig, BlipForConditionalGeneration

    opt = {"hidden_size": 2560, "num_hidden_layers": 32, "ffn_dim": 10240, "num_attention_heads": 32}
    opt |= {"model_type": "opt", "word_embed_proj_dim": 2560}
    large = _on_meta(lambda: Blip2ForConditionalGeneration(Blip2Config(text_config=opt)))
    small = _on_meta(lambda: BlipForConditionalGeneration(BlipConfig(vision_config={"image_size": 384})))
    with torch.device("meta"):
        queries, patches = torch.empty(1, 32, 768), torch.empty(1, 257, 1408)
        seen = count(lambda: large.vision_model(pixel_values=torch.empty(1, 3, 224, 224)))
        seen += count(lambda: large.qformer(query_embeds=queries, encoder_hidden_states=patches))
        seen_small = count(lambda: small.vision_model(pixel_values=torch.empty(1, 3, 384, 384)))
    costs = {}
    for name, model, decoder, encoded, read in (
        ("BLIP-2 OPT 2.7B", large, large.language_model, seen, 32 + PROMPT_TOKENS),
        ("BLIP base", small, small.text_decoder, seen_small, PROMPT_TOKENS),
    ):
        written = 2 * millions(decoder) * (read + CAPTION_TOKENS) / 1e6
        weights = 2 * millions(decoder) / 1e3 * CAPTION_TOKENS / CAPTION_BATCH
        costs[f"{name}: a caption of {CAPTION_TOKENS} tokens"] = (millions(model), encoded + written, weights)
    return costs


def detectors() -> dict[str, Cost]:
    """Return the costs of Grounding DINO on the enlarged image; slow, because it cannot run on the meta device."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    costs = {}
    for name, sizes in _SWINS.items():
        backbone = {"model_type": "swin", "out_indices": [2, 3, 4], **sizes}
        config = GroundingDinoConfig(backbone_config=backbone, disable_custom_kernels=True)
        model = GroundingDinoForObjectDetection(config).eval().requires_grad_(False)
        text = torch.tensor([[101, *[1037, 2158, 1012] * 8, 102]])  # eight phrases
        pixels = torch.randn(1, 3, *_GROUNDING_SIZE)
        cost = count(
            functools.partial(model, pixel_values=pixels, input_ids=text, attention_mask=torch.ones_like(text))
        )
        costs[f"Grounding DINO {name}: boxes"] = (millions(model), cost, 0)
    return costs


def text_scorers() -> dict[str, Cost]:
    """Return the cost of CLIP ViT-B/32 on an image; that of the prompt is smaller."""
    from transformers import CLIPConfig, CLIPModel

    model = _on_meta(lambda: CLIPModel(CLIPConfig()))
    cost = count(lambda: model.get_image_features(pixel_values=torch.empty(1, 3, 224, 224, device="meta")))
    return {"CLIP ViT-B/32: an image": (millions(model), cost, 0)}


def hours(cost: Cost, teraflops: float, bandwidth: float) -> float:
    """Return the hours for 100,000 images.

    Args:
        cost: cost of one image.
        teraflops: TFLOP that the card does per second.
        bandwidth: rate of reading weights in TB/s; its time is added to that of the operations.
    """
    return 100_000 * (cost[1] / teraflops + cost[2] / 1e3 / bandwidth) / 3600


@dataclass
class DiffusionCosts:
    """Options of this benchmark."""

    teraflops: float | None = option(None, "sustained TFLOP per second of the card")
    bandwidth: float = option(1.0, "memory bandwidth of the card in TB/s")


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    (options,) = parse_arguments([DiffusionCosts], description=__doc__, argv=argv, config=False)
    timed = options.teraflops is not None
    print("| | parameters | TFLOP |" + (" 100,000 images |" if timed else ""))
    print("| --- | ---: | ---: |" + (" ---: |" if timed else ""))
    for counted in (stable_diffusion, text_scorers, captioners, detectors):
        for name, cost in counted().items():
            size = "" if cost[0] is None else f"{cost[0]:,.1f} M"
            time = f" {hours(cost, options.teraflops, options.bandwidth):.2f} h |" if timed else ""
            print(f"| {name} | {size} | {cost[1]:.3g} |{time}")


if __name__ == "__main__":
    main()
