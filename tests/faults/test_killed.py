"""Every command that writes, killed before some of its changes; the next run gives what an undisturbed one gives."""

import random

import pytest

from tests.helpers import faults
from tests.helpers.faulty_commands import COMMANDS


pytestmark = pytest.mark.faults
KILLS = {"factory": 6, "export": 1}
FEW = 3


@pytest.mark.parametrize("name", COMMANDS)
def test_killed_again_and_again(world, tmp_path, name):
    _, undisturbed, expected = world.undisturbed(name)
    pick, kills, folder = random.Random(name), KILLS.get(name, FEW), tmp_path / "work"
    world.begin(name, folder)
    killed = []
    for part in range(kills):  # one in each part of the run
        low, high = (1 + undisturbed.events * bound // kills for bound in (part, part + 1))
        at = pick.randrange(low, max(low + 1, high))
        if COMMANDS[name].resumes and COMMANDS[name].before is None:
            at = pick.randrange(2, max(3, undisturbed.events // kills + 2))  # from where the last one got to
        outcome = world.run(name, folder, *_resume(name, folder), at=at, fault=faults.kill)
        killed.append((at, outcome.code))
        assert outcome.code in (-9, 0), (killed, outcome.shown)
    assert (-9) in {code for _, code in killed}, killed
    outcome = world.run(name, folder, *_resume(name, folder))
    assert outcome.code == 0, (killed, outcome.shown)
    assert not faults.unfinished(folder), killed
    assert world.result(name, folder) == expected, killed


def _resume(name, folder):
    return COMMANDS[name].again if (folder / "out").exists() else ()
