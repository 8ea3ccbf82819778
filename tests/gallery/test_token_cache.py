"""The token cache: what goes in comes out, bounded, by least recent use, and never of another model or half written."""

import errno
import hashlib
import itertools
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

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


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_use_survives_closing(tmp_path, order):
    filled(tmp_path / "t", 3)
    for moment, number in enumerate(order, start=1):
        (file,) = (file for file in files(tmp_path) if file.stem == NAMES[number])
        os.utime(file, (moment, moment))
    cache = open_cache(tmp_path / "t")
    for moment, number in enumerate(order):
        cache.write(NAMES[3 + moment], TOKENS[3 + moment])
        assert NAMES[number] not in cache and len(cache) == 3 and cache.is_full


def test_half_precision_takes_half_the_room(tmp_path):
    room = 3 * (HEADER_BYTES + 4 * 24)
    assert TokenCache(tmp_path / "t", "one", SHAPE, room, "float32").capacity == 3
    assert TokenCache(tmp_path / "t", "one", SHAPE, room - 1, "float32").capacity == 2
    assert TokenCache(tmp_path / "t", "one", SHAPE, 3 * (HEADER_BYTES + 2 * 24), "float16").capacity == 3
    assert TokenCache(tmp_path / "t", "one", SHAPE, -1, "float32").capacity == 0


def test_the_size_is_that_on_the_disk(tmp_path):
    cache = filled(tmp_path / "t", 2)
    assert cache.size() == sum(512 * path.stat().st_blocks for path in files(tmp_path)) > 0
    files(tmp_path)[0].unlink()  # by a different process
    assert cache.size() == 512 * files(tmp_path)[0].stat().st_blocks


def test_files_stay_where_they_are(tmp_path):
    """A cache of an older version is used, so its layout does not change."""
    filled(tmp_path / "t")
    assert files(tmp_path) == [tmp_path / "t" / "one-float32" / NAMES[0][:2] / f"{NAMES[0]}.safetensors"]


def test_nothing_waits_for_the_disk(tmp_path, monkeypatch):
    def fail(descriptor):
        raise AssertionError("flushed")

    monkeypatch.setattr(os, "fsync", fail)
    assert len(filled(tmp_path / "t", 2)) == 2


def test_a_link_among_the_tokens_is_deleted_and_not_what_it_leads_to(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("keep")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "link").symlink_to(tmp_path / "mine")
    assert len(filled(tmp_path / "t")) == 1
    assert not (tmp_path / "t" / "link").is_symlink() and (tmp_path / "mine" / "letter.txt").exists()


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
    assert files(tmp_path) == []
    cache.write(NAMES[0], TOKENS[0])
    assert np.array_equal(cache.read(NAMES[0]), TOKENS[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda stored: {"tokens": stored["tokens"].flatten()},
        lambda stored: {"tokens": stored["tokens"].view(np.int32)},
        lambda stored: {"tokens": stored["tokens"].astype(np.float64)},
        lambda stored: {"checksum": np.array(stored["checksum"] + 1)},
        lambda stored: {"checksum": np.zeros(2)},
        lambda stored: {"tokens": np.zeros(SHAPE)},
    ],
    ids=["shape", "type of the same bytes", "type", "checksum", "two checksums", "tokens"],
)
def test_a_whole_file_with_other_tokens_is_not_used(tmp_path, change):
    cache = filled(tmp_path / "t")
    stored = load_file(files(tmp_path)[0])
    save_file(stored | change(stored), files(tmp_path)[0])
    assert cache.read(NAMES[0]) is None and NAMES[0] not in cache


def test_a_file_without_tokens_is_not_used(tmp_path):
    cache = filled(tmp_path / "t")
    save_file({"others": TOKENS}, files(tmp_path)[0])
    assert cache.read(NAMES[0]) is None and files(tmp_path) == []


def test_damaged_tokens_that_cannot_be_deleted_are_not_used(tmp_path, monkeypatch, caplog):
    cache = filled(tmp_path / "t", 2)
    (file,) = (file for file in files(tmp_path) if file.stem == NAMES[0])
    damage(file, "cut")

    def refuse(*arguments, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    assert cache.read(NAMES[0]) is None and NAMES[0] not in cache
    assert "cannot be written (Permission denied)" in caplog.text
    assert np.array_equal(cache.read(NAMES[1]), TOKENS[1])


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
    for path in files(tmp_path):
        path.with_name(f".unfinished-0123abcd-{NAMES[5]}.safetensors").write_bytes(b"half of it")
    assert len(open_cache(tmp_path / "t")) == 3
    assert len(files(tmp_path)) == 3
    files(tmp_path)[0].with_name(f".unfinished-0123abcd-{NAMES[5]}.safetensors").write_bytes(b"half of it")
    cache.write(NAMES[4], TOKENS[4])
    cache.keep_only({NAMES[1]})
    assert [path.stem for path in files(tmp_path)] == [NAMES[1]]
    assert NAMES[4] not in cache
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
