"""Encoding of images and captions into features for ranking and hidden states for re-ranking."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image as PILImage
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import BatchFeature, PreTrainedModel

from images_mra import read_picture
from mra.common.sharding import Shard, cut_batches, gather_in_order, without_lone_row
from mra.common.workers import leave_process_group, share_batch
from mra.retrieval.input_checks import require_finite_rows, require_words
from mra.retrieval.towers import Towers, forward_context
from processing_mra import MRAProcessor


logger = logging.getLogger(__name__)


@dataclass
class ImageEncodings:
    """Encoded images.

    Attributes:
        embeds: features of all images, `(images, projection_dim)` float32 on the CPU; with mirrored views the mean of both
            views, not normalised again.
        hidden_states: `(images held, views, 1 + patches, hidden)` on the CPU, or None if not kept. Each of several
            processes holds the images that it encoded.
        rows: image number of each entry of `hidden_states`, ascending, `(images held,)`.
        batches: fixed batches of images; `Shard.own` assigns them to processes.
    """

    embeds: torch.Tensor
    hidden_states: torch.Tensor | None
    rows: torch.Tensor
    batches: list[range]

    def __post_init__(self) -> None:
        require_finite_rows(self.embeds, "image")


@dataclass
class TextEncodings:
    """Encoded captions, without padding.

    Attributes:
        embeds: features, `(texts, projection_dim)` float32 on the CPU.
        hidden_states: `(tokens of all texts, hidden)` on the CPU, texts concatenated, or None if not kept.
        lengths: number of tokens of each text, `(texts,)`.
    """

    embeds: torch.Tensor
    hidden_states: torch.Tensor | None
    lengths: torch.Tensor

    def __post_init__(self) -> None:
        require_finite_rows(self.embeds, "text")
        self.offsets = self.lengths.cumsum(0) - self.lengths

    def padded(self, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return zero-padded hidden states `(batch, longest, hidden)` and mask `(batch, longest)` of some texts."""
        lengths = self.lengths[texts]
        positions = torch.arange(int(lengths.max()))
        attention_mask = positions < lengths[:, None]
        tokens = (self.offsets[texts][:, None] + positions).where(attention_mask, 0)
        assert self.hidden_states is not None, "encoded without keep_hidden_states"
        return self.hidden_states[tokens] * attention_mask[..., None], attention_mask.long()


