"""The token cache: what goes in comes out, bounded, by least recent use, and never of another model or half written."""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import resource

import numpy as np
import pytest
import torch

from mra.gallery.token_cache import FILE_HEADER, SLOT_HEADER, TokenCache


SHAPE = (2, 3, 4)
SLOT_BYTES = SLOT_HEADER + 4 * 24
NAMES = [hashlib.sha256(bytes([number])).hexdigest() for number in range(6)]
TOKENS = torch.randn(6, *SHAPE, generator=torch.Generator().manual_seed(0))


def open_cache(path, slots=3, fingerprint="one", dtype="float32") -> TokenCache:
    return TokenCache(path, fingerprint, SHAPE, FILE_HEADER + slots * SLOT_BYTES, dtype)


def test_tokens_survive_closing_bit_by_bit(tmp_path):
    cache = open_cache(tmp_path / "t.bin")
    for name, tokens in zip(NAMES[:3], TOKENS, strict=False):
        cache.write(name, tokens)
    cache.close()
    cache = open_cache(tmp_path / "t.bin")
    assert len(cache) == 3
    assert all(torch.equal(cache.read(name), tokens) for name, tokens in zip(NAMES[:3], TOKENS, strict=False))
    assert cache.read(NAMES[3]) is None


def test_it_never_grows_beyond_its_bound_and_gives_up_what_was_not_used_for_longest(tmp_path):
    cache = open_cache(tmp_path / "t.bin")
    for number in range(3):
        cache.write(NAMES[number], TOKENS[number])
    cache.read(NAMES[0])
    cache.write(NAMES[3], TOKENS[3], replace=False)
    assert NAMES[3] not in cache
    cache.write(NAMES[3], TOKENS[3])
    assert [name in cache for name in NAMES[:4]] == [True, False, True, True]
    assert (tmp_path / "t.bin").stat().st_size <= FILE_HEADER + 3 * SLOT_BYTES
    cache.close()
    cache = open_cache(tmp_path / "t.bin", slots=1)
    assert len(cache) <= 1


@pytest.mark.parametrize("changes", [{"fingerprint": "two"}, {"dtype": "float16"}])
def test_tokens_of_another_model_or_precision_are_dropped(tmp_path, changes):
    cache = open_cache(tmp_path / "t.bin")
    cache.write(NAMES[0], TOKENS[0])
    cache.close()
    assert len(open_cache(tmp_path / "t.bin", **changes)) == 0


def test_damaged_tokens_are_not_used(tmp_path):
    cache = open_cache(tmp_path / "t.bin", slots=1)
    cache.write(NAMES[0], TOKENS[0])
    cache.close()
    with open(tmp_path / "t.bin", "r+b") as file:
        file.seek(FILE_HEADER + SLOT_HEADER + 8)
        file.write(b"\xff\xff")
    cache = open_cache(tmp_path / "t.bin", slots=1)
    assert cache.read(NAMES[0]) is None
    assert NAMES[0] not in cache


def test_half_precision_rounds_as_it_says(tmp_path):
    cache = open_cache(tmp_path / "t.bin", dtype="float16")
    cache.write(NAMES[0], TOKENS[0])
    assert torch.equal(cache.read(NAMES[0]), cache.rounded(TOKENS[0]))
    assert torch.equal(cache.rounded(TOKENS[0]), TOKENS[0].half().float())
    with pytest.raises(ValueError, match="token_dtype must be one of float32, float16"):
        open_cache(tmp_path / "u.bin", dtype="int8")


def test_removed_tokens_are_zeros_on_the_disk(tmp_path):
    cache = open_cache(tmp_path / "t.bin")
    for number in range(2):
        cache.write(NAMES[number], TOKENS[number])
    cache.flush()
    needle = TOKENS[0].numpy().astype(np.float32).tobytes()
    assert needle in (tmp_path / "t.bin").read_bytes()
    cache.remove(NAMES[0])
    cache.flush()
    data = (tmp_path / "t.bin").read_bytes()
    assert needle not in data and bytes.fromhex(NAMES[0]) not in data
    assert torch.equal(cache.read(NAMES[1]), TOKENS[1])


def count_in_another_process(path, results):
    cache = open_cache(path)
    cache.write(NAMES[1], TOKENS[1])
    results.put(len(cache))


