"""What stands around a command's work: full disks named, user errors in one sentence, outputs tried before the work."""

import errno
import itertools
import os
import sys
from pathlib import Path

import pytest
from tqdm.auto import tqdm

from mra.common import command_line
from mra.common.command_line import FullDiskError, find_full_disk, plain_errors, try_file, try_folder, writing_to


FULL = OSError(errno.ENOSPC, "No space left on device")


def chain(*errors: BaseException) -> BaseException:
    """Return the last of the errors, each raised from the one before."""
    for cause, error in itertools.pairwise(errors):
        error.__cause__ = cause
    return errors[-1]


def during(first: BaseException, second: BaseException) -> BaseException:
    """Return the second error as it is when raised while the first is handled."""
    try:
        try:
            raise first
        except BaseException:
            raise second  # noqa: B904
    except BaseException as error:
        return error


def under(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture
def full_disk(monkeypatch):
    """A disk on which not a byte more can be written."""

    def refuse(*arguments, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command_line.tempfile, "TemporaryFile", refuse)


# find_full_disk


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_known_by_its_number(number):
    assert find_full_disk(OSError(number, "words of the system")) == "words of the system"
    assert find_full_disk(OSError(number, None)) == os.strerror(number)


@pytest.mark.parametrize(
    "message",
    [
        "IO error: No space left on device (os error 28)",
        "Disk quota exceeded",
        "[Errno 27] File too large",
        "PytorchStreamWriter failed writing file data/3: file write failed",
        "Not enough disk space. Needed: Unknown size (download: Unknown size, generated: Unknown size, post-processed: 0)",
    ],
)
def test_a_full_disk_is_known_by_what_libraries_say(message):
    words = find_full_disk(RuntimeError(message))
    assert words and words in message


def test_a_full_disk_is_found_along_the_chain():
    words = "No space left on device"
    assert find_full_disk(chain(FULL, RuntimeError("writer"), ValueError("generation"))) == words
    assert find_full_disk(during(OSError(errno.ENOSPC, words), RuntimeError("while closing"))) == words
    assert find_full_disk(chain(RuntimeError(f"pool: {words}"), KeyError("shard"))) == words


def test_other_errors_are_no_full_disk():
    assert find_full_disk(OSError(errno.EACCES, "Permission denied")) is None
    assert find_full_disk(chain(ValueError("a row"), RuntimeError("generation"))) is None
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first  # a circle ends
    assert find_full_disk(first) is None


# writing_to


def test_writing_to_names_what_cannot_be_written(tmp_path):
    output = tmp_path / "new" / "set"
    words = r"set cannot be written: the disk is full \(No space left on device; "
    with pytest.raises(FullDiskError, match=words) as caught, writing_to(output):
        raise RuntimeError("generation failed") from OSError(errno.ENOSPC, "No space left on device")
    message = str(caught.value)
    assert str(output) in message and f"MiB free in {tmp_path})" in message and "free some space" in message
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_the_innermost_output_is_named(tmp_path):
    with pytest.raises(FullDiskError) as caught, writing_to(tmp_path / "outer"), writing_to(tmp_path / "inner"):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")
    assert str(tmp_path / "inner") in str(caught.value) and "outer" not in str(caught.value)


@pytest.mark.parametrize("error", [KeyError("row"), OSError(errno.EACCES, "no"), KeyboardInterrupt(), SystemExit(3)])
def test_writing_to_leaves_other_errors_alone(tmp_path, error):
    with pytest.raises(type(error)) as caught, writing_to(tmp_path):
        raise error
    assert caught.value is error


# plain_errors


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (ValueError("--k must be 1 or more, got 0"), "tool: --k must be 1 or more, got 0"),
        (
            FileNotFoundError(2, "No such file or directory", "a.json"),
            "tool: [Errno 2] No such file or directory: 'a.json'",
        ),
        (ValueError(), "tool: ValueError()"),
    ],
)
def test_what_the_user_can_fix_ends_in_one_sentence(error, sentence):
    with pytest.raises(SystemExit) as caught, plain_errors("tool"):
        raise error
    assert caught.value.code == sentence and caught.value.__suppress_context__


@pytest.mark.parametrize(
    "error", [KeyError("a"), TypeError("b"), RuntimeError("c"), AssertionError(), KeyboardInterrupt()]
)
def test_faults_of_the_program_keep_their_traceback(tmp_path, error):
    for output in (None, tmp_path):
        with pytest.raises(type(error)) as caught, plain_errors("tool", output):
            raise error
        assert caught.value is error


