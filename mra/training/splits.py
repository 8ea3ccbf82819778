"""Identities held out for validation if a dataset has no validation split."""

import numpy as np
from accelerate.logging import get_logger
from datasets import Dataset

from mra.common.streaming import StreamedTable, arrow_column
from mra.common.tables import Table


logger = get_logger(__name__)


def hold_out_identities(dataset: Table, fraction: float, seed: int) -> tuple[Table, Dataset | None]:
    """Split a training set by identity, so that no person is on both sides.

    Args:
        dataset: rows with `image_id`.
        fraction: share of the identities to hold out.
        seed: seed of the choice.

    Returns:
        The training rows, and the held-out rows (read into memory if streamed; None for a fraction of 0).

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
            f"`validation_fraction`: {fraction} of {len(identities)} identities is {count}, which leaves one side "
            "empty: choose another fraction"
        )
    held_out = np.isin(ids, np.random.default_rng(seed).permutation(identities)[:count])
    logger.info(f"holding out {count} of {len(identities)} training identities for validation")
    train, validation = dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))
    return train, validation.to_dataset() if isinstance(validation, StreamedTable) else validation
