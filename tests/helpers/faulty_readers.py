"""The commands that read what other commands wrote, and damage to the files that they read."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import faults


@dataclass(frozen=True)
class Reader:
    """A command that reads the output of another one.

    Attributes:
        made_by: the other command.
        folder: the output, in the working folder of both.
        arguments: module and command line, as in `faulty_commands.Command`.
        result: reads what the command gave from its working folder and what it printed.
        pattern: files to damage, below the folder.
        names: pattern of what a message must name; the name of the file by default.
    """

    made_by: str
    folder: str
    arguments: tuple[str, ...]
    result: Callable[[Path, str], object]
    pattern: str = r".*"
    names: str | None = None


def _read_metrics(folder: Path, shown: str) -> object:
    metrics = json.loads((folder / "result" / "metrics.json").read_text())
    return {name: metrics.get(name) for name in ("similarity", "reranked", "counts", "rerank_k", "match_weight")}


def _read_hits(folder: Path, shown: str) -> object:
    found = next(json.loads(line) for line in shown.splitlines() if line.startswith("{"))
    # Tokens that are not cached are encoded in another batch, and rounded otherwise.
    return [(hit["key"], round(hit["score"], 5), round(hit["similarity"], 5)) for hit in found["hits"]]


def _read_problems(folder: Path, shown: str) -> object:
    return shown.splitlines()[-1].rpartition(", ")[0]  # without the number of cached tokens


def _read_run(folder: Path, shown: str) -> object:
    return faults.read_tree(folder / "out" / "final"), (folder / "out" / "metrics.jsonl").read_text()


def _mra(*arguments: str) -> tuple[str, ...]:
    return ("mra.cli", *arguments)


_EVALUATE = _mra("evaluate", "--output_dir", "result", "--num_workers", "0")
_SPLIT = ("--dataset", "{world}/split")
READERS = {
    "evaluate_model": Reader(
        "convert", "out",
        (*_EVALUATE, *_SPLIT, "--model", "out", "--rerank_k", "6", "--score_fusion", "published"), _read_metrics,
    ),
    "evaluate_with_choice": Reader(
        "evaluate_auto", "model", (*_EVALUATE, *_SPLIT, "--model", "model", "--rerank_k", "auto"), _read_metrics,
        pattern=r"retrieval\.json",
    ),
    "evaluate_set": Reader(
        "prepare_pedes", "out",
        (*_EVALUATE, "--dataset", "out", "--model", "{world}/model", "--rerank_k", "2", "--score_fusion", "published"),
        _read_metrics,
    ),
    "resume": Reader(
        "train_pretrain", "out",
        ("train_pretrain", "--config", "{world}/pretrain.yaml", "--output_dir", "out", "--resume", "latest"), _read_run,
        pattern=r"checkpoints/checkpoint-8/.*",
    ),
    "search": Reader(
        "index_build", "people.db",
        _mra("search", "a red coat", "--gallery", "people.db", "--device", "cpu", "--json", "--top", "12"), _read_hits,
        names=r"gallery \S*people\.db|image \S+:",
    ),
    "verify": Reader(
        "index_build", "people.db", _mra("index", "verify", "--gallery", "people.db"), _read_problems,
        names=r"gallery \S*people\.db|[1-9]\d* problems",
    ),
    "index_with_export": Reader(
        "export", "out",
        _mra("index", "build", "--gallery", "result.db", "--model", "out", "--backend", "onnx", "--images",
             "{world}/people", "--device", "cpu", "--batch_size", "4"),
        lambda folder, shown: faults.read_gallery(folder / "result.db")["embeddings"],
    ),
}  # fmt: skip


# ---------------------------------------------------------------- damage


def _place(file: Path) -> int:
    """Choose a place in a file, always the same."""
    return random.Random(file.name).randrange(max(1, file.stat().st_size))


def truncate(file: Path) -> None:
    """Cut a file."""
    with file.open("r+b") as opened:
        opened.truncate(_place(file))


def zero(file: Path) -> None:
    """Replace 64 bytes by zeros."""
    _overwrite(file, lambda content: bytes(len(content)), 64)


def flip(file: Path) -> None:
    """Change one bit."""
    _overwrite(file, lambda content: bytes(byte ^ 1 for byte in content), 1)


def _overwrite(file: Path, change: Callable[[bytes], bytes], size: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(_place(file))
        content = opened.read(size)
        opened.seek(_place(file))
        opened.write(change(content))


DAMAGES = {"cut": truncate, "removed": Path.unlink, "zeroed": zero, "flipped": flip}


def damage(file: Path, visible: bool) -> str:
    """Damage a file in one of two ways that change its size, or in one of two that do not; return which."""
    way = random.Random(file.name).choice(list(DAMAGES)[:2] if visible else list(DAMAGES)[2:])
    DAMAGES[way](file)
    return way
