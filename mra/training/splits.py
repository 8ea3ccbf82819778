"""Prepared sets, and identities held out for validation where a set has no validation split."""

import datasets
import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset

from mra.common.tables import load_table, open_builder
from mra.training.streaming import StreamedTable, Streaming, arrow_column, open_streamed_split


Table = Dataset | StreamedTable

logger = get_logger(__name__)


def load_split(name: str, split: str, streaming: Streaming | None = None) -> Table | None:
    """
    Loads one split of a prepared set.

    Args:
        name: folder or Hub id.
        split: `train` or `validation`.
        streaming: how to read it piece by piece; None makes it a table on disk first.

    Returns:
        The split, or None if the set has no validation split.

    Raises:
        ValueError: if there is no such set, or it has no training split.
    """
    try:
        builder = open_builder(name)
    except (FileNotFoundError, datasets.exceptions.DatasetNotFoundError, datasets.exceptions.DataFilesNotFoundError):
        raise ValueError(
            f"`dataset`: {name!r} is no prepared set, neither a folder with Parquet files nor a Hub id. Make one with "
            "`mra prepare`."
        ) from None
    splits = list(builder.info.splits or builder.config.data_files or {})
    if split in splits and streaming is not None:
        return open_streamed_split(name, split, streaming)
    if split in splits:
        return load_table(name, split)
    if split == "train":
        raise ValueError(f"`dataset`: {name!r} has no split 'train', only {', '.join(splits)}.")
    return None


def hold_out_identities(dataset: Table, fraction: float, seed: int) -> tuple[Table, Dataset | None]:
    """
    Splits the identities of a training set, so that no person is on both sides.

    Args:
        dataset: rows with `image_id`.
        fraction: share of the identities to hold out.
        seed: of the choice.

    Returns:
        The rows to train on, and those held out, read into memory if they were streamed; None for a fraction of 0.

    Raises:
        ValueError: if the fraction leaves no identity on one side.
    """
    if fraction == 0:
        return dataset, None
    ids = arrow_column(dataset, "image_id").to_numpy()
    identities = np.unique(ids)
    count = round(fraction * len(identities))
    if not 0 < count < len(identities):
        raise ValueError(
            f"`validation_fraction`: {fraction} of {len(identities)} identities is {count}, which leaves one side empty."
        )
    held_out = np.isin(ids, np.random.default_rng(seed).permutation(identities)[:count])
    logger.info(f"Holding out {count} of {len(identities)} training identities for validation.")
    train, validation = dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))
    return train, validation.to_dataset() if isinstance(validation, StreamedTable) else validation
