"""What the stages that read images share: pictures of the work folder, and batches that resume."""

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from data_scripts.dad.image_checks import load_picture
from data_scripts.dad.stage_folders import Stage
from mra.common.sharding import cut_batches
from mra.training.order import key_to_seed


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def open_picture(images: Path, row: dict[str, Any]) -> Image.Image:
    """Open the picture of a row of `generated.jsonl`.

    Raises:
        ValueError: naming the file, if it is missing or broken.
    """
    path = images / row["file_path"]
    try:
        return load_picture(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}. Remove {images} and generate it again.") from error


def read_batches(
    stage: Stage, path: Path, rows: Sequence[dict], batch_size: int, read: Callable[[list[dict]], list[dict]]
) -> bool:
    """Read rows in fixed batches and write the results, each process its share; every process must call this.

    What a batch holds depends on the rows and the batch size alone, since padding and kernels round differently with it:
    a batch of which a row is missing is read whole again, so that a killed run ends with the same file.

    Args:
        stage: that reads.
        path: of the file to write, a row with a `prompt_id` for each row read.
        rows: with a `prompt_id`, in order.
        batch_size: rows that are read together.
        read: gives the rows to write for a batch.

    Returns:
        Whether every row is read and written to the file; with `common.shard` other jobs may still be at work.
    """
    parts = stage.rows(path)
    done = parts.read().keys()
    stage.state.wait_for_everyone()  # all have read what is there
    missing = _missing(stage, rows, batch_size, done)
    for batch in tqdm(missing, desc=stage.name, unit="batch", disable=not stage.state.is_main_process):
        parts.append([row for row in read(batch) if row["prompt_id"] not in done])
    return stage.merge_rows(parts, len(rows))


def _missing(stage: Stage, rows: Sequence[dict], batch_size: int, done: Collection) -> list[list[dict]]:
    own = stage.shard.own(cut_batches(len(rows), batch_size))
    batches = [[rows[place] for place in batch] for batch in own]
    return [batch for batch in batches if any(row["prompt_id"] not in done for row in batch)]


def choose_rows(number: int, wanted: int, seed: int, purpose: str) -> list[int]:
    """Return ascending positions of `wanted` of `number` rows, chosen by seed and purpose, or of all if there are fewer."""
    if wanted >= number:
        return list(range(number))
    order = np.random.default_rng(key_to_seed(purpose, seed)).permutation(number)
    return sorted(order[:wanted].tolist())
