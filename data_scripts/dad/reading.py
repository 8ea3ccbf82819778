"""Helpers of the stages that read images: images of the work folder, and resumable batches."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from data_scripts.dad.image_checks import load_image
from data_scripts.dad.stage_folders import Stage
from mra.common.sharding import cut_batches
from mra.training.order import key_to_seed


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_generated(images: Path, row: dict[str, Any]) -> Image.Image:
    """Open the image of a row of `generated.jsonl`.

    Raises:
        ValueError: if the file is missing or damaged; the message names it.
    """
    path = images / row["file_path"]
    try:
        return load_image(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}; remove {images} and generate it again") from error


def read_batches(
    stage: Stage, path: Path, rows: Sequence[dict], batch_size: int, read: Callable[[list[dict]], list[dict]]
) -> bool:
    """Read rows in fixed batches and write the results, each process its share; every process must call this.

    Batches depend only on the rows and the batch size, because padding and kernels make results depend on them: a batch with a
    missing row is read again as a whole, so that a killed run ends with the same file.

    Args:
        stage: the stage that reads.
        path: file to write, with one row (with a `prompt_id`) for each row read.
        rows: rows with a `prompt_id`, in order.
        batch_size: rows per batch.
        read: returns the rows to write for a batch.

    Returns:
        Whether every row has been read and written; with `common.shard` other jobs may still be running.
    """
    parts = stage.rows(path)
    done = parts.read().keys()
    stage.state.wait_for_everyone()  # all have read the existing rows
    missing = _missing(stage, rows, batch_size, done)
    for batch in tqdm(missing, desc=stage.name, unit="batch", disable=not stage.state.is_main_process):
        parts.append([row for row in read(batch) if row["prompt_id"] not in done])
    return stage.merge_rows(parts, len(rows))


def _missing(stage: Stage, rows: Sequence[dict], batch_size: int, done: Collection) -> list[list[dict]]:
    own = stage.shard.own(cut_batches(len(rows), batch_size))
    batches = [[rows[place] for place in batch] for batch in own]
    return [batch for batch in batches if any(row["prompt_id"] not in done for row in batch)]


def choose_rows(number: int, wanted: int, seed: int, purpose: str) -> list[int]:
    """Return ascending positions of `wanted` of `number` rows, chosen by seed and purpose, or all if fewer."""
    if wanted >= number:
        return list(range(number))
    order = np.random.default_rng(key_to_seed(purpose, seed)).permutation(number)
    return sorted(order[:wanted].tolist())
