"""Base of the dataset builders: rows from several processes, a log of rejected rows, clear errors."""

import contextlib
import hashlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import datasets.exceptions

from data_scripts.row_checks import RowError
from data_scripts.text_files import UnreadableFile
from mra.common.command_line import find_full_disk


ESCAPED = "backslashreplace"  # writes lone surrogates as JSON escapes instead of failing
_DIGEST_BYTES = 8

_watched_parent: int | None = None


@contextlib.contextmanager
def _children_end_with_us() -> Iterator[None]:
    """Make processes forked in this context exit when their parent is killed; those of a pool would wait forever."""
    global _watched_parent
    _watched_parent = os.getpid()
    try:
        yield
    finally:
        _watched_parent = None


def _watch_parent() -> None:
    while os.getppid() == _watched_parent:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def _start_watching() -> None:
    if _watched_parent is not None:
        threading.Thread(target=_watch_parent, daemon=True).start()


os.register_at_fork(after_in_child=_start_watching)


class RejectedRows:
    """Handler of rows that cannot be used: an error, or a line in a log.

    The log is a folder with one file per chunk of rows, so that processes can share it and its order does not depend on them.

    Args:
        folder: folder of the log.
        on_error: `raise` or `skip`.
    """

    def __init__(self, folder: str | Path, on_error: str) -> None:
        self.folder = str(folder)
        self.on_error = on_error

    def add(self, chunk: str, file: str, row: int, image: Any, error: RowError) -> None:
        """Record a row.

        Raises:
            ValueError: with `on_error="raise"`.
        """
        if self.on_error == "raise":
            raise ValueError(error.describe(file, row))
        record = {"file": file, "row": row, "image": image if isinstance(image, str) else None}
        record |= {"reason": error.reason, "field": error.field, "problem": error.problem}
        with open(os.path.join(self.folder, f"{chunk}.jsonl"), "a", encoding="utf-8", errors=ESCAPED) as log:
            log.write(json.dumps(record, ensure_ascii=False) + "\n")

    def read(self) -> Iterator[dict]:
        """Yield the records in the order of the rows."""
        for path in sorted(Path(self.folder).glob("*.jsonl")):
            with open(path, encoding="utf-8") as log:
                yield from map(json.loads, log)


@dataclass
class Chunk:
    """Rows of a split that one process reads at a time."""

    name: str
    size: int
    content: Any


class AnnotationBuilder(datasets.GeneratorBasedBuilder):
    """Base of the two builders: checks every row of `chunks` and writes them in several processes.

    Args:
        rejected: handler of rows that cannot be used.
        scratch: folder for locks and the error message of a failed process.
    """

    DEFAULT_WRITER_BATCH_SIZE = 200  # rows in memory, and in a row group
    FEATURES: ClassVar[datasets.Features]

    def __init__(self, rejected: RejectedRows, scratch: str | Path) -> None:
        self.rejected = rejected
        self.failure = os.path.join(scratch, "failure.txt")
        self._digests = Path(scratch, "digests")
        self._digests.mkdir()
        self.main_process = os.getpid()
        self.chunks: dict[str, list[Chunk]] = {}
        self.notes: list[str] = []
        super().__init__(cache_dir=os.path.join(scratch, "cache"), dataset_name="prepared")

    def examples_of(self, chunk: Chunk) -> Iterator[dict]:
        """Yield the examples of a chunk."""
        raise NotImplementedError

    def leave_out_rest(self, chunk: str, error: UnreadableFile) -> None:
        """Log a file that cannot be read beyond some row, and note it for the summary.

        Args:
            chunk: name of the chunk after which it is listed.
            error: the error, with file, row and reason.

        Raises:
            UnreadableFile: with `on_error="raise"`.
        """
        if self.rejected.on_error == "raise":
            raise error
        reason = RowError("(all)", error.reason, str(error))
        self.rejected.add(f"{chunk}.rest-{len(self.notes):05d}", error.path, error.row, None, reason)
        self.notes.append(
            f"{error.path} cannot be read from row {error.row} (counting from 0), {error.problem}: the rest is left "
            "out"
        )

    def prepare(self, folder: str | Path, max_shard_size: str, num_proc: int) -> None:
        """Write Parquet shards.

        Raises:
            ValueError: with the message for the first row that cannot be used, or if there are no rows.
        """
        if not self.chunks:
            raise ValueError("the annotations have no usable row")
        try:
            with _children_end_with_us():
                self.download_and_prepare(
                    str(folder), file_format="parquet", max_shard_size=max_shard_size, num_proc=num_proc
                )
        except Exception as error:
            # A clearer message than the error from two libraries; empty if the disk was full.
            if find_full_disk(error) is None and os.path.exists(self.failure):
                raise ValueError(Path(self.failure).read_text(encoding="utf-8") or repr(error)) from error
            if isinstance(error, RuntimeError) and num_proc > 1 and find_full_disk(error) is None:
                raise ValueError(
                    f"a worker died, possibly out of memory ({error}); use a smaller --num_proc"
                ) from error
            raise

    def digest(self, split: str) -> str:
        """Hash the rows of a prepared split, independent of the number of processes and shards.

        Args:
            split: one of `chunks`.

        Returns:
            16 hexadecimal digits.
        """
        digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for chunk in self.chunks[split]:
            digest.update(Path(self._digests, chunk.name).read_bytes())
        return digest.hexdigest()

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=self.FEATURES)

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        splits = []
        for name, chunks in self.chunks.items():
            split = datasets.SplitGenerator(name=name, gen_kwargs={"chunks": chunks})
            split.split_info.num_examples = sum(chunk.size for chunk in chunks)  # for the progress bar
            splits.append(split)
        return splits

    def _generate_examples(self, chunks: list[Chunk]) -> Iterator[tuple[Any, dict[str, Any]]]:
        if os.getpid() != self.main_process:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process handles it for all
        key = 0
        for chunk in chunks:
            digest = hashlib.blake2b(digest_size=_DIGEST_BYTES)
            for example in self.examples_of(chunk):
                self._stop_with_the_others()
                _add_to_digest(digest, example)
                yield key, example
                key += 1
            Path(self._digests, chunk.name).write_bytes(digest.digest())

    def _prepare_split_single(self, *args: Any, **kwargs: Any) -> Any:
        try:
            yield from super()._prepare_split_single(*args, **kwargs)
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(
                error.__cause__, (ValueError, OSError)
            ):  # would be lost in the pool unless written to a file
                # Another process was first, or the disk is full: the error itself is raised anyway.
                with contextlib.suppress(OSError), open(self.failure, "x", encoding="utf-8", errors=ESCAPED) as file:
                    file.write(str(error.__cause__))
            raise

    def _stop_with_the_others(self) -> None:
        if os.getpid() != self.main_process and os.path.exists(self.failure):
            raise RuntimeError("another process has stopped")


def _add_to_digest(digest: Any, example: dict) -> None:
    image = example["image"]
    values = json.dumps({**example, "image": [image["path"], len(image["bytes"])]}, sort_keys=True)
    digest.update(f"{len(values)}:{values}".encode())
    digest.update(image["bytes"])
