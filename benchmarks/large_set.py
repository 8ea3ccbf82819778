"""Measure opening and reading a dataset of SDA's size: time to the first batch, and memory then and later.

    python benchmarks/large_set.py --rows 1217750 --batches 2000 --json

Writes Parquet files of SDA's columns with tiny images and reads them without training: as a table and streamed, each in its
own process with workers. Memory is the sum over these processes without file pages, which the system can reclaim; pages that
forked workers share with their parent are counted for each.
"""

import io
import multiprocessing
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import cast


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/large_set.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import datasets
import datasets.config
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from accelerate import PartialState
from PIL import Image

from benchmarks.data import make_processor
from benchmarks.measure import MIB, make_config, show
from data_scripts.builders import SDA_FEATURES
from mra.common.arguments import option, parse_arguments, require
from mra.common.streaming import Streaming
from mra.common.tables import load_split
from mra.training.collator import TrainingCollator
from mra.training.data import build_pretraining_dataset
from mra.training.order import make_sampler


ROWS_OF_A_FILE, ROWS_OF_A_GROUP = 50_000, 1000


@dataclass
class LargeSetBenchmark:
    """Options of this benchmark."""

    rows: int = option(20_000, "rows of the dataset; SDA has 1217750")
    batches: int = option(20, "batches to read in each way")
    batch_size: int = option(40, "rows per batch")
    num_workers: int = option(2, "data-loading workers")
    folder: str | None = option(None, "folder to write the dataset to and keep; a temporary one when left out")
    json: bool = option(False, "print the result as JSON in the last line")

    def __post_init__(self) -> None:
        require(self.batches >= 2, "batches", "2 or more", self.batches)


def main(argv: list[str] | None = None) -> None:
    """Print the costs of each way of reading."""
    (args,) = parse_arguments([LargeSetBenchmark], description=__doc__, argv=argv, config=False)
    results = {name: getattr(args, name) for name in ("rows", "batches", "batch_size", "num_workers")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary) / "sda"
        if not folder.exists():
            write_set(folder, args.rows)
        results["parquet_mib"] = sum(file.stat().st_size for file in folder.iterdir()) / MIB
        # The first opening of a table copies it; streaming copies nothing.
        for name, streamed in (("table_first", False), ("table", False), ("streamed", True)):
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(1, mp_context=context) as process:
                found = process.submit(measure, folder, Path(temporary) / "cache", streamed, args).result()
            results |= {f"{name}_{key}": value for key, value in found.items()}
    show(results, args.json)


def measure(folder: Path, cache: Path, streamed: bool, args: LargeSetBenchmark) -> dict[str, float]:
    """Open the dataset and read batches from it.

    Returns:
        Seconds until the dataset is open and until the first batch is there; memory in MiB before opening, when open, after a
        tenth of the batches and after all; images per second.
    """
    datasets.disable_progress_bars()
    datasets.config.HF_DATASETS_CACHE = str(cache)
    PartialState(cpu=True)
    torch.set_num_threads(1)
    config = make_config(full_size=False)
    processor = make_processor(config)
    results = {"mib_before": anonymous_memory()}
    start = time.perf_counter()
    streaming = Streaming(16, 16384, max(args.num_workers, 1)) if streamed else None
    table = load_split(str(folder), "train", streaming)
    dataset = build_pretraining_dataset(table, processor, grid_size=config.vision_config.grid_size, seed=0)
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=make_sampler(dataset, 0, args.batch_size),
        collate_fn=TrainingCollator(processor.tokenizer, processor.max_text_length),
        num_workers=args.num_workers,
        multiprocessing_context="fork" if args.num_workers else None,
    )
    results["seconds_to_open"] = time.perf_counter() - start
    results["mib_open"] = anonymous_memory()
    batches = iter(loader)
    next(batches)
    results["seconds_to_first_batch"] = time.perf_counter() - start
    for number in range(1, min(args.batches, len(loader))):
        next(batches)
        if number == max(args.batches // 10, 1):
            results["mib_early"], early = anonymous_memory(), time.perf_counter()
    results["mib_late"] = anonymous_memory()
    rest = number - max(args.batches // 10, 1)
    results["images_per_second"] = rest * args.batch_size / (time.perf_counter() - early)
    return results


def anonymous_memory() -> float:
    """Return the MiB of anonymous memory of this process and its workers."""
    processes = ["self", *(str(child.pid) for child in multiprocessing.active_children())]
    status = [Path(f"/proc/{process}/status").read_text() for process in processes]
    return sum(int(cast(re.Match, re.search(r"RssAnon:\s*(\d+) kB", text))[1]) for text in status) / 1024


def write_set(folder: Path, rows: int) -> None:
    """Write Parquet files of SDA's columns, with images of 8 x 16 pixels in one colour."""
    folder.mkdir(parents=True)
    count = -(-rows // ROWS_OF_A_FILE)
    for number in range(count):
        first = number * ROWS_OF_A_FILE
        ids = list(range(first, min(first + ROWS_OF_A_FILE, rows)))
        pictures = [picture(color) for color in range(0, 256, 8)]
        columns = {
            "image": [{"bytes": pictures[index % 32], "path": None} for index in ids],
            "caption": [f"a man wearing a black shirt and red shoes number {index}" for index in ids],
            "image_id": ids,
            "boxes": [[[0.5, 0.5, 0.4, 0.6], [0.5, 0.3, 0.3, 0.2]]] * len(ids),
            "logits": [[0.7, 0.4]] * len(ids),
            "phrases": [["a man", "a black shirt"]] * len(ids),
        }
        schema = SDA_FEATURES.arrow_schema
        table = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema)
        pq.write_table(table, folder / f"train-{number:05}-of-{count:05}.parquet", row_group_size=ROWS_OF_A_GROUP)


def picture(color: int) -> bytes:
    """Return a PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 16), (color, 255 - color, 128)).save(buffer, "PNG")
    return buffer.getvalue()


if __name__ == "__main__":
    main()
