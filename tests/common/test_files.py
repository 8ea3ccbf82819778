"""Files and folders that are whole or not there, whatever interrupts their writing."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mra.common import files
from mra.common.files import (
    clean,
    clean_folder,
    is_unfinished,
    replace_folder,
    unfinished_path,
    whole_file,
    whole_folder,
    write_whole,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "new" / "er" / "figures.json"
    with whole_file(path) as unfinished:
        assert unfinished.suffix == ".json" and not path.exists()
        unfinished.write_text("{}")
    assert path.read_text() == "{}" and names(path.parent) == ["figures.json"]


@pytest.mark.parametrize("flush", [True, False])
def test_an_error_leaves_the_older_file_and_nothing_else(tmp_path, flush):
    path = tmp_path / "figures.json"
    write_whole(path, "old")
    with pytest.raises(RuntimeError), whole_file(path, flush=flush) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and names(tmp_path) == ["figures.json"]


def test_a_full_disk_leaves_the_older_file(tmp_path, monkeypatch):
    write_whole(tmp_path / "a", b"old")

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and names(tmp_path) == ["a"]


def test_a_folder_replaces_an_older_one(tmp_path):
    target = tmp_path / "set"
    for text in ("old", "new"):
        with whole_folder(target) as folder:
            (folder / "rows").write_text(text)
            assert not target.exists() or (target / "rows").read_text() == "old"
    assert (target / "rows").read_text() == "new" and names(tmp_path) == ["set"]


def test_an_error_leaves_the_older_folder_and_nothing_else(tmp_path):
    with whole_folder(tmp_path / "set") as folder:
        (folder / "rows").write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "set") as folder:
        (folder / "rows").write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "set" / "rows").read_text() == "old" and names(tmp_path) == ["set"]


def test_a_folder_that_cannot_take_its_name_gives_it_back(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    (tmp_path / "new").mkdir()
    rename = Path.rename

    def refuse(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no"):
        replace_folder(tmp_path / "new", tmp_path / "set")
    assert names(tmp_path) == ["new", "set"]


KILLED = """
import os, signal, sys
from pathlib import Path
from mra.common import files
rename = Path.rename
def kill(self, target):
    if sys.argv[2] == "between" and self.name.startswith(".unfinished"):
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
Path.rename = kill
with files.whole_folder(sys.argv[1]) as folder:
    (folder / "rows").write_text("new")
    if sys.argv[2] == "writing":
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("moment", ["writing", "between"])
def test_what_a_killed_process_left_is_cleaned(tmp_path, moment):
    target = tmp_path / "set"
    with whole_folder(target) as folder:
        (folder / "rows").write_text("old")
    root = Path(files.__file__).resolve().parents[2]
    run = subprocess.run([sys.executable, "-c", KILLED, str(target), moment], cwd=root)
    assert run.returncode == -9 and len(names(tmp_path)) == 2
    clean(target)
    assert (target / "rows").read_text() == "old" and names(tmp_path) == ["set"]


def test_what_is_being_written_is_not_cleaned(tmp_path):
    with whole_file(tmp_path / "a") as first, whole_file(tmp_path / "a") as second:
        assert first != second and first.exists() and second.exists()
        assert clean_folder(tmp_path) == []
        first.write_text("1")
        second.write_text("2")
    assert (tmp_path / "a").read_text() == "1" and names(tmp_path) == ["a"]


def test_a_folder_is_cleaned_of_every_target_and_nothing_else(tmp_path):
    for target in ("a", "b"):
        unfinished_path(tmp_path / target).write_text("half")
    unfinished_path(tmp_path / "c", "run").mkdir()
    for mine in (".unfinished", ".hidden", "unfinished-1-a"):
        (tmp_path / mine).write_text("mine")
    clean(tmp_path / "a")
    assert len(names(tmp_path)) == 5
    clean_folder(tmp_path)
    assert names(tmp_path) == [".hidden", ".unfinished", "unfinished-1-a"]


def test_names_with_strange_letters(tmp_path):
    path = tmp_path / 'z"[*]-é\n.png'
    unfinished_path(path).touch()
    write_whole(path, b"x")
    assert names(tmp_path) == [path.name]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOTSUP, "no locks")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    write_whole(tmp_path / "a", b"x")
    assert names(tmp_path) == ["a"]


