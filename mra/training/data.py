"""Training sets: a sample depends only on (seed, epoch, row), not on worker or process."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from datasets import Image, IterableDatasetDict, LargeList, List, Value

from mra.common.private_interfaces import new_shared_float32
from mra.common.streaming import StreamedTable, arrow_column, list_lengths
from mra.common.tables import Table
from mra.training.augmentation import CaptionAugmenter
from mra.training.crops import open_image, upright_size
from mra.training.order import Key, key_to_seed
from mra.training.regions import WHOLE_IMAGE, Box, box_to_pixels, check_grid, region_attention_mask
from mra.training.transforms import TrainingImageTransform
from processing_mra import MRAProcessor


SDA_COLUMNS = "image (Image), image_id (integer), caption (string), boxes (list of 4 floats), phrases (list of string)"
PEDES_COLUMNS = "image (Image), image_id (integer), captions (list of string)"


def phrase_to_id(phrase: str) -> int:
    """Return a 63-bit hash of a phrase's lower-case words, the same on every process."""
    words = " ".join(phrase.lower().split())
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True, eq=False)
class ExampleBatch(Sequence):
    """Examples of a batch with their images in one tensor: allocating memory to stack them would cost more than resizing.

    It cannot be reordered; a slice is a plain list with images that must be stacked again.

    Args:
        examples: items of a [`TrainingDataset`]; `pixel_values` of item i is row i of the tensor.
        pixel_values: `(batch, 3, height, width)` float32, in shared memory in a worker of a data loader.
    """

    examples: list[dict]
    pixel_values: torch.Tensor

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)


class TrainingDataset(torch.utils.data.Dataset):
    """Image-caption pairs, transformed and augmented by their key (epoch, row); see the two builders below.

    An item is a dict: `pixel_values` `(3, height, width)` float32, `caption` (normalised text), `identity_id`,
    `mask_seed` (63 bits, for the collator), `augmented_caption` with an augmenter, and `phrase`, `phrase_id` (63 bits)
    and `region_attention_mask` `(1 + patches,)` with regions.

    Args:
        dataset: the table, its images as `bytes` and `path`.
        processor: an `MRAProcessor`.
        transform: transforms the images.
        image_rows: table row of each pair, `(pairs,)`.
        seed: seed of everything random.
        caption_indices: index of each pair in the row's `captions`, `(pairs,)`; None if rows have one `caption`.
        identity_ids: identity of each table row, `(rows,)`, instead of `image_id`.
        augmenter: augments the captions; None leaves `augmented_caption` out.
        crop_to_regions: whether to crop each image around one of the row's boxes, drawn at random.
        grid_size: rows and columns of the image tokens, to add phrase and region mask to the items; None leaves them out.
    """

    def __init__(
        self,
        dataset: Table,
        processor: MRAProcessor,
        transform: TrainingImageTransform,
        image_rows: np.ndarray,
        seed: int,
        caption_indices: np.ndarray | None = None,
        identity_ids: np.ndarray | None = None,
        augmenter: CaptionAugmenter | None = None,
        crop_to_regions: bool = False,
        grid_size: tuple[int, int] | None = None,
    ) -> None:
        self.dataset = dataset
        self.processor = processor
        self.transform = transform
        self.image_rows = image_rows
        self.seed = seed
        self.caption_indices = caption_indices
        self.identity_ids = identity_ids
        self.augmenter = augmenter
        self.crop_to_regions = crop_to_regions
        self.grid_size = grid_size

    def __len__(self) -> int:
        return len(self.image_rows)

    @property
    def num_identities(self) -> int | None:
        """Number of identities if they were counted (fine-tuning), else None."""
        return None if self.identity_ids is None else int(self.identity_ids.max()) + 1

    def __getitem__(self, key: Key) -> dict:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: list[Key]) -> ExampleBatch:
        """Return the items of a batch; rows are read at once and images are written to one tensor."""
        for key in keys:
            if not isinstance(key, tuple) or len(key) != 2:
                raise ValueError(
                    f"the key of a training sample must be (epoch, row), got {key!r}; use the sampler of `make_sampler`"
                )
        image_rows = [int(self.image_rows[pair]) for _, pair in keys]
        columns = self.dataset[image_rows]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        pixels = _new_batch(len(keys), 3, *self.transform.image_size)
        examples = [
            self._checked(row, image_row, *key, out)
            for row, image_row, key, out in zip(rows, image_rows, keys, pixels, strict=True)
        ]
        return ExampleBatch(examples, pixels)

    def _checked(self, row: dict, image_row: int, epoch: int, pair: int, out: torch.Tensor) -> dict:
        try:
            return self._example(row, image_row, epoch, pair, out)
        except (ValueError, OSError) as error:  # Pillow reports a broken image as OSError
            raise ValueError(
                f"row {image_row} (image_id {row['image_id']}) of the training set cannot be used ({error}); "
                "prepare the dataset again with `--on_error skip` to leave such rows out"
            ) from error

    def _example(self, row: dict, image_row: int, epoch: int, pair: int, out: torch.Tensor) -> dict:
        def generator(purpose: str) -> random.Random:
            return random.Random(key_to_seed(purpose, self.seed, epoch, pair))

        image = open_image(row["image"])
        text = row["caption"] if self.caption_indices is None else row["captions"][self.caption_indices[pair]]
        caption = self.processor.normalize_caption(text)
        box, phrase = None, caption
        if self.crop_to_regions:
            relative_box, phrase = self._draw_region(row, caption, generator("region"))
            box = box_to_pixels(cast(Box, relative_box), *upright_size(image))
        pixel_values, box = self.transform(image, generator("image"), box, out)
        example = {
            "pixel_values": pixel_values,
            "caption": caption,
            "identity_id": row["image_id"] if self.identity_ids is None else int(self.identity_ids[image_row]),
            "mask_seed": key_to_seed("mask", self.seed, epoch, pair),
        }
        if self.augmenter is not None:
            # Words beyond the truncation are augmented too, as published: a shortened caption may include them.
            augmented = self.augmenter(self.processor.clean_caption(text), generator("augmentation"))
            example["augmented_caption"] = self.processor.normalize_caption(augmented)
        if self.grid_size is not None:
            example["phrase"] = phrase
            example["phrase_id"] = phrase_to_id(phrase)
            example["region_attention_mask"] = region_attention_mask(
                cast(Box, box), self.transform.image_size, self.grid_size
            )
        return example

    def _draw_region(self, row: dict, caption: str, rng: random.Random) -> tuple[tuple[float, ...], str]:
        """Draw one of the row's boxes with its phrase; without boxes take the whole image and the caption."""
        boxes, phrases = row.get("boxes") or [], row.get("phrases") or []
        if len(boxes) != len(phrases):
            raise ValueError(f"it has {len(boxes)} boxes but {len(phrases)} phrases; expected one phrase per box")
        if not boxes:
            return WHOLE_IMAGE, caption
        index = rng.randrange(len(boxes))
        return tuple(boxes[index]), self.processor.normalize_caption(phrases[index])


