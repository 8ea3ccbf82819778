"""Files and folders that are whole or not there, whatever interrupts their writing."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mra.common import files
from mra.common.files import (
    clean,
    clean_folder,
    replace_folder,
    unfinished_path,
    whole_file,
    whole_folder,
    write_whole,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_has_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "new" / "figures.json"
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
