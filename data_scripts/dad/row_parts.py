"""Rows written by several processes: one part per process during the work, one sorted file at the end."""

import fcntl
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_scripts.dad.json_files import to_lines
from mra.common.command_line import writing_to
from mra.common.files import write_whole
from mra.common.sharding import Shard


class RowParts:
    """Rows of a stage written by several processes, each appending to its own part.

    Args:
        path: the file that [`merge`] writes, for example `images/generated.jsonl`.
        shard: the share of this process, which names the part.
        key: field with a unique value per row, by which the file is sorted.

    Raises:
        ValueError: on the first `append`, if another run has the part open.
    """

    def __init__(self, path: str | Path, shard: Shard, key: str = "prompt_id") -> None:
        self.path = Path(path)
        self.key = key
        self._part = self.path.with_name(f"{self.path.stem}-{shard.rank:05d}-of-{shard.world_size:05d}.jsonl")
        self._file: io.FileIO | None = None

    def read(self) -> dict[Any, dict[str, Any]]:
        """Return all existing rows, from the merged file and the parts, by their key."""
        # The merged file last: it holds parts that another job merges meanwhile.
        rows = [row for file in [*self._parts(), self.path] for row in _read_part(file)]
        return {row[self.key]: row for row in rows}

    def append(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows and flush them to disk."""
        with writing_to(self._part):
            file = self._file or self._open()
            left = memoryview(to_lines(rows).encode())
            while left:  # an almost full disk may accept only a part
                left = left[file.write(left) :]

    def close(self) -> None:
        """Close this process's part."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def merge(self) -> int:
        """Merge the closed parts into one sorted file and return its number of rows; only one process may call this."""
        rows = self.read()
        write_whole(self.path, to_lines(rows[key] for key in sorted(rows)))
        for part in self._parts():
            part.unlink(missing_ok=True)
        return len(rows)

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}-*-of-*.jsonl"))

    def _open(self) -> io.FileIO:
        self._part.parent.mkdir(parents=True, exist_ok=True)
        self._file = file = open(self._part, "ab", buffering=0)  # noqa: SIM115 (stays open while the process works)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf would unlock when any reader closes the file
        except (BlockingIOError, PermissionError):  # depends on the system
            self.close()
            raise ValueError(
                f"{self._part}: another run is writing it; wait for it, stop it, or give each run its common.shard"
            ) from None
        file.truncate(_whole_lines(self._part.read_bytes()))
        return file


def _whole_lines(content: bytes) -> int:
    """Return the length of a part without an unfinished last line."""
    return content.rfind(b"\n") + 1


def _read_part(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    rows = []
    for number, line in enumerate(content[: _whole_lines(content)].splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise ValueError(
                f"{path}: line {number} is not JSON in UTF-8 ({error}); remove the line to make its row again"
            ) from None
    return rows
