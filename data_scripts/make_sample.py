"""Write the sample set: drawn pedestrians in the source layouts of SDA and CUHK-PEDES.

python -m data_scripts.make_sample --output data/sample
python -m data_scripts.make_sample --train_tokenizer data_scripts/sample/tokenizer
"""

import json
import os
import random
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any


if __name__ == "__main__" and not __package__:  # run as `python data_scripts/make_sample.py`
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_scripts.sample.plan import PEDES_FOLDER, PlannedPicture, SampleConfig, plan_pedes, plan_sda, shard_name
from data_scripts.sample.scenes import render
from mra.common.arguments import option, parse_arguments, require
from mra.common.command_line import plain_errors, try_folder, try_output
from mra.common.files import whole_folder


MANIFEST = "sample.json"
FORMAT = 1  # incremented whenever the same arguments give a different dataset
VOCABULARY_SIZE = 800
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# Writing


def _draw_and_save(task: tuple[str, PlannedPicture]) -> dict[str, tuple[float, ...]]:
    folder, crop = task
    image, parts = render(crop.person, crop.scene)
    options: dict[str, Any] = {"quality": 90} if crop.path.endswith(".jpg") else {}
    image.save(Path(folder, crop.path), **options)
    return parts


def _draw_all(crops: list[PlannedPicture], folder: Path, num_proc: int) -> None:
    from tqdm.auto import tqdm

    for parent in sorted({Path(crop.path).parent for crop in crops}):
        (folder / parent).mkdir(parents=True, exist_ok=True)
    tasks = [(str(folder), crop) for crop in crops]
    progress = {"total": len(tasks), "desc": "Drawing", "unit": "image", "disable": None}
    if num_proc == 1:
        for crop, parts in zip(crops, tqdm(map(_draw_and_save, tasks), **progress), strict=True):
            crop.parts = parts
        return
    with ProcessPoolExecutor(num_proc, mp_context=get_context("spawn")) as pool:
        drawn = tqdm(pool.map(_draw_and_save, tasks, chunksize=32), **progress)
        for crop, parts in zip(crops, drawn, strict=True):
            crop.parts = parts


def box_of(edges: Sequence[float], rng: random.Random, jitter: float = 0.008) -> list[float]:
    """Return a part's extent as a detector's box.

    Args:
        edges: left, top, right, bottom in 0..1.
        rng: source of the jitter.
        jitter: largest shift of an edge, in 0..1.

    Returns:
        cx, cy, w, h in 0..1 with 4 decimals, inside the image.
    """
    low, high = [], []
    for first, second in ((edges[0], edges[2]), (edges[1], edges[3])):
        a = round(10_000 * (first + rng.uniform(-jitter, jitter)))
        b = round(10_000 * (second + rng.uniform(-jitter, jitter)))
        a = min(9_900, max(1, a))
        b = min(9_999, max(a + 50, b))
        low.append(a)
        high.append(b - (b - a) % 2)
    return [(low[0] + high[0]) / 20_000, (low[1] + high[1]) / 20_000] + [
        (b - a) / 10_000 for a, b in zip(low, high, strict=True)
    ]


def sda_row(crop: PlannedPicture) -> dict:
    """Build a row of an SDA shard; about one in a hundred has no boxes."""
    rng = random.Random(f"{crop.scene.seed}/boxes")
    boxes, logits, phrases = [], [], []
    caption = crop.captions[0]
    if rng.random() > 0.01:
        for part, phrase in caption.phrases.items():
            if part not in crop.parts or (part != "person" and rng.random() < 0.12):
                continue
            boxes.append([round(value, 4) for value in box_of(crop.parts[part], rng)])
            logits.append(round(rng.uniform(0.6, 0.9) if part == "person" else rng.uniform(0.35, 0.85), 4))
            phrases.append(phrase)
    return {
        "image": crop.path.removeprefix("SDA/"),
        "boxes": boxes,
        "logits": logits,
        "phrases": phrases,
        "caption": caption.text,
        "image_id": crop.image_id,
    }


def _tokens(text: str) -> list[str]:
    return "".join(c if c.isalnum() or c in "-'" else " " for c in text.lower()).split()


def _pedes_rows(crops: list[PlannedPicture]) -> Iterator[tuple[str, list[dict]]]:
    official = []
    processed: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for crop in crops:
        texts = [caption.text for caption in crop.captions]
        official.append(
            {
                "split": crop.split,
                "captions": texts,
                "file_path": crop.path.removeprefix(f"{PEDES_FOLDER}/imgs/"),
                "processed_tokens": [_tokens(text) for text in texts],
                "id": crop.image_id,
            }
        )
        row = {"image": crop.path, "caption": texts, "image_id": crop.image_id}
        if crop.split == "train":
            processed["train"] += [{**row, "caption": text} for text in texts]
        else:
            processed[crop.split].append(row)
    yield "pedes/reid_raw.json", official
    for split, rows in processed.items():
        yield f"finetune/cuhk_{split}.json", rows


