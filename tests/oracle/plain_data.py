"""The training input prepared image by image: Pillow, files, a text at a time; what `benchmarks/data.py` compares with.

Every random choice is drawn as in `mra.training`, so that both give the same batches but for the resizing.
"""

import random

import numpy as np
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional as F

from mra.training.data import phrase_to_id
from mra.training.masking import IGNORED_LABEL, REPLACED_AT_RANDOM, REPLACED_BY_MASK, TokenMasker, keyed_uniform
from mra.training.order import key_to_seed
from mra.training.regions import box_to_pixels, draw_crop, move_box
from mra.training.transforms import draw_erasing


class PlainPipeline:
    """
    Makes batches of pretraining from files.

    Args:
        rows: dicts with `path`, `caption`, `image_id`, `boxes` and `phrases`.
        processor: an `MRAProcessor`.
        grid_size: rows and columns of the image tokens.
        seed: of everything random.
        flip_probability, erasing_probability: of the images.
    """

    def __init__(self, rows, processor, grid_size, seed, flip_probability=0.5, erasing_probability=0.6):
        self.rows = rows
        self.processor = processor
        self.grid_size = grid_size
        self.seed = seed
        self.flip_probability = flip_probability
        self.erasing_probability = erasing_probability
        images = processor.image_processor
        self.size = images.size["height"], images.size["width"]
        self.resize = transforms.Resize(self.size, interpolation=transforms.InterpolationMode.BICUBIC)
        self.to_tensor = transforms.ToTensor()
        self.normalize = transforms.Normalize(images.image_mean, images.image_std)
        self.masker = TokenMasker(processor.tokenizer)

    def batch(self, epoch: int, rows: list[int]) -> dict[str, torch.Tensor]:
        """The batch of some rows: images, texts, masks and identities, padded to `max_text_length`."""
        examples = [self.example(epoch, row) for row in rows]
        return {name: torch.stack([example[name] for example in examples]) for name in examples[0]}

    def example(self, epoch: int, number: int) -> dict[str, torch.Tensor]:
        """One row, prepared from its file to its masks."""
        row = self.rows[number]
        image = Image.open(row["path"]).convert("RGB")
        caption = self.processor.normalize_caption(row["caption"])
        rng = random.Random(key_to_seed("region", self.seed, epoch, number))
        choice = rng.randrange(len(row["boxes"]))
        box = box_to_pixels(row["boxes"][choice], image.width, image.height)
        phrase = self.processor.normalize_caption(row["phrases"][choice])
        pixels, box = self.transform(image, random.Random(key_to_seed("image", self.seed, epoch, number)), box)
        input_ids, attention_mask = self.tokenize(caption)
        phrase_input_ids, phrase_attention_mask = self.tokenize(phrase)
        masked, labels = plain_mask(self.masker, input_ids.tolist(), key_to_seed("mask", self.seed, epoch, number))
        return {
            "pixel_values": pixels,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "mlm_input_ids": torch.tensor(masked),
            "labels": torch.tensor(labels),
            "phrase_input_ids": phrase_input_ids,
            "phrase_attention_mask": phrase_attention_mask,
            "region_attention_mask": torch.tensor(self.region_mask(box)),
            "identity_ids": torch.tensor(row["image_id"]),
            "phrase_ids": torch.tensor(phrase_to_id(phrase)),
        }

    def transform(self, image, rng, box):
        """Crops, mirrors, resizes, normalises and erases; the box follows."""
        height, width = self.size
        crop = draw_crop(box, image.width, image.height, rng)
        flip = rng.random() < self.flip_probability
        erased = draw_erasing(height, width, rng) if rng.random() < self.erasing_probability else None
        image = image.crop((crop.left, crop.top, crop.right, crop.bottom))
        if flip:
            image = F.hflip(image)
        pixels = self.normalize(self.to_tensor(self.resize(image)))
        if erased is not None:
            pixels = F.erase(pixels, erased.top, erased.left, erased.height, erased.width, 0)
        return pixels, move_box(box, crop, flip, height, width)

    def tokenize(self, text):
        """Ids and mask of one text, padded."""
        encoded = self.processor.tokenizer(
            text,
            padding="max_length",
            truncation=True,
            max_length=self.processor.max_text_length,
            return_tensors="pt",
        )
        return encoded["input_ids"][0], encoded["attention_mask"][0]

    def region_mask(self, box):
        """1 for the global token and for every image token that the box overlaps, patch by patch."""
        (height, width), (rows, columns), (left, top, box_width, box_height) = self.size, self.grid_size, box
        stride_y, stride_x = height // rows, width // columns
        mask = [1]
        for row in range(rows):
            for column in range(columns):
                beside = column * stride_x >= left + box_width or (column + 1) * stride_x <= left
                above = row * stride_y >= top + box_height or (row + 1) * stride_y <= top
                mask.append(int(not beside and not above))
        return mask


def plain_mask(masker: TokenMasker, input_ids: list[int], seed: int) -> tuple[list[int], list[int]]:
    """Masks one caption, position by position, as `TokenMasker` describes it; masked ids and labels."""
    length = len(input_ids)
    order, skip, skip_length, keep, fate, replacement = keyed_uniform(
        np.array([seed], dtype=np.uint64), 6 * length
    ).reshape(6, length)
    special = [bool(masker._is_special[token]) for token in input_ids]
    candidates = [place for place in range(1, length) if not special[place]]
    wanted = min(max(round(masker.probability * len(candidates)), 1), masker.max_masked, len(candidates))
    chosen = set()
    for place in sorted(candidates, key=lambda place: order[place]):
        if len(chosen) >= wanted:
            break
        if place in chosen:
            continue
        tokens = 1
        if skip[place] < masker.skipgram_probability:
            tokens = 2 + int(skip_length[place] * (masker.skipgram_max_length - 1))
        start, end = place, min(place + tokens, length)
        while masker._is_piece[input_ids[start]]:
            start -= 1
        while end < length and masker._is_piece[input_ids[end]]:
            end += 1
        chosen.update(place for place in range(start, end) if not special[place])
    masked, labels = list(input_ids), [IGNORED_LABEL] * length
    for place in sorted(chosen, key=lambda place: keep[place])[:wanted]:
        labels[place] = input_ids[place]
        if fate[place] < REPLACED_BY_MASK:
            masked[place] = masker.mask_token_id
        elif fate[place] < REPLACED_BY_MASK + REPLACED_AT_RANDOM:
            masked[place] = int(masker._replacements[int(replacement[place] * len(masker._replacements))])
    return masked, labels