def test_only_a_folder_of_its_kind_is_replaced(tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for _ in range(2):  # an empty one, then one that holds the file
        with whole_folder(mine, replaces="config.json") as folder:
            (folder / "config.json").touch()
    (mine / "config.json").rename(mine / "notes.txt")
    with pytest.raises(ValueError, match=r"is a folder without config\.json and is not replaced"):
        whole_folder(mine, replaces="config.json").__enter__()
    assert names(mine) == ["notes.txt"] and names(tmp_path) == ["mine"]


# ---------------------------------------------------------------- the same, step by step


@pytest.fixture
def events(monkeypatch):
    """What is flushed and renamed, in order: names with the random part left out."""
    noted = []

    def note(kind, path):
        noted.append((kind, files._NAME.sub(r"\1\3", Path(path).name)))

    def flush(descriptor):
        note("flush", os.readlink(f"/proc/self/fd/{descriptor}"))

    def renaming(original):
        return lambda source, target: (note("rename to", target), original(source, target))[1]

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", renaming(os.replace))
    monkeypatch.setattr(Path, "rename", renaming(Path.rename))
    return noted


@pytest.mark.parametrize("flush", [True, False])
def test_a_file_is_flushed_before_it_is_renamed_and_its_folder_afterwards(tmp_path, events, flush):
    with whole_file(tmp_path / "a", flush=flush) as unfinished:
        unfinished.write_text("new")
    assert is_unfinished(unfinished) and not is_unfinished(tmp_path / "a")
    flushed = [("flush", ".unfinished-a")], [("flush", tmp_path.name)]
    assert events == [*flushed[0] * flush, ("rename to", "a"), *flushed[1] * flush]


def test_files_are_flushed_unless_it_is_refused(tmp_path, events):
    with whole_file(tmp_path / "a"):
        pass
    assert len(events) == 3


def test_a_folder_is_flushed_with_all_that_it_holds_before_it_is_renamed(tmp_path, events):
    (tmp_path / "set").mkdir()
    with whole_folder(tmp_path / "set") as folder:
        (folder / "parts").mkdir()
        (folder / "parts" / "rows").write_text("new")
    before, after = events[: events.index(("rename to", ".replaced-set"))], events[-2:]
    assert sorted(before) == [("flush", name) for name in (".unfinished-set", "parts", "rows")]
    assert after == [("rename to", "set"), ("flush", tmp_path.name)]


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_the_way_to_a_target_is_made(tmp_path, write):
    for _ in range(2):  # a way that is there already is as good
        with write(tmp_path / "new" / "er" / "target"):
            pass
    assert names(tmp_path / "new" / "er") == ["target"]


@pytest.mark.parametrize("write", [whole_file, whole_folder])
def test_the_next_write_removes_what_an_earlier_one_left(tmp_path, write):
    unfinished_path(tmp_path / "target").write_text("half")
    unfinished_path(tmp_path / "other").write_text("half")
    with write(tmp_path / "target"):
        pass
    assert len(names(tmp_path)) == 2 and "target" in names(tmp_path)


def test_a_file_takes_the_place_of_text_and_bytes(tmp_path):
    for content in ("ä", b"\0\xff"):
        write_whole(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == (content.encode() if isinstance(content, str) else content)


def test_a_link_is_replaced_and_what_it_leads_to_is_kept(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "rows").write_text("mine")
    (tmp_path / "set").symlink_to(tmp_path / "far")
    with whole_folder(tmp_path / "set") as folder:
        (folder / "rows").write_text("new")
    assert names(tmp_path) == ["far", "set"] and not (tmp_path / "set").is_symlink()
    assert (tmp_path / "far" / "rows").read_text() == "mine"


def test_nothing_is_kept_open_or_locked(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    with whole_file(tmp_path / "a"), whole_folder(tmp_path / "b"):
        assert clean_folder(tmp_path) == []
    unfinished_path(tmp_path / "c").write_text("half")
    clean_folder(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_cleaning_names_what_it_changed(tmp_path):
    left = [unfinished_path(tmp_path / f"{letter}", f"{number}") for number, letter in enumerate("fedcba")]
    for path in left:
        path.touch()
    replaced = tmp_path / ".replaced-0-set"
    replaced.mkdir()
    assert clean_folder(tmp_path) == [replaced, *left] and names(tmp_path) == ["set"]
    assert clean(tmp_path / "set") == clean(tmp_path / "missing" / "set") == []


def test_a_replaced_folder_with_a_successor_is_removed(tmp_path):
    for name in ("set", ".replaced-0-set"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows").write_text(name)
    clean(tmp_path / "set")
    assert names(tmp_path) == ["set"] and (tmp_path / "set" / "rows").read_text() == "set"


def test_another_process_may_be_faster_at_cleaning(tmp_path, monkeypatch):
    unfinished_path(tmp_path / "a").touch()

    def open_late(path, flags):
        Path(path).unlink()
        raise FileNotFoundError(path)

    monkeypatch.setattr(files.os, "open", open_late)
    assert clean_folder(tmp_path) == [] == names(tmp_path)


def test_what_cannot_be_removed_is_left_for_later(tmp_path, monkeypatch):
    left = unfinished_path(tmp_path / "set")
    left.mkdir()

    def refuse(*args, **options):
        raise PermissionError(errno.EPERM, "no")

    with monkeypatch.context() as patch:
        patch.setattr(shutil.os, "rmdir", refuse)
        clean(tmp_path / "set")
        assert left.is_dir()
    clean(tmp_path / "set")
    assert names(tmp_path) == []


def test_other_errors_of_a_lock_are_not_kept_quiet(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    with pytest.raises(OSError, match="broken disk"):
        write_whole(tmp_path / "a", b"x")


@pytest.mark.parametrize(("number", "is_fatal"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_folders_that_cannot_be_flushed(tmp_path, monkeypatch, number, is_fatal):
    """Some network file systems cannot flush folders; any other error means that the file may be lost."""

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", refuse)
    if is_fatal:
        with pytest.raises(OSError, match="no"):
            write_whole(tmp_path / "a", b"x")
    else:
        write_whole(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_permissions_are_those_of_the_umask_whoever_made_the_file(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_file(tmp_path / "file") as unfinished:
            unfinished.unlink()
            os.close(os.open(unfinished, os.O_CREAT, 0o600))
        with whole_folder(tmp_path / "folder") as unfinished:
            (unfinished / "inner").mkdir()
            os.close(os.open(unfinished / "inner" / "private", os.O_CREAT, 0o600))
            os.close(os.open(unfinished / "program", os.O_CREAT, 0o700))
    finally:
        os.umask(before)
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in tmp_path.rglob("*")}
    assert modes == {"file": "0o640", "folder": "0o750", "inner": "0o750", "private": "0o640", "program": "0o740"}
