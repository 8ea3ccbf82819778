"""The token cache: what goes in comes out, bounded, by least recent use, and never of another model or half written."""

import errno
import hashlib
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest

from mra.gallery.token_cache import HEADER_BYTES, TokenCache


SHAPE = (2, 3, 4)
NAMES = [hashlib.sha256(bytes([number])).hexdigest() for number in range(6)]
TOKENS = np.random.default_rng(0).standard_normal((6, *SHAPE), np.float32)


def open_cache(path, images=3, fingerprint="one", dtype="float32") -> TokenCache:
    return TokenCache(path, fingerprint, SHAPE, images * (HEADER_BYTES + 4 * 24), dtype)


def filled(path, count=1, **options) -> TokenCache:
    cache = open_cache(path, **options)
    for name, tokens in zip(NAMES[:count], TOKENS, strict=False):
        cache.write(name, tokens)
    return cache


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_tokens_survive_closing_bit_by_bit(tmp_path):
    filled(tmp_path / "t", 3)
    cache = open_cache(tmp_path / "t")
    assert len(cache) == 3
    assert all(np.array_equal(cache.read(name), tokens) for name, tokens in zip(NAMES[:3], TOKENS, strict=False))
    assert cache.read(NAMES[3]) is None


def test_it_never_grows_beyond_its_bound_and_gives_up_what_was_not_used_for_longest(tmp_path):
    cache = filled(tmp_path / "t", 3)
    cache.read(NAMES[0])
    cache.write(NAMES[3], TOKENS[3], replace=False)
    assert NAMES[3] not in cache
    cache.write(NAMES[3], TOKENS[3])
    assert [name in cache for name in NAMES[:4]] == [True, False, True, True]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3 * (HEADER_BYTES + 4 * 24)
    time.sleep(0.02)  # more than the tick of the clock that stamps files
    cache.read(NAMES[2])
    assert open_cache(tmp_path / "t", images=1).read(NAMES[2]) is not None
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("changes", [{"fingerprint": "two"}, {"dtype": "float16"}])
def test_tokens_of_another_model_or_precision_are_deleted(tmp_path, changes):
    filled(tmp_path / "t")
    assert len(open_cache(tmp_path / "t", **changes)) == 0
    assert files(tmp_path) == []


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    if how in ("deleted", "folder"):
        file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "deleted":
        flipped = data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]
        file.write_bytes({"cut": data[:-7], "empty": b"", "flipped": flipped, "garbage": b"x" * len(data)}[how])


@pytest.mark.parametrize("how", ["deleted", "folder", "cut", "empty", "flipped", "garbage"])
@pytest.mark.parametrize("opened_before", [True, False])
def test_damaged_tokens_are_not_used_and_can_be_written_again(tmp_path, how, opened_before):
    cache = filled(tmp_path / "t")
    damage(files(tmp_path)[0], how)
    cache = cache if opened_before else open_cache(tmp_path / "t")
    assert cache.read(NAMES[0]) is None and NAMES[0] not in cache
    cache.write(NAMES[0], TOKENS[0])
    assert np.array_equal(cache.read(NAMES[0]), TOKENS[0])


def test_half_precision_rounds_as_it_says(tmp_path):
    cache = filled(tmp_path / "t", dtype="float16")
    assert np.array_equal(cache.read(NAMES[0]), cache.rounded(TOKENS[0]))
    assert np.array_equal(cache.rounded(TOKENS[0]), TOKENS[0].astype(np.float16).astype(np.float32))
    with pytest.raises(ValueError, match="token_dtype must be one of float32, float16"):
        open_cache(tmp_path / "u", dtype="int8")


def test_tokens_beyond_half_precision_are_refused(tmp_path):
    cache = open_cache(tmp_path / "t", dtype="float16")
    for convert in (cache.rounded, lambda tokens: cache.write(NAMES[0], tokens)):
        with pytest.raises(ValueError, match="tokens of an image reach 70000, more than float16 holds"):
            convert(np.full(SHAPE, -7e4, np.float32))
    assert files(tmp_path) == []


def test_only_what_is_kept_stays_on_the_disk(tmp_path):
    """What another process wrote meanwhile, and what a killed one left unfinished, goes too."""
    cache = open_cache(tmp_path / "t")
    filled(tmp_path / "t", 3)
    unfinished = files(tmp_path)[0].with_name(f".unfinished-0123abcd-{NAMES[5]}.safetensors")
    unfinished.write_bytes(b"half of it")
    cache.keep_only({NAMES[1]})
    assert [path.stem for path in files(tmp_path)] == [NAMES[1]]
    assert len(open_cache(tmp_path / "t")) == 1


def share(path, results):
    cache = open_cache(path)
    results.put(np.array_equal(cache.read(NAMES[0]), TOKENS[0]))
    cache.write(NAMES[1], TOKENS[1])


def test_a_second_process_shares_the_folder(tmp_path):
    cache = filled(tmp_path / "t")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=share, args=(tmp_path / "t", results))
    process.start()
    assert results.get(timeout=60)
    process.join()
    assert np.array_equal(open_cache(tmp_path / "t").read(NAMES[1]), TOKENS[1])
    assert np.array_equal(cache.read(NAMES[0]), TOKENS[0])


def test_no_room_is_no_cache(tmp_path):
    for cache in (open_cache(None), open_cache(tmp_path / "t", images=0)):
        cache.write(NAMES[0], TOKENS[0])
        assert cache.read(NAMES[0]) is None and len(cache) == 0
    assert files(tmp_path) == []


def test_a_file_in_place_of_the_folder_stops_the_caching_with_one_warning(tmp_path, caplog):
    (tmp_path / "t").write_text("in the way")
    cache = filled(tmp_path / "t", 3)
    assert len(cache) == 0 and cache.size() == 0 and cache.read(NAMES[0]) is None
    assert len(caplog.records) == 1 and "cannot be written (Not a directory)" in caplog.text


def test_a_full_disk_costs_nothing_that_is_held(tmp_path, monkeypatch, caplog):
    cache = filled(tmp_path / "t", 2, images=6)

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    for number in range(2, 6):
        cache.write(NAMES[number], TOKENS[number])
    assert all(np.array_equal(cache.read(NAMES[number]), TOKENS[number]) for number in range(2))
    assert len(cache) == 2 and len(caplog.records) == 1 and "No space left on device" in caplog.text
    assert len(files(tmp_path)) == 2
    monkeypatch.undo()
    monkeypatch.setattr(Path, "unlink", full)
    with pytest.raises(OSError, match="No space"):  # a removal that fails must not stay unnoticed
        cache.remove(NAMES[0])
    assert NAMES[0] in cache