def build_pretraining_dataset(
    dataset: Table,
    processor: MRAProcessor,
    *,
    grid_size: tuple[int, int],
    seed: int,
    data_fraction: float = 1.0,
    num_pairs: int | None = None,
    regions: bool = True,
    augmenter: CaptionAugmenter | None = None,
    flip_probability: float = 0.5,
    erasing_probability: float = 0.6,
    image_backend: str = "tensor",
) -> TrainingDataset:
    """Build the pretraining set: images cropped around one of their boxes, captions, phrases.

    SDA rows (one `caption`) and PEDES rows (`captions`, each a pair) are accepted. Without boxes the
    whole image is the region and the caption its phrase.

    Args:
        dataset: one split, from `load_split`.
        processor: an `MRAProcessor`.
        grid_size: rows and columns of the model's image tokens (`config.vision_config.grid_size`).
        seed: seed of everything random.
        data_fraction: share of the images to use, drawn once by the seed.
        num_pairs: number of pairs to use, drawn in the same way; None for all.
        regions: False leaves phrases and masks out of the items (no region terms); images are cropped either way.
        augmenter: adds an augmented caption to the items.
        flip_probability: see [`TrainingImageTransform`].
        erasing_probability: see [`TrainingImageTransform`].
        image_backend: see [`TrainingImageTransform`].

    Raises:
        ValueError: if the columns do not match a prepared set, or an argument is out of range.
    """
    single = _check_columns(dataset, ("caption", "captions"))
    if regions and single and {"boxes", "phrases"} - set(dataset.column_names):
        raise ValueError(
            f"region terms need the columns boxes and phrases, but the dataset has {', '.join(dataset.column_names)}; "
            "prepare it with `mra prepare sda`, or set `region_weight: 0`"
        )
    if not 0 < data_fraction <= 1:
        raise ValueError(f"`data_fraction` must lie above 0 and not above 1, got {data_fraction}")
    transform = _training_transform(processor, flip_probability, erasing_probability, image_backend)
    check_grid(transform.image_size, grid_size)
    image_rows, caption_indices = _draw(len(dataset), max(1, round(data_fraction * len(dataset))), seed), None
    if not single:
        image_rows, caption_indices = _caption_pairs(dataset, image_rows)
    if num_pairs is not None:
        if not 0 < num_pairs <= len(image_rows):
            raise ValueError(
                f"`num_train_pairs` must lie between 1 and the {len(image_rows)} pairs of the training set, got {num_pairs}"
            )
        drawn = _draw(len(image_rows), num_pairs, seed)
        image_rows = image_rows[drawn]
        caption_indices = None if caption_indices is None else caption_indices[drawn]
    return TrainingDataset(
        _raw_columns(dataset),
        processor,
        transform,
        image_rows,
        seed,
        caption_indices=caption_indices,
        augmenter=augmenter,
        crop_to_regions=True,
        grid_size=grid_size if regions else None,
    )


