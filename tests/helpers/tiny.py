"""A tiny model, processor and batch for the tests."""

from pathlib import Path

import torch
from transformers import AutoTokenizer

from configuration_mra import MRAConfig
from modeling_mra import MRAForPreTraining
from processing_mra import MRAImageProcessor, MRAProcessor


TOKENIZER = Path(__file__).resolve().parents[2] / "data_scripts" / "sample" / "tokenizer"
VISION = {
    "image_size": [64, 32],
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 4, 8],
    "window_size": [2, 2, 2, 1],
}
TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_fusion_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}


def tiny_config(**overrides) -> MRAConfig:
    """A configuration of 64 x 32 pixels, widths 8 to 64 and 32; `vision_config` and `text_config` are merged in."""
    vision = VISION | overrides.pop("vision_config", {})
    text = TEXT | overrides.pop("text_config", {})
    text.setdefault("vocab_size", len(tiny_tokenizer()))
    return MRAConfig(**{"vision_config": vision, "text_config": text, "projection_dim": 16, **overrides})


def tiny_tokenizer():
    """The shipped sample tokenizer."""
    return AutoTokenizer.from_pretrained(TOKENIZER)


def tiny_processor(config: MRAConfig | None = None, caption_style: str = "plain") -> MRAProcessor:
    """A processor for a tiny model."""
    config = config or tiny_config()
    height, width = config.vision_config.image_size
    images = MRAImageProcessor(size={"height": height, "width": width})
    return MRAProcessor(images, tiny_tokenizer(), config.max_text_length, caption_style)


def tiny_model(config: MRAConfig | None = None, cls=MRAForPreTraining, scale: float = 0.1, seed: int = 0):
    """A model in eval mode whose weights are random and large enough that different inputs differ visibly."""
    torch.manual_seed(seed)
    model = cls(config or tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=scale)
    return model.eval()


def tiny_batch(config: MRAConfig, size: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every input of [`MRAForPreTraining.forward`], captions of different lengths, rows 0 and 1 of one identity."""
    generator = torch.Generator().manual_seed(seed)
    length, words = config.max_text_length, config.text_config.vocab_size
    patches = config.vision_config.num_patches

    def captions():
        input_ids = torch.randint(5, words, (size, length), generator=generator)
        lengths = torch.randint(5, length + 1, (size, 1), generator=generator)
        attention_mask = (torch.arange(length)[None] < lengths).long()
        return input_ids * attention_mask, attention_mask

    batch = {"pixel_values": torch.randn(size, 3, *config.vision_config.image_size, generator=generator)}
    for prefix in ("", "augmented_", "phrase_"):
        batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"] = captions()
    masked = torch.zeros(size, length, dtype=torch.bool)
    masked[:, 1:4] = True
    batch["mlm_input_ids"] = batch["input_ids"].masked_fill(masked, 4)
    batch["labels"] = batch["input_ids"].masked_fill(~masked, -100)
    region = torch.randint(0, 2, (size, 1 + patches), generator=generator)
    region[:, :2] = 1
    identities = torch.arange(size).clamp(min=1)
    return batch | {"region_attention_mask": region, "identity_ids": identities, "phrase_ids": torch.arange(size) + 7}
