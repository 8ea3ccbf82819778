"""Image tokens on disk: one memory-mapped file of fixed slots, bounded, rebuilt where it is absent or of another model."""

import errno
import fcntl
import json
import logging
import os
import zlib
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

# Slots that the file grows by: it is sparse, and a slot takes space on the disk when it is first written.
SLOTS_PER_GROWTH = 256


class TokenCache:
    """Tokens of images by the content of their file, so that equal images share them.

    A slot's tokens are written before the header that names them, so an interrupted write leaves a free slot; the
    checksum finds what a power failure left. Where the file is full, the slot that was not used for longest is taken.

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
    ):
        if dtype not in TOKEN_DTYPES:
            raise ValueError(f"token_dtype must be one of {', '.join(TOKEN_DTYPES)}, got {dtype!r}")
        self.shape, self.dtype = tuple(token_shape), np.dtype(dtype)
        self._token_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        self._slot_bytes = SLOT_HEADER + self._token_bytes
        self.capacity = max(0, (max_bytes - FILE_HEADER) // self._slot_bytes)
        self._slots: dict[bytes, int] = {}
        self._free: list[int] = []
        self._file = self._whole = self._map = None
        self._disk_is_full = False
        self._clock = 0
        if path is not None and self.capacity:
            self._open(path, {"fingerprint": fingerprint, "shape": list(self.shape), "dtype": dtype})

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, content: str) -> bool:
        return bytes.fromhex(content) in self._slots

    def contents(self) -> list[str]:
        """The images whose tokens are held."""
        return [name.hex() for name in self._slots]

    @property
    def is_full(self) -> bool:
        """Whether another image would take the place of one that is held."""
        return len(self._slots) >= self.capacity

    def read(self, content: str) -> torch.Tensor | None:
        """Tokens (views, 1 + patches, hidden) in float32 of an image, or None where they are not held."""
        slot = self._slots.get(bytes.fromhex(content))
        if slot is None:
            return None
        data = self._map[slot, SLOT_HEADER:]
        header = self._header(slot)
        if zlib.crc32(data) != header["checksum"]:
            self.remove(content)
            return None
        self._clock += 1
        header["used"] = self._clock
        return torch.from_numpy(data.view(self.dtype).reshape(self.shape).astype(np.float32))

    def write(self, content: str, tokens: torch.Tensor, replace: bool = True) -> None:
        """Hold the tokens of an image; without `replace` only where there is room.

        Nothing is kept where the capacity is 0, another process holds the file or the disk is full.
        """
        name = bytes.fromhex(content)
        if self._map is None or name in self._slots or (self.is_full and not replace):
            return
        slot = self._take_slot()
        if not self._allocate(slot):
            self._free.append(slot)
            return
        data = np.ascontiguousarray(tokens.numpy().astype(self.dtype)).view(np.uint8).ravel()
        self._map[slot, SLOT_HEADER:] = data
        self._clock += 1
        header = self._header(slot)
        header["used"], header["checksum"] = self._clock, zlib.crc32(data)
        header["content"] = np.void(name)
        self._slots[name] = slot

    def rounded(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens as they come back from the cache, so that a score does not depend on what it holds."""
        return torch.from_numpy(tokens.numpy().astype(self.dtype).astype(np.float32))

    def remove(self, content: str) -> None:
        """Overwrite the tokens of an image with zeros and free their slot."""
        slot = self._slots.pop(bytes.fromhex(content), None)
        if slot is not None:
            self._map[slot] = 0
            self._free.append(slot)

    def size(self) -> int:
        """Bytes that the file takes on the disk."""
        return 0 if self._map is None else 512 * os.fstat(self._file.fileno()).st_blocks

    def flush(self) -> None:
        """Write everything to the file."""
        if self._map is not None:
            self._whole.flush()

    def close(self) -> None:
        """Write everything to the file and let go of it."""
        if self._map is not None:
            self.flush()
            self._whole = self._map = None
            self._file.close()
            self._slots = {}

    def _open(self, path: Path, description: dict) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o600), "r+b", buffering=0)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            logger.warning("%s is in use by another process: tokens are not cached here", path)
            return
        header = json.dumps(description, sort_keys=True).encode().ljust(FILE_HEADER, b"\0")
        if self._file.read(FILE_HEADER) != header:
            self._file.truncate(0)
            if not self._allocate_bytes(0, FILE_HEADER):
                self._file.close()
                return
            self._file.seek(0)
            self._file.write(header)
        self._resize(min((path.stat().st_size - FILE_HEADER) // self._slot_bytes, self.capacity))
        names = np.ascontiguousarray(self._map[:, :32])
        for slot, name in enumerate(map(bytes, names)):
            if name == _EMPTY:
                self._free.append(slot)
            else:
                self._slots[name] = slot
                self._clock = max(self._clock, int(self._header(slot)["used"][0]))

    def _resize(self, num_slots: int) -> None:
        size = FILE_HEADER + num_slots * self._slot_bytes
        self._whole = self._map = None
        self._file.truncate(size)
        self._whole = np.memmap(self._file, np.uint8, "r+", shape=(size,))
        self._map = self._whole[FILE_HEADER:].reshape(num_slots, self._slot_bytes)

    def _allocate(self, slot: int) -> bool:
        """Take the disk space of a slot: a write through the map kills the process where the disk turns out to be full."""
        return not self._disk_is_full and self._allocate_bytes(FILE_HEADER + slot * self._slot_bytes, self._slot_bytes)

    def _allocate_bytes(self, start: int, length: int) -> bool:
        try:
            os.posix_fallocate(self._file.fileno(), start, length)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            self._disk_is_full = True
            logger.warning(
                "%s cannot grow (%s): tokens of further images are not cached, and a search encodes them when it needs them",
                self._path, os.strerror(error.errno),
            )  # fmt: skip
            return False
        return True

    def _header(self, slot: int) -> np.ndarray:
        return self._map[slot, :SLOT_HEADER].view(_SLOT)

    def _take_slot(self) -> int:
        if not self._free and len(self._map) < self.capacity:
            start = len(self._map)
            self._resize(min(start + SLOTS_PER_GROWTH, self.capacity))
            self._free += range(start, len(self._map))
        if not self._free:
            oldest = min(self._slots, key=lambda name: self._header(self._slots[name])["used"][0])
            self.remove(oldest.hex())
        return self._free.pop()