def build_finetuning_dataset(
    dataset: Table,
    processor: MRAProcessor,
    *,
    seed: int,
    augmenter: CaptionAugmenter | None = None,
    flip_probability: float = 0.5,
    erasing_probability: float = 0.6,
    image_backend: str = "tensor",
) -> TrainingDataset:
    """Build the fine-tuning set: one item per (image, caption), identities numbered from 0.

    Args:
        dataset: one split of a PEDES set, from `load_split`.
        processor: an `MRAProcessor`.
        seed: seed of everything random.
        augmenter: adds an augmented caption to the items.
        flip_probability: see [`TrainingImageTransform`].
        erasing_probability: see [`TrainingImageTransform`].
        image_backend: see [`TrainingImageTransform`].

    Raises:
        ValueError: if the columns do not match a prepared PEDES set, or an argument is out of range.
    """
    _check_columns(dataset, ("captions",))
    transform = _training_transform(processor, flip_probability, erasing_probability, image_backend)
    image_rows, caption_indices = _caption_pairs(dataset, np.arange(len(dataset)))
    persons = arrow_column(dataset, "image_id").to_numpy()
    return TrainingDataset(
        _raw_columns(dataset),
        processor,
        transform,
        image_rows,
        seed,
        caption_indices=caption_indices,
        identity_ids=np.unique(persons, return_inverse=True)[1],
        augmenter=augmenter,
    )


def _new_batch(*shape: int) -> torch.Tensor:
    """Allocate a float32 tensor; in a worker it is shared with the main process to avoid a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.empty(shape)
    return new_shared_float32(shape)


def _check_columns(dataset: Table, caption_columns: tuple[str, ...]) -> bool:
    """Return whether rows have one `caption` rather than `captions`; refuse a split that is not prepared."""
    layout = SDA_COLUMNS if "caption" in caption_columns else PEDES_COLUMNS
    if isinstance(dataset, (dict, IterableDatasetDict)):
        raise ValueError(
            f"`dataset` must be one split, got the splits {', '.join(map(str, dataset))}; pass dataset['train']"
        )
    if not isinstance(dataset, Table):
        raise ValueError(
            "`dataset` must be a datasets.Dataset (load_dataset without streaming) or a StreamedTable, got "
            f"{type(dataset)}"
        )
    if not len(dataset):
        raise ValueError("`dataset` has no rows; prepare the dataset again")
    features = dataset.features
    checks = {
        "image": lambda feature: isinstance(feature, Image),
        "image_id": lambda feature: isinstance(feature, Value) and "int" in feature.dtype,
        "caption": _is_text,
        "captions": lambda feature: _is_list(feature) and _is_text(feature.feature),
        "boxes": lambda feature: _is_list(feature) and _is_list(feature.feature),
        "phrases": lambda feature: _is_list(feature) and _is_text(feature.feature),
    }
    captions = [name for name in caption_columns if name in features]
    missing = [name for name in ("image", "image_id") if name not in features]
    if not captions:
        missing.append(" or ".join(caption_columns))
    wrong = [
        f"{name} ({features[name]})" for name, fits in checks.items() if name in features and not fits(features[name])
    ]
    if missing or wrong:
        problems = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"has {', '.join(wrong)}"] * bool(wrong)
        raise ValueError(
            f"the dataset {' and '.join(problems)}; expected the columns {layout}, got {', '.join(features)}; "
            "prepare it with `mra prepare`"
        )
    return captions[0] == "caption"


def _is_text(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string")


def _is_list(feature: Any) -> bool:
    return isinstance(feature, (List, LargeList))


def _raw_columns(dataset: Table) -> Table:
    """Select the columns that training reads, with images as `bytes` and `path`."""
    wanted = ("image", "image_id", "caption", "captions", "boxes", "phrases")
    dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
    if isinstance(dataset, StreamedTable):
        return dataset
    return dataset.with_format(None).cast_column("image", Image(decode=False))


def _draw(size: int, kept: int, seed: int) -> np.ndarray:
    """Draw `kept` of `size` indices without replacement, in ascending order: `(kept,)`."""
    generator = np.random.default_rng(key_to_seed("data_fraction", seed))
    return np.sort(generator.choice(size, kept, replace=False))


def _caption_pairs(dataset: Table, image_rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return row and caption index of every (image, caption) pair of some rows, both `(pairs,)`."""
    counts = list_lengths(arrow_column(dataset, "captions"))[image_rows]
    if not counts.all():
        raise ValueError(
            f"row {image_rows[counts.argmin()]} of the training set has no caption; prepare the dataset again with "
            "`--on_error skip` to leave such rows out"
        )
    offsets = np.cumsum(counts) - counts
    return np.repeat(image_rows, counts), np.arange(counts.sum()) - np.repeat(offsets, counts)


def _training_transform(
    processor: MRAProcessor, flip_probability: float, erasing_probability: float, image_backend: str
) -> TrainingImageTransform:
    """Build the training transform with the size and normalisation of a processor."""
    images = processor.image_processor
    size = (images.size["height"], images.size["width"])
    return TrainingImageTransform(
        size,
        images.image_mean,
        images.image_std,
        flip_probability=flip_probability,
        erasing_probability=erasing_probability,
        image_backend=image_backend,
    )
