"""Image-caption pairs of the target dataset as denoising tasks, which depend only on (seed, epoch, pair)."""

import logging
import random
import re

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from data_scripts.dad.diffusion import BaseModel, Conditions, to_pixels
from data_scripts.dad.target_set import read_target
from mra.training.order import key_to_seed


logger = logging.getLogger(__name__)

_SIDED = re.compile(r"\b(left|right)", re.IGNORECASE)


def list_pairs(captions: list[list[str]], fraction: float = 1.0, seed: int = 0) -> list[tuple[int, int]]:
    """Return the pairs (row, index of the caption) of a dataset in order.

    Args:
        captions: the captions of each row.
        fraction: share of the pairs to keep, at least one, chosen by the seed.
        seed: seed of the choice.

    Raises:
        ValueError: if there is no pair.
    """
    pairs = [(row, index) for row, texts in enumerate(captions) for index in range(len(texts))]
    if not pairs:
        raise ValueError("`common.dataset` has no image with a caption")
    if fraction < 1:
        count = max(1, round(fraction * len(pairs)))
        order = np.random.default_rng(key_to_seed("pairs", seed)).permutation(len(pairs))[:count]
        pairs = [pairs[index] for index in sorted(order)]
    return pairs


class DenoisingPairs(torch.utils.data.Dataset):
    """Pairs with noise and timestep for training.

    The item of a key (epoch, pair) is a dict: `pixel_values` `(3, height, width)` in 0..1,
    `conditions` likewise, `input_ids` `(77,)`, `latent_noise` (the draw from the autoencoder) and `noise`
    `(channels, rows, columns)`, `timesteps` `()`.

    Args:
        dataset: rows with `image` and `captions`.
        pairs: pairs from [`list_pairs`].
        base: the model that gives tokenizer, noise steps and latent size.
        conditions: condition images by row.
        seed: seed of everything random.
        purpose: keeps the draws of training and validation apart.
        caption_dropout: share of captions replaced by empty text.
        flip_probability: probability of mirroring image and condition, if the caption has no left or right.
    """

    def __init__(
        self,
        dataset: Dataset,
        pairs: list[tuple[int, int]],
        base: BaseModel,
        conditions: Conditions,
        seed: int,
        purpose: str = "train",
        caption_dropout: float = 0.0,
        flip_probability: float = 0.0,
    ) -> None:
        self.dataset = dataset
        self.pairs = pairs
        self.tokenizer = base.tokenizer
        self.num_timesteps = base.scheduler.config.num_train_timesteps
        self.latent_shape = base.latent_shape(conditions.image_size)
        self.conditions = conditions
        self.seed = seed
        self.purpose = purpose
        self.caption_dropout = caption_dropout
        self.flip_probability = flip_probability

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, torch.Tensor]:
        epoch, pair = key
        row, index = self.pairs[pair]
        seed = key_to_seed(self.purpose, self.seed, epoch, pair)
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        item = read_target(self.dataset, row)
        caption = item["captions"][index]
        pixels, condition = to_pixels(item["image"], self.conditions.image_size), self.conditions(row)
        flips, drops = rng.random() < self.flip_probability, rng.random() < self.caption_dropout
        if flips and not _SIDED.search(caption):
            pixels, condition = pixels.flip(-1), condition.flip(-1)
        return {
            "pixel_values": pixels,
            "conditions": condition,
            "input_ids": encode_prompts(self.tokenizer, ["" if drops else caption])[0],
            "latent_noise": torch.randn(self.latent_shape, generator=generator),
            "noise": torch.randn(self.latent_shape, generator=generator),
            "timesteps": torch.tensor(rng.randrange(self.num_timesteps)),
        }


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> torch.Tensor:
    """Return token ids `(prompts, length)`, padded and truncated to the text encoder's length."""
    return tokenizer(
        prompts, padding="max_length", truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt"
    ).input_ids


def count_cut(tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> int:
    """Count the prompts that the text encoder truncates."""
    lengths = tokenizer(prompts, padding=False, truncation=False, verbose=False)["input_ids"] if prompts else []
    return sum(len(ids) > tokenizer.model_max_length for ids in lengths)


def warn_of_cut(tokenizer: PreTrainedTokenizerBase, texts: list[str], name: str, effect: str) -> None:
    """Warn about texts that the text encoder truncates."""
    cut = count_cut(tokenizer, texts)
    if cut:
        logger.warning(
            f"{cut:,} of {len(texts):,} {name} have more than {tokenizer.model_max_length} tokens: {effect}"
        )
