"""Image tokens on disk: one file of fixed slots, bounded, rebuilt where it is absent or of another model."""

import contextlib
import errno
import fcntl
import json
import logging
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch


logger = logging.getLogger(__name__)

TOKEN_DTYPES = ("float32", "float16")

# Bytes of the file's header, a JSON text; of a slot's header: SHA-256, time of last use, CRC-32 of the tokens.
FILE_HEADER = 4096
SLOT_HEADER = 64
_SLOT = np.dtype([("content", "V32"), ("used", "<u8"), ("checksum", "<u4"), ("padding", "V20")])
_EMPTY = bytes(32)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class TokenCache:
    """Tokens of images by the content of their file, so that equal images share them.

    A slot's tokens are written before the header that names them, so an interrupted write leaves a free slot; the
    checksum finds what a power failure left. Where the file is full, the slot that was not used for longest is taken.
    Nothing is mapped into memory: on a full disk, touching a page of a mapped file kills the process, a read included
    on some file systems, whereas a write that does not fit is an error. It is said once, and nothing more is cached.

    Args:
        path: the file; None for no cache.
        fingerprint: of the model; a file of another one starts empty.
        token_shape: (views, 1 + patches, hidden) of an image.
        max_bytes: most bytes of the file.
        dtype: "float32" or "float16".

    Raises:
        ValueError: if the dtype is unknown.
    """

    def __init__(
        self, path: Path | None, fingerprint: str, token_shape: tuple[int, int, int], max_bytes: int, dtype: str
    ) -> None:
        if dtype not in TOKEN_DTYPES:
            raise ValueError(f"token_dtype must be one of {', '.join(TOKEN_DTYPES)}, got {dtype!r}")
        self.shape, self.dtype = tuple(token_shape), np.dtype(dtype)
        self._token_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._slot_bytes = SLOT_HEADER + self._token_bytes
        self.capacity = max(0, (max_bytes - FILE_HEADER) // self._slot_bytes)
        self._slots: dict[bytes, int] = {}  # the one that was not used for longest first
        self._free: list[int] = []
        self._num_slots = 0
        self._file: int | None = None
        self._is_growing = True
        self._clock = 0
        if path is not None and self.capacity:
            self._path = path
            self._open({"fingerprint": fingerprint, "shape": list(self.shape), "dtype": dtype})

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, content: str) -> bool:
        return bytes.fromhex(content) in self._slots

    def contents(self) -> list[str]:
        """Return the images whose tokens are held."""
        return [name.hex() for name in self._slots]

    @property
    def is_full(self) -> bool:
        """Whether another image would take the place of one that is held."""
        return len(self._slots) >= self.capacity

    def read(self, content: str) -> torch.Tensor | None:
        """Tokens (views, 1 + patches, hidden) in float32 of an image, or None where they are not held."""
        name = bytes.fromhex(content)
        slot = self._slots.get(name)
        if slot is None:
            return None
        stored = os.pread(self._file, self._slot_bytes, self._start(slot))
        header = np.frombuffer(stored[:SLOT_HEADER].ljust(SLOT_HEADER, b"\0"), _SLOT)[0]
        data = stored[SLOT_HEADER:]
        if header["content"].tobytes() != name or zlib.crc32(data) != header["checksum"]:
            with self._caching():
                self.remove(content)
            return None
        with self._caching():
            self._write_header(name, slot, int(header["checksum"]))
        return torch.from_numpy(np.frombuffer(data, self.dtype).reshape(self.shape).astype(np.float32))

    def write(self, content: str, tokens: torch.Tensor, replace: bool = True) -> None:
        """Hold the tokens of an image; without `replace` only where there is room.

        Nothing is kept where the capacity is 0, another process holds the file or the disk is full.
        """
        name = bytes.fromhex(content)
        if self._file is None or not self._is_growing or name in self._slots or (self.is_full and not replace):
            return
        data = np.ascontiguousarray(tokens.numpy().astype(self.dtype)).tobytes()
        with self._caching():
            if not self._free and self._num_slots >= self.capacity:
                self.remove(next(iter(self._slots)).hex())
            slot = self._free[-1] if self._free else self._num_slots
            try:
                self._write_at(self._start(slot) + SLOT_HEADER, data)
                self._write_header(name, slot, zlib.crc32(data))
            except OSError:
                if slot == self._num_slots:  # the part that did fit
                    os.truncate(self._file, self._start(slot))
                raise
            if self._free:
                self._free.pop()
            else:
                self._num_slots += 1

    def rounded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as they come back from the cache, so that a score does not depend on what it holds."""
        return torch.from_numpy(tokens.numpy().astype(self.dtype).astype(np.float32))

    def remove(self, content: str) -> None:
        """Overwrite the tokens of an image with zeros and free their slot.

        Raises:
            OSError: if the file cannot be written: the tokens may still be there.
        """
        slot = self._slots.get(bytes.fromhex(content))
        if slot is not None:
            self._write_at(self._start(slot), bytes(self._slot_bytes))
            del self._slots[bytes.fromhex(content)]
            self._free.append(slot)

    def size(self) -> int:
        """Bytes that the file takes on the disk."""
        return 0 if self._file is None else 512 * os.fstat(self._file).st_blocks

    def flush(self) -> None:
        """Write everything to the disk."""
        if self._file is not None:
            with self._caching():  # some file systems find out only now that there is no room
                os.fsync(self._file)

    def close(self) -> None:
        """Write everything to the disk and let go of the file."""
        if self._file is not None:
            self.flush()
            os.close(self._file)
            self._file = None
            self._slots = {}

    def _open(self, description: dict) -> None:
        with self._caching():
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                if not self._lock():
                    os.close(self._file)
                    self._file = None
                    return
                header = json.dumps(description, sort_keys=True).encode().ljust(FILE_HEADER, b"\0")
                if os.pread(self._file, FILE_HEADER, 0) != header:
                    os.truncate(self._file, 0)
                    self._write_at(0, header)
                self._read_slots()
            except OSError:
                os.close(self._file)
                self._file = None
                raise

    def _lock(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s is in use by another process: tokens are not cached here", self._path)
            return False
        except OSError as error:  # some network file systems have no locks
            logger.warning("%s cannot be locked (%s): tokens are not cached here", self._path, error.strerror)
            return False
        return True

    def _read_slots(self) -> None:
        """Find what the slots hold; those beyond the capacity, and one that was cut off, are dropped."""
        self._num_slots = min((os.fstat(self._file).st_size - FILE_HEADER) // self._slot_bytes, self.capacity)
        os.truncate(self._file, self._start(self._num_slots))
        held = []
        for slot in range(self._num_slots):
            header = np.frombuffer(os.pread(self._file, SLOT_HEADER, self._start(slot)), _SLOT)[0]
            name = header["content"].tobytes()
            if name == _EMPTY:
                self._free.append(slot)
            else:
                held.append((int(header["used"]), name, slot))
        self._slots = {name: slot for _, name, slot in sorted(held)}
        self._clock = max((used for used, *_ in held), default=0)

    @contextlib.contextmanager
    def _caching(self) -> Iterator[None]:
        """Stop caching, and say so once, where the disk is full: the images are encoded when they are needed."""
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if self._is_growing:
                self._is_growing = False
                logger.warning(
                    "%s cannot grow (%s): tokens of further images are not cached, and a search encodes them when it "
                    "needs them",
                    self._path, os.strerror(error.errno),
                )  # fmt: skip

    def _start(self, slot: int) -> int:
        return FILE_HEADER + slot * self._slot_bytes

    def _write_header(self, name: bytes, slot: int, checksum: int) -> None:
        """Name what a slot holds, as the one that was used last."""
        self._clock += 1
        header = np.zeros(1, _SLOT)
        header["content"], header["used"], header["checksum"] = np.void(name), self._clock, checksum
        self._write_at(self._start(slot), header.tobytes())
        self._slots.pop(name, None)
        self._slots[name] = slot

    def _write_at(self, start: int, data: bytes) -> None:
        """Write all of the data: a disk that fills up takes a part of it before it refuses the rest."""
        rest = memoryview(data)
        while rest:
            written = os.pwrite(self._file, rest, start)
            rest, start = rest[written:], start + written
