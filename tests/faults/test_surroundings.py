"""What the system sets: the umask, and a /dev/shm that is too small."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import faults
from tests.helpers.faulty_commands import cases
from tests.helpers.runs import ROOT


pytestmark = pytest.mark.faults


@pytest.mark.parametrize(("name", "umask"), cases(0o027, 0o077, for_slow=0o077))
def test_umask_is_honoured(world, tmp_path, name, umask):
    folder = tmp_path / "work"
    world.begin(name, folder)
    before = {path: path.stat().st_ino for path in folder.rglob("*")}
    outcome = world.run(name, folder, umask=umask)
    assert outcome.code == 0, outcome.shown
    made = [path for path in folder.rglob("*") if before.get(path) != path.stat().st_ino]
    wrong = {
        path.relative_to(folder).as_posix(): oct(path.stat().st_mode & 0o777)
        for path in made
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
    assert made and not wrong


@pytest.mark.parametrize("name", ["evaluate", "train_pretrain", "train_finetune"])
def test_small_shared_memory(world, tmp_path, disk, name):
    """The disk is mounted over /dev/shm, which `disk` makes sure is possible."""
    folder = tmp_path / "work"
    world.begin(name, folder)
    with faults.small_disk(Path("/dev/shm"), 128 * 1024):  # semaphores fit, batches do not
        outcome = world.run(name, folder, "--num_workers", "1")
    assert outcome.code in (1, 2) and "Traceback" not in outcome.shown, outcome.shown
    assert "/dev/shm" in outcome.sentence and "--num_workers 0" in outcome.sentence, outcome.shown


KILLED = """
import os, pathlib, signal
from tests.helpers import faults
faults.leave_mounts()
with faults.small_disk(pathlib.Path("disk")):
    print(any("/disk " in line for line in open("/proc/self/mounts")), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_no_disk_stays_mounted(tmp_path, mounts):
    if mounts is not None:
        pytest.skip(mounts)
    command = [sys.executable, "-c", KILLED]
    killed = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert killed.stdout == "True\n" and killed.returncode == -signal.SIGKILL, killed.stderr
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