class Rows(Protocol):
    """Anything indexed by row: a sequence of PIL images, or a dataset."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int, /) -> Any: ...


def encode_images(
    model: PreTrainedModel | Towers,
    processor: MRAProcessor,
    images: Rows,
    *,
    flip: bool = True,
    keep_hidden_states: bool = False,
    batch_size: int = 64,
    num_workers: int = 0,
    dtype: torch.dtype | None = None,
    hidden_states_dtype: torch.dtype | None = None,
    shard: Shard | None = None,
    progress: bool = False,
) -> ImageEncodings:
    """Encode images, with their mirror images if `flip` is set.

    Args:
        model: an MRAModel, or a model with one as `.mra`, in eval mode, on the device to use; or its [`Towers`], which keep
            the copy of weights that every call on a CPU makes otherwise.
        processor: the model's MRAProcessor.
        images: a sequence of PIL images, or rows with an "image" (a `datasets.Dataset`).
        flip: average the features of each image and its mirror image, and keep the hidden states of both.
        keep_hidden_states: keep hidden states in CPU memory for re-ranking.
        batch_size: images per forward pass (with `flip` each batch takes two passes).
        num_workers: worker processes that decode and resize images.
        dtype: dtype of the forward passes (autocast); None for that of the weights.
        hidden_states_dtype: dtype of the kept hidden states; None for that of the forward passes.
        shard: the share of this process; None to encode all images.
        progress: whether to show a progress bar.

    Raises:
        ValueError: if there are no images, or one cannot be read (the message gives its row).
    """
    shard = shard or Shard()
    towers = Towers.of(model, dtype)
    model, device, dtype = towers.model, towers.device, towers.dtype
    if len(images) == 0:
        raise ValueError("images is empty: expected at least one image")
    batches = cut_batches(len(images), batch_size)
    own = shard.own(batches)
    rows = torch.tensor([row for batch in own for row in batch], dtype=torch.long)
    loader = DataLoader(
        _Images(images),
        batch_sampler=own,
        collate_fn=_ImageCollator(processor),
        num_workers=min(num_workers, len(own)),
        worker_init_fn=leave_process_group,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # otherwise iterating would advance the caller's random state
    )
    embeds, kept, filled = [], None, 0
    for pixel_values in tqdm(loader, desc="images", disable=not progress):
        if isinstance(pixel_values, ValueError):
            raise pixel_values
        pixel_values = pixel_values.to(device, non_blocking=True)
        views = [pixel_values, pixel_values.flip(-1)] if flip else [pixel_values]
        features, hidden_states = [], []
        with forward_context(model, dtype):
            for view in views:
                hidden_states.append(towers.image_hidden_states(view))
                embedded = without_lone_row(model.get_image_features, image_hidden_states=hidden_states[-1])
                features.append(embedded.float())
        embeds.append(torch.stack(features).mean(dim=0).cpu())
        if keep_hidden_states:
            hidden_states = torch.stack(hidden_states, dim=1)  # (batch, views, tokens, hidden)
            if kept is None:
                kept = torch.empty(len(rows), *hidden_states.shape[1:], dtype=hidden_states_dtype or dtype)
            kept[filled : filled + len(hidden_states)] = hidden_states.cpu()
            filled += len(hidden_states)
    if kept is not None:
        size = kept.numel() * kept.element_size() / 2**30
        logger.info(
            "hidden states of %d images x %d views: %.2f GiB of CPU memory in %s",
            *kept.shape[:2],
            size,
            str(kept.dtype).removeprefix("torch."),
        )
    return ImageEncodings(torch.cat(list(gather_in_order(embeds, len(batches), shard))), kept, rows, batches)


def encode_texts(
    model: PreTrainedModel | Towers,
    processor: MRAProcessor,
    texts: Sequence[str],
    *,
    keep_hidden_states: bool = False,
    batch_size: int = 64,
    dtype: torch.dtype | None = None,
    hidden_states_dtype: torch.dtype | None = None,
    shard: Shard | None = None,
    progress: bool = False,
) -> TextEncodings:
    """Encode captions, padded to the model's full text length as required by the pooled text features.

    For arguments see `encode_images`. Each of several processes receives the encodings of all captions.

    Raises:
        ValueError: if there are no captions, or one is empty (the message gives its position).
    """
    shard = shard or Shard()
    towers = Towers.of(model, dtype)
    model, device, dtype = towers.model, towers.device, towers.dtype
    if len(texts) == 0:
        raise ValueError("texts is empty: expected at least one caption")
    batches = cut_batches(len(texts), batch_size)
    results = []
    for batch in tqdm(shard.own(batches), desc="captions", disable=not progress):
        inputs = _tokenize(processor, [texts[row] for row in range(batch.start, batch.stop)], batch.start)
        attention_mask = inputs["attention_mask"].bool()
        with forward_context(model, dtype):
            hidden_states = towers.text_hidden_states(
                inputs["input_ids"].to(device), inputs["attention_mask"].to(device)
            )
            features = without_lone_row(model.get_text_features, text_hidden_states=hidden_states)
        result = {"embeds": features.float().cpu(), "lengths": attention_mask.sum(dim=1)}
        if keep_hidden_states:
            result["hidden_states"] = hidden_states.cpu()[attention_mask].to(hidden_states_dtype or dtype)
        results.append(result)
    results = list(gather_in_order(results, len(batches), shard))
    merged = {name: torch.cat([result[name] for result in results]) for name in results[0]}
    return TextEncodings(merged["embeds"], merged.get("hidden_states"), merged["lengths"])


def _tokenize(processor: MRAProcessor, texts: list[str], first: int) -> BatchFeature:
    require_words(texts, first)
    try:
        return processor(text=texts)
    except ValueError as error:
        raise ValueError(f"among captions {first} to {first + len(texts) - 1}: {error}") from error


def undecoded(rows: Any) -> Any:
    """Turn off image decoding of a `datasets.Dataset`, for `read_row`; return other sequences unchanged."""
    if not hasattr(rows, "cast_column") or rows.format["type"] == "custom":  # a user's transform needs decoded images
        return rows
    from datasets import Image

    if not isinstance(rows.features.get("image"), Image):
        return rows
    return rows.with_format(None).cast_column("image", Image(decode=False))


def read_row(rows: Rows, row: int) -> PILImage.Image:
    """Read the image of a row as upright RGB.

    Args:
        rows: PIL images, or rows with an "image", preferably from `undecoded`: decoding by `datasets` fails on unreadable
            metadata.
        row: number of the row.

    Raises:
        ValueError: if the image cannot be read; the message names the row.
    """
    try:
        value = rows[row]
        return read_picture(value["image"] if isinstance(value, dict) else value)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the image of row {row} (counting from 0) cannot be read: {error}; prepare the dataset again with "
            "--on_error skip to leave such rows out"
        ) from error


class _Images(Dataset):
    """RGB images of a sequence of PIL images or rows with an "image"; an unreadable image is returned as the error."""

    def __init__(self, images: Rows) -> None:
        self.images = undecoded(images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> PILImage.Image | ValueError:
        try:
            return read_row(self.images, index)
        except ValueError as error:  # raised in a worker, it would be wrapped in a traceback
            return error


class _ImageCollator:
    """Collator that preprocesses a batch of images in the worker that decoded them."""

    def __init__(self, processor: MRAProcessor) -> None:
        self.processor = processor

    def __call__(self, images: list) -> torch.Tensor | ValueError:
        broken = next((image for image in images if isinstance(image, ValueError)), None)
        if broken is not None:
            return broken
        return share_batch(self.processor(images=images)["pixel_values"])