def test_a_second_process_goes_without(tmp_path):
    cache = open_cache(tmp_path / "t.bin")
    cache.write(NAMES[0], TOKENS[0])
    results = multiprocessing.get_context("fork").Queue()
    process = multiprocessing.get_context("fork").Process(
        target=count_in_another_process, args=(tmp_path / "t.bin", results)
    )
    process.start()
    assert results.get(timeout=60) == 0
    process.join()
    assert len(cache) == 1 and NAMES[1] not in cache


def test_no_room_is_no_cache(tmp_path):
    for cache in (open_cache(None), open_cache(tmp_path / "t.bin", slots=0)):
        cache.write(NAMES[0], TOKENS[0])
        assert cache.read(NAMES[0]) is None and len(cache) == 0
        cache.close()
    assert not (tmp_path / "t.bin").exists()


@pytest.mark.parametrize("cut", [0, 10, FILE_HEADER, FILE_HEADER + 7])
def test_a_cache_without_slots_opens_flushes_and_holds_tokens_again(tmp_path, cut):
    path = tmp_path / "t.bin"
    cache = open_cache(path)
    cache.write(NAMES[0], TOKENS[0])
    cache.close()
    with path.open("r+b") as file:
        file.truncate(cut)
    cache = open_cache(path)
    cache.flush()
    assert len(cache) == 0 and cache.read(NAMES[0]) is None
    cache.write(NAMES[0], TOKENS[0])
    assert torch.equal(cache.read(NAMES[0]), TOKENS[0])
    cache.close()


@pytest.mark.parametrize("room", [0, 100, FILE_HEADER, FILE_HEADER + 70, FILE_HEADER + SLOT_BYTES])
def test_a_full_disk_stops_the_caching_and_nothing_else(tmp_path, monkeypatch, caplog, room):
    """`room` is how large the file can become; the write that passes it is a short one, as on a real disk."""
    pwrite = os.pwrite

    def limited(file, data, start):
        if start >= room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(file, data[: room - start], start)

    num_held = max(0, (room - FILE_HEADER) // SLOT_BYTES)
    for _ in range(2):  # a cache of that size, opened again
        caplog.clear()
        monkeypatch.setattr(os, "pwrite", limited)
        cache = open_cache(tmp_path / "t.bin")
        for name, tokens in zip(NAMES[:3], TOKENS, strict=False):
            cache.write(name, tokens)
        assert len(cache) == num_held
        assert all(
            torch.equal(cache.read(name), tokens) for name, tokens in zip(NAMES[:num_held], TOKENS, strict=False)
        )
        assert len(caplog.records) == 1 and "No space left on device" in caplog.records[0].message
        cache.close()
        monkeypatch.undo()
    cache = open_cache(tmp_path / "t.bin")
    assert len(cache) == num_held
    cache.write(NAMES[2], TOKENS[2])
    assert torch.equal(cache.read(NAMES[2]), TOKENS[2])
    cache.close()


def test_a_full_disk_costs_nothing_that_is_held(tmp_path, monkeypatch, caplog):
    cache = open_cache(tmp_path / "t.bin", slots=2)
    for number in range(2):
        cache.write(NAMES[number], TOKENS[number])

    def full(*arguments):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "pwrite", full)
    for number in range(2, 6):
        cache.write(NAMES[number], TOKENS[number])
    assert all(torch.equal(cache.read(NAMES[number]), TOKENS[number]) for number in range(2))
    assert len(cache) == 2 and len(caplog.records) == 1
    with pytest.raises(OSError, match="quota"):  # what is asked to go must not stay unnoticed
        cache.remove(NAMES[0])
    assert NAMES[0] in cache


def fill_under_a_limit(path, results):
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_HEADER + SLOT_BYTES + 20,) * 2)
    for _ in range(2):
        cache = open_cache(path)
        for name, tokens in zip(NAMES[:3], TOKENS, strict=False):
            cache.write(name, tokens)
        results.put([name for name in NAMES[:3] if cache.read(name) is not None])
        cache.close()


def test_a_limit_on_the_size_of_files_stops_the_caching_too(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=fill_under_a_limit, args=(tmp_path / "t.bin", results))
    process.start()
    assert [results.get(timeout=60) for _ in range(2)] == [NAMES[:1]] * 2
    process.join()
    assert process.exitcode == 0


def test_a_lock_that_fails_is_not_called_another_process(tmp_path, monkeypatch, caplog):
    def unsupported(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    cache = open_cache(tmp_path / "t.bin")
    cache.write(NAMES[0], TOKENS[0])
    assert len(cache) == 0 and cache.read(NAMES[0]) is None
    assert "cannot be locked (No locks available)" in caplog.text and "another process" not in caplog.text
