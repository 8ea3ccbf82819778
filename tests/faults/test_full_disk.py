"""Every command that writes, on a disk that is too small or fills up while it runs; then again with room."""

import functools

import pytest

from tests.helpers import faults
from tests.helpers.faulty_commands import COMMANDS, cases


pytestmark = pytest.mark.faults
PAGE = 4096
SIZES = {"start": 0.0, "middle": 0.5, "end": 0.9}  # of what an undisturbed run leaves
MOMENTS = {"first": 0.0, "early": 0.2, "half": 0.5, "last": 1.0}  # of the changes that an undisturbed run makes


@pytest.mark.parametrize(("name", "size"), cases(*SIZES, for_slow="middle"))
def test_disk_that_is_too_small(world, disk, name, size):
    undisturbed, _, _ = world.undisturbed(name)
    world.begin(name, disk)
    base = faults.used_bytes(disk)
    room = max(_pages(undisturbed) - base, 32 * PAGE)
    faults.remount(disk, f"size={base + PAGE + int(SIZES[size] * room) // PAGE * PAGE}")
    outcome = world.run(name, disk)
    check_refusal(world, name, disk, outcome)
    faults.remount(disk, f"size={64 * faults.MIB}")
    check_next_run(world, name, disk)


@pytest.mark.parametrize(("name", "moment"), cases(*MOMENTS, for_slow="last"))
def test_disk_that_fills_up(world, disk, name, moment):
    _, undisturbed, _ = world.undisturbed(name)
    world.begin(name, disk)
    at = 1 + int(MOMENTS[moment] * (undisturbed.events - 1))
    outcome = world.run(name, disk, at=at, fault=functools.partial(faults.fill, disk))
    check_refusal(world, name, disk, outcome)
    (disk / faults.BALLAST).unlink(missing_ok=True)
    check_next_run(world, name, disk)


def check_refusal(world, name, disk, outcome):
    """One sentence that names what could not be written, and nothing that looks finished or takes up room."""
    command = COMMANDS[name]
    assert "Traceback" not in outcome.shown, outcome.shown
    assert not faults.unfinished(disk), outcome.shown
    if outcome.code == 0:  # it had room after all, or does without what could not be written and says so
        assert (
            "no space" in outcome.shown.lower()
            or "disk is full" in outcome.shown
            or (world.result(name, disk) == world.undisturbed(name)[2])
        ), outcome.shown
        return
    assert outcome.code in (1, 2), outcome.shown
    assert any(outcome.names(output.split("/")[0]) for output in command.outputs), outcome.shown
    assert "No space left" in outcome.sentence or "disk is full" in outcome.sentence, outcome.shown
    # An evaluation keeps the figures that it wrote before the picture and the scores, each file complete.
    if command.before is None and not command.resumes and name != "evaluate":
        assert not any((disk / output).exists() for output in command.outputs), outcome.shown


def check_next_run(world, name, disk):
    outcome = world.run(name, disk, *_resume(name, disk))
    assert outcome.code == 0, outcome.shown
    assert world.result(name, disk) == world.undisturbed(name)[2]
    assert not faults.unfinished(disk)


def _resume(name, disk):
    return COMMANDS[name].again if (disk / "out").exists() else ()


def _pages(folder):
    return sum(-(-path.stat().st_size // PAGE) * PAGE for path in folder.rglob("*") if path.is_file())