def test_kinds_that_are_caught_can_be_chosen():
    with pytest.raises(SystemExit, match="tool: words"), plain_errors("tool", errors=(LookupError,)):
        raise LookupError("words")
    with pytest.raises(ValueError, match="words"), plain_errors("tool", errors=(LookupError,)):
        raise ValueError("words")


def test_a_full_disk_of_any_kind_is_one_sentence(tmp_path):
    words = rf"tool: {tmp_path}/x cannot be written: the disk is full"
    with pytest.raises(SystemExit, match=words) as caught, plain_errors("tool", tmp_path / "x", errors=(ValueError,)):
        raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
    assert "\n" not in caught.value.code


def test_nothing_is_said_of_success(tmp_path, capsys):
    with plain_errors("tool", tmp_path):
        pass
    assert capsys.readouterr() == ("", "")


# try_folder and try_file


@pytest.mark.parametrize("name", [".", "new", "a/b/c"])
def test_trying_a_folder_leaves_nothing(tmp_path, name):
    (tmp_path / "kept.txt").write_text("kept")
    try_folder(tmp_path / name, "--output")
    assert under(tmp_path) == ["kept.txt"]


def test_a_relative_folder_can_be_tried(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try_folder("new", "--output")
    assert not any(tmp_path.iterdir())


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"^--output .*file is a file; expected a folder: choose another name$"):
        try_folder(tmp_path / "file", "--output")
    with pytest.raises(
        ValueError, match=r"^--output .*below cannot be written: Not a directory: choose another folder"
    ):
        try_folder(tmp_path / "file" / "below", "--output")


def test_a_full_disk_is_noticed_before_the_work(tmp_path, full_disk):
    with pytest.raises(
        ValueError, match=r"^--output .*new cannot be written: No space left on device \(.* MiB free in "
    ):
        try_folder(tmp_path / "new", "--output")
    assert under(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_noticed(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match=r"cannot be written: Permission denied: choose another folder"):
        try_folder(tmp_path / "new", "--output")


def test_trying_a_file_leaves_it_alone(tmp_path):
    (tmp_path / "old.png").write_text("old")
    try_file(tmp_path / "old.png", "--figure", (".png", ".pdf"))
    try_file(tmp_path / "new.PNG", "--figure", (".png", ".pdf"))
    try_file(tmp_path / "new.anything", "--figure")
    assert under(tmp_path) == ["old.png"] and (tmp_path / "old.png").read_text() == "old"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", r"^--figure .*folder is a folder; expected a file: add a file name$"),
        ("a.gif", r"^--figure .*a\.gif cannot be written with the suffix '\.gif', expected one of \.png, \.pdf$"),
        ("a", r"with the suffix '', expected one of"),
        ("none/a.png", r"^--figure .*a\.png cannot be written: there is no folder .*none$"),
    ],
)
def test_files_that_cannot_be_written(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=message):
        try_file(tmp_path / name, "--figure", (".png", ".pdf"))


def test_a_full_disk_is_noticed_for_a_file(tmp_path, full_disk):
    with pytest.raises(ValueError, match=r"^--figure .*No space left on device"):
        try_file(tmp_path / "a.png", "--figure")


# what a command ends with


def test_a_progress_bar_ends_above_the_message(capfd):
    def work():
        bar = tqdm(total=2, desc="steps")
        bar.update()
        raise ValueError("wrong")

    with pytest.raises(SystemExit) as caught, plain_errors("train"):
        try:
            work()
        except ValueError as error:
            error.__cause__ = KeyError("a circle of causes")
            error.__cause__.__cause__ = error
            raise
    print(caught.value, file=sys.stderr)
    assert capfd.readouterr().err.splitlines()[-1] == "train: wrong"


@pytest.mark.parametrize(
    "message",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_7_1_0>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_7_1_0>: No space left on device (28)",
    ],
)
def test_full_shared_memory_is_not_blamed_on_the_output(tmp_path, message):
    refused = pytest.raises(SystemExit, match=r"^train: .* /dev/shm .*--num_workers 0")
    with refused, plain_errors("train", tmp_path, (ValueError,), from_libraries=False):
        raise RuntimeError(message)
