"""Small processor and data sets for the tests of the training pipeline."""

import io
import random

import datasets
import numpy as np
from PIL import Image
from transformers import BertTokenizer

from processing_mra import MRAImageProcessor, MRAProcessor


VOCABULARY = (
    "a man woman young old wearing is in with and the of has black white red blue green yellow grey shirt jacket coat "
    "dress skirt trousers jeans shorts shoes boots bag backpack hat hair long short walking carrying left hand"
)
WORDS = VOCABULARY.split()
PIECES = ["##s", "##ing", "##ed", "##y", "##er"]
SIZE = (64, 32)
GRID = (2, 1)


def make_tokenizer() -> BertTokenizer:
    """A BERT tokenizer of a few words and pieces."""
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *PIECES, "."]
    return BertTokenizer(vocab={token: index for index, token in enumerate(tokens)})


def make_processor(size=SIZE, max_text_length: int = 56, caption_style: str = "plain") -> MRAProcessor:
    """A processor of small images."""
    images = MRAImageProcessor(size={"height": size[0], "width": size[1]})
    return MRAProcessor(images, make_tokenizer(), max_text_length=max_text_length, caption_style=caption_style)


def make_caption(rng: random.Random, low: int = 6, high: int = 30) -> str:
    """A caption of known words, some with a piece at the end."""
    words = (rng.choice(WORDS) + rng.choice(["", "", "", "s"]) for _ in range(rng.randint(low, high)))
    return " ".join(words) + "."


def image_bytes(width: int, height: int, seed: int) -> bytes:
    """A PNG of random colours in blocks of eight pixels."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width]).save(buffer, "PNG")
    return buffer.getvalue()


SDA_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "image_id": datasets.Value("int64"),
        "boxes": datasets.List(datasets.List(datasets.Value("float32"))),
        "logits": datasets.List(datasets.Value("float32")),
        "phrases": datasets.List(datasets.Value("string")),
    }
)
PEDES_FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "captions": datasets.List(datasets.Value("string")),
        "image_id": datasets.Value("int64"),
        "camera": datasets.Value("string"),
    }
)


def make_sda(rows: int = 12, seed: int = 0) -> datasets.Dataset:
    """SDA rows with up to three boxes; every fourth has none."""
    rng = random.Random(seed)
    table = {name: [] for name in SDA_FEATURES}
    for row in range(rows):
        regions = 0 if row % 4 == 3 else rng.randint(1, 3)
        table["image"].append({"bytes": image_bytes(40 + row % 5, 90 + row % 7, row), "path": None})
        table["caption"].append(make_caption(rng))
        table["image_id"].append(1000 + row)
        table["boxes"].append(
            [[rng.uniform(0.3, 0.7), rng.uniform(0.3, 0.7), rng.uniform(0.1, 0.6), 0.4] for _ in range(regions)]
        )
        table["logits"].append([0.5] * regions)
        table["phrases"].append([f"{rng.choice(WORDS)} {rng.choice(WORDS)}" for _ in range(regions)])
    return datasets.Dataset.from_dict(table, features=SDA_FEATURES)


def make_pedes(rows: int = 10, captions: int = 2, first_person: int = 1, seed: int = 0) -> datasets.Dataset:
    """PEDES rows, two images a person."""
    rng = random.Random(seed)
    table = {
        "image": [{"bytes": image_bytes(40, 80 + row, 100 + row), "path": None} for row in range(rows)],
        "captions": [[make_caption(rng) for _ in range(captions)] for _ in range(rows)],
        "image_id": [first_person + 5 * (row // 2) for row in range(rows)],
        "camera": [None] * rows,
    }
    return datasets.Dataset.from_dict(table, features=PEDES_FEATURES)
