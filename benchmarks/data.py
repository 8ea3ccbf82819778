"""Time the input of training: from the bytes of a JPEG to a masked batch, image by image with Pillow against `mra.training`.

    python benchmarks/data.py --full_size --json

The images are synthetic: noise with the spectrum of photographs and sharp-edged blocks, as JPEG of quality 85, in the sizes of
four kinds of sources. Both ways make the same random choices. CPU time is measured in one process, without workers.
"""

import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/data.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import datasets
import numpy as np
import torch
from PIL import Image
from transformers import AutoTokenizer

from benchmarks.measure import Cost, caption_lengths, describe_device, make_config, show
from configuration_mra import MRAConfig
from data_scripts.builders import SDA_FEATURES
from mra.common.arguments import option, parse_arguments
from mra.training.collator import TrainingCollator
from mra.training.data import build_pretraining_dataset
from processing_mra import MRAImageProcessor, MRAProcessor
from tests.oracle.plain_data import PlainPipeline


TOKENIZER = "data_scripts/sample/tokenizer"
CPU = torch.device("cpu")
# Ranges of width and height of each source's images.
SOURCES = {
    "crops": ((40, 130), (110, 300)),  # cut out of surveillance video, as in CUHK-PEDES
    "generated": ((256, 384), (256, 384)),  # near the model's own size, as in SDA
    "camera": ((768, 1152), (1024, 1536)),  # 1 to 2 megapixels: often too small for reduced decoding
    "photographs": ((1536, 2048), (2048, 3072)),  # 3 to 6 megapixels
}


@dataclass
class DataBenchmark:
    """Options of this benchmark."""

    full_size: bool = option(False, "use 384 x 256 pixels instead of 64 x 32, with full-size sources")
    json: bool = option(False, "print the result as JSON in the last line")
    images: int | None = option(None, "images per kind of source; 80 at full size when left out")
    batch_size: int = option(40, "batch size of the collator")
    threads: int = option(1, "CPU threads")
    seed: int = option(0, "seed of images and random choices")


