"""A tiny model on disk, drawn pictures and an encoder for the tests of galleries."""

import functools
import random
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from modeling_mra import MRAForImageTextRetrieval
from mra.retrieval.encoders import TorchEncoder
from tests.helpers.tiny import tiny_model, tiny_processor


COLOURS = ("red", "green", "blue", "white", "black", "yellow", "orange", "purple")
FORMATS = (".jpg", ".png", ".bmp", ".webp")


def save_tiny_model(folder: Path, seed: int = 0) -> str:
    """A random model with its processor."""
    tiny_model(cls=MRAForImageTextRetrieval, scale=0.3, seed=seed).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return str(folder)


@functools.cache
def encoder_of(model: str) -> TorchEncoder:
    """An encoder that the tests of a process share; nothing in a gallery changes it."""
    return TorchEncoder(model, device="cpu", batch_size=4)


def draw_picture(seed: int, size: tuple[int, int] | None = None) -> Image.Image:
    """A picture of a few coloured blocks, of its own size."""
    pick = random.Random(seed)
    image = Image.new("RGB", size or (pick.randint(20, 60), pick.randint(40, 120)), pick.choice(COLOURS))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = pick.randint(0, image.width - 5), pick.randint(0, image.height - 5)
        corner = (x + pick.randint(4, 30), y + pick.randint(4, 50))
        draw.rectangle((x, y, *corner), fill=tuple(pick.randint(0, 255) for _ in range(3)))
    return image


def write_pictures(folder: Path, count: int, first: int = 0) -> list[str]:
    """Pictures in sub-folders and several formats; returns their keys, sorted."""
    keys = []
    for number in range(first, first + count):
        path = folder / f"cam_{number % 3}" / f"{number:03d}{FORMATS[number % len(FORMATS)]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(number).save(path)
        keys.append(path.relative_to(folder).as_posix())
    return sorted(keys)


def contents(gallery) -> dict:
    """Everything that the records hold."""
    return {
        record.key: (
            record.content,
            record.path,
            record.camera,
            record.time,
            record.metadata,
            record.embedding.tobytes(),
        )
        for record in gallery._state.store.records(embeddings=True)
    }


def make_split(count: int = 12) -> datasets.Dataset:
    captions = [
        f"a {colour} coat and {shoes} shoes" for colour in ("red", "blue", "green") for shoes in ("white", "black")
    ]
    return datasets.Dataset.from_dict(
        {
            "image": [draw_picture(number) for number in range(count)],
            "captions": [[captions[number % len(captions)]] for number in range(count)],
            "image_id": [number // 2 for number in range(count)],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "captions": datasets.List(datasets.Value("string")),
                "image_id": datasets.Value("int64"),
            }
        ),
    )


def everything_on_disk(folder: Path) -> bytes:
    """All files as they are, and the columns of compressed ones as they are read."""
    parts = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            content = path.read_bytes()
        except FileNotFoundError:  # the engine deletes its logs and old shards in the background
            continue
        parts += [content, str(path).encode()]
        if path.suffix == ".parquet":
            table = pq.read_table(pa.BufferReader(content))
            parts += [
                str(table.drop_columns([n for n in table.column_names if n == "embedding"]).to_pylist()).encode()
            ]
            if "embedding" in table.column_names:
                parts += [np.asarray(row, np.float32).tobytes() for row in table["embedding"].to_pylist()]
        elif path.suffix == ".arrow":
            parts.append(str(list(pa.ipc.open_stream(pa.BufferReader(content)))).encode())
    return b"".join(parts)