def _write_json(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def _write_all(folder: Path, config: SampleConfig, num_proc: int) -> dict[str, int]:
    sda, pedes = plan_sda(config), plan_pedes(config)
    _draw_all(sda + pedes, folder / "images", num_proc)
    shards: dict[str, list[dict]] = {}
    for crop in sda:
        shards.setdefault(shard_name(crop.image_id, config.sda_shard_size, "sda"), []).append(sda_row(crop))
    for name, rows in shards.items():
        _write_json(folder / "sda" / f"{name}.json", rows)
    if pedes:
        for name, rows in _pedes_rows(pedes):
            _write_json(folder / name, rows)
    counts = {"sda": len(sda)}
    return counts | {split: sum(crop.split == split for crop in pedes) for split in ("train", "val", "test")}


def _read_manifest(folder: Path) -> dict | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _manifest(config: SampleConfig) -> dict:
    return {"format": FORMAT, "arguments": vars(config).copy()}


def make_sample(
    output: str | Path, config: SampleConfig | None = None, *, num_proc: int = 1, overwrite: bool = False
) -> bool:
    """Write a sample set atomically.

    Args:
        output: folder to create, with `sda/`, `pedes/`, `finetune/` and `images/` in it.
        config: what to draw; the same configuration gives the same bytes for any `num_proc`.
        num_proc: number of drawing processes.
        overwrite: whether to replace an existing folder with everything in it.

    Returns:
        True if a dataset was written, False if the folder already holds the same one.

    Raises:
        ValueError: if `output` exists and holds something else, or `num_proc` is below 1.
    """
    config = config or SampleConfig()
    output = Path(output).absolute()
    try_output(output, "--output")
    if num_proc < 1:
        raise ValueError(f"`num_proc` must be 1 or more, got {num_proc}")
    if output.exists() and not overwrite:
        manifest = _read_manifest(output)
        if manifest and {key: manifest.get(key) for key in ("format", "arguments")} == _manifest(config):
            return False
        what = f"was made with {manifest.get('arguments')}" if manifest else "is not a sample set"
        raise ValueError(f"`output` {output} exists and {what}; expected a new folder; pass --overwrite to replace it")
    with whole_folder(output) as unfinished:
        counts = _write_all(unfinished, config, num_proc)
        _write_json(unfinished / MANIFEST, {**_manifest(config), "images": counts})
    return True


# Tokenizer


def sample_texts(config: SampleConfig | None = None) -> Iterator[str]:
    """Yield the captions to train a tokenizer on: those of the pretraining domain and the training split."""
    config = config or SampleConfig()
    for crop in plan_sda(config) + plan_pedes(config):
        if crop.split in ("sda", "train"):
            yield from (caption.text for caption in crop.captions)


def train_vocabulary(texts: Iterable[str], size: int = VOCABULARY_SIZE) -> list[str]:
    """Train an uncased WordPiece vocabulary that can spell any lower-case ASCII word.

    Args:
        texts: training texts.
        size: most tokens of the vocabulary.

    Returns:
        The tokens in the order of their ids: `[PAD]`, `[UNK]`, `[CLS]`, `[SEP]`, `[MASK]`, characters, pieces.
    """
    from tokenizers import BertWordPieceTokenizer

    letters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    # The trainer breaks ties by id and numbers ##characters in hash order: define them beforehand.
    fixed = [*SPECIAL_TOKENS, *letters, *(f"##{letter}" for letter in letters if letter.isalnum())]
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    tokenizer.train_from_iterator(
        list(texts), vocab_size=size, min_frequency=2, special_tokens=fixed, show_progress=False
    )
    vocabulary = tokenizer.get_vocab()
    return sorted(vocabulary, key=vocabulary.get)


def train_tokenizer(folder: str | Path, config: SampleConfig | None = None) -> int:
    """Write a tokenizer trained on the sample's captions, as a folder for `AutoTokenizer`; returns its size."""
    from transformers import BertTokenizer

    tokens = train_vocabulary(sample_texts(config))
    tokenizer = BertTokenizer(vocab={token: index for index, token in enumerate(tokens)}, do_lower_case=True)
    tokenizer.model_max_length = 512
    with whole_folder(folder, replaces="vocab.txt") as unfinished:
        tokenizer.save_pretrained(unfinished)
        Path(unfinished, "vocab.txt").write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return len(tokens)


# Command line


@dataclass
class SampleArguments:
    """Output and configuration of the sample set."""

    output: str | None = option(None, "folder to write the sample set to")
    train_tokenizer: str | None = option(
        None, "folder to write a tokenizer trained on the captions to", metavar="FOLDER"
    )
    num_proc: int = option(os.cpu_count() or 1, "processes that draw")
    overwrite: bool = option(False, "replace the output folder with everything in it")

    def __post_init__(self) -> None:
        require(self.num_proc > 0, "num_proc", "1 or more", self.num_proc)
        if not self.output and not self.train_tokenizer:
            raise ValueError("give --output, --train_tokenizer or both")


def main(argv: list[str] | None = None) -> None:
    """Write what the command line asks for and say what was written."""
    options, config = parse_arguments(
        [SampleArguments, SampleConfig], prog="make_sample", description=__doc__, argv=argv, config=False
    )
    with plain_errors("make_sample"):
        if options.train_tokenizer:
            try_folder(options.train_tokenizer, "--train_tokenizer")
            print(f"{options.train_tokenizer}: {train_tokenizer(options.train_tokenizer, config)} tokens")
        if not options.output:
            return
        written = make_sample(options.output, config, num_proc=options.num_proc, overwrite=options.overwrite)
    if not written:
        print(f"{options.output} already holds this sample set")
        return
    images = json.loads(Path(options.output, MANIFEST).read_text(encoding="utf-8"))["images"]
    print(f"{options.output}: " + ", ".join(f"{name} {number} images" for name, number in images.items()))


if __name__ == "__main__":
    main()