def main(argv: list[str] | None = None) -> None:
    """Print the costs of each kind of source, their ratios, and the differences of pixels."""
    (args,) = parse_arguments([DataBenchmark], description=__doc__, argv=argv, config=False)
    datasets.disable_progress_bars()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    config = make_config(args.full_size)
    count = args.images or (80 if args.full_size else 16)
    processor = make_processor(config)
    results = {"device": describe_device(CPU), "image_size": list(config.vision_config.image_size), "images": count}
    results["batch_size"] = batch_size = min(args.batch_size, count)
    ratios, differences, totals = {"tensor": [], "pillow": []}, [], {"plain": 0.0, "tensor": 0.0}
    for source in SOURCES:
        with tempfile.TemporaryDirectory() as folder:
            sizes = SOURCES[source] if args.full_size else tuple((w // 6, h // 6) for w, h in SOURCES[source])
            rows = write_source(Path(folder), sizes, count, config.max_text_length, args.seed)
            costs, difference = compare(Path(folder), rows, processor, config, args.seed, batch_size)
        differences.append(difference)
        for name, seconds in costs.items():
            results[f"{source}_{name}_images_per_cpu_second"] = count / seconds
        for name in totals:
            totals[name] += costs[name]
        for name, values in ratios.items():
            values.append(costs["plain"] / costs[name])
        results[f"{source}_cpu_ratio"] = ratios["tensor"][-1]
        results[f"{source}_max_abs_difference"] = difference["max"]
        results[f"{source}_mean_abs_difference"] = difference["mean"]
    results["summed_cpu_ratio"] = totals["plain"] / totals["tensor"]  # mostly reflects the largest images
    # Geometric means weight all kinds of sources equally.
    results["pillow_cpu_ratio"] = statistics.geometric_mean(ratios["pillow"])
    results["pillow_max_abs_difference"] = max(difference["pillow"] for difference in differences)
    results["max_token_difference"] = max(difference["tokens"] for difference in differences)
    results["cpu_ratio"] = statistics.geometric_mean(ratios["tensor"])
    results["mean_abs_difference"] = sum(difference["mean"] for difference in differences) / len(differences)
    results["max_abs_difference"] = max(difference["max"] for difference in differences)
    show(results, args.json)


def make_processor(config: MRAConfig) -> MRAProcessor:
    """Build a processor for the model's image size, with the tokenizer of the sample set."""
    height, width = config.vision_config.image_size
    images = MRAImageProcessor(size={"height": height, "width": width})
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parent.parent / TOKENIZER)
    return MRAProcessor(images, tokenizer, max_text_length=config.max_text_length)


def compare(
    folder: Path, rows: list[dict], processor: MRAProcessor, config: MRAConfig, seed: int, batch_size: int
) -> tuple[dict, dict]:
    """Build every batch of one source in each way.

    Returns:
        CPU-seconds by way, and the differences: of pixels in 8-bit steps, largest and mean with `tensor`, largest with
        `pillow`; and of everything else, largest.
    """
    grid_size = config.vision_config.grid_size
    plain = PlainPipeline(rows, processor, grid_size, seed)
    table = datasets.Dataset.from_parquet(str(folder / "train.parquet"), cache_dir=str(folder / "cache"))
    collate = TrainingCollator(processor.tokenizer, processor.max_text_length)
    built = {
        backend: build_pretraining_dataset(table, processor, grid_size=grid_size, seed=seed, image_backend=backend)
        for backend in ("tensor", "pillow")
    }

    def run(way: str, numbers: list[int]) -> dict[str, Any]:
        if way == "plain":
            return plain.batch(0, numbers)
        return collate(built[way].__getitems__([(0, number) for number in numbers]))

    batches = [list(range(start, start + batch_size)) for start in range(0, len(rows) - batch_size + 1, batch_size)]
    costs = {way: Cost() for way in ("plain", "tensor", "pillow")}
    deviation = 255 * torch.tensor(processor.image_processor.image_std)[:, None, None]
    largest, mean = {"pillow": 0.0, "tensor": 0.0, "tokens": 0.0}, []
    for way in costs:  # warm up files and libraries
        run(way, batches[0][:2])
    for numbers in batches:
        made = {}
        # Each batch in all ways before the next, so that changes in machine speed favour none.
        for way, cost in costs.items():
            with cost.measured(CPU):
                made[way] = run(way, numbers)
        for way in ("tensor", "pillow"):
            steps = (made[way]["pixel_values"] - made["plain"]["pixel_values"]).abs() * deviation
            largest[way] = max(largest[way], steps.max().item())
            if way == "tensor":
                mean.append(steps.mean().item())
            largest["tokens"] = max(largest["tokens"], token_difference(made[way], made["plain"]))
    scale = len(rows) / (len(batches) * batch_size)
    seconds = {way: scale * cost.cpu_seconds for way, cost in costs.items()}
    differences = {"max": largest["tensor"], "mean": sum(mean) / len(mean), **largest}
    return seconds, differences


def token_difference(ours: dict, plain: dict) -> float:
    """Return the largest difference apart from pixels; tokens that ours truncates must be padding in the plain batch."""
    largest = 0.0
    for name, expected in plain.items():
        if name != "pixel_values":
            found = ours[name]
            if found.ndim == 2 and found.shape[1] < expected.shape[1]:
                expected = expected[:, : found.shape[1]]
            largest = max(largest, (found - expected).abs().max().item())
    return largest


def write_source(
    folder: Path, sizes: Sequence[tuple[int, int]], count: int, max_text_length: int, seed: int
) -> list[dict]:
    """Draw images of one kind of source and write them as files and as a prepared Parquet file.

    Args:
        folder: folder to write to.
        sizes: ranges of width and height.
        count: number of images.
        max_text_length: tokens of the longest caption.
        seed: seed of the drawing.

    Returns:
        The rows with the path of each file.
    """
    rng, generator = random.Random(seed), np.random.default_rng(seed)
    tokenizer = AutoTokenizer.from_pretrained(Path(__file__).resolve().parent.parent / TOKENIZER)
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    (least_width, least_height), (most_width, most_height) = sizes
    lengths = caption_lengths(count, max_text_length) - 2  # [CLS] and [SEP]
    rows, noise = [], draw_noise(max(most_width, most_height), generator)
    for number in range(count):
        path = folder / f"{number}.jpg"
        size = rng.randint(least_width, most_width), rng.randint(least_height, most_height)
        draw_image(*size, noise, generator).save(path, quality=85)
        boxes = [[rng.uniform(0.4, 0.6), rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.6), 0.3] for _ in range(3)]
        rows.append(
            {
                "path": str(path),
                "caption": " ".join(rng.choices(words, k=int(lengths[number]))),
                "image_id": number,
                "boxes": boxes,
                "logits": [0.5] * 3,
                "phrases": [" ".join(rng.choices(words, k=3)) for _ in boxes],
            }
        )
    table = [row | {"image": {"bytes": Path(row["path"]).read_bytes(), "path": None}} for row in rows]
    columns = {name: [row[name] for row in table] for name in SDA_FEATURES}
    written = datasets.Dataset.from_dict(columns, features=SDA_FEATURES)
    written.to_parquet(str(folder / "train.parquet"))
    for row, boxes in zip(rows, written["boxes"], strict=True):  # rounded to float32
        row["boxes"] = boxes
    return rows


def draw_noise(side: int, generator: np.random.Generator) -> np.ndarray:
    """Return colours `(3, side, side)` around 128 whose amplitudes fall with the frequency, as those of photographs do."""
    frequencies = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    frequencies[0, 0] = 1
    phases = np.exp(2j * np.pi * generator.random((4, *frequencies.shape)))
    noise = np.fft.irfft2(phases / frequencies**1.2, (side, side))
    noise /= noise.std(axis=(1, 2), keepdims=True)
    return 128 + 40 * noise[:1] + 15 * noise[1:]


def draw_image(width: int, height: int, noise: np.ndarray, generator: np.random.Generator) -> Image.Image:
    """Return a random part of the noise with six sharp-edged blocks in it."""
    top, left = (generator.integers(0, noise.shape[1] - side + 1) for side in (height, width))
    channels = noise[:, top : top + height, left : left + width].copy()
    for _ in range(6):
        top, left = generator.integers(0, height), generator.integers(0, width)
        channels[:, top : top + height // 4, left : left + width // 3] += generator.uniform(-80, 80, (3, 1, 1))
    return Image.fromarray(channels.clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


if __name__ == "__main__":
    main()
