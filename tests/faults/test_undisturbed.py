"""Two undisturbed runs give the same: what the fault suite compares with."""

import pytest

from tests.helpers.faulty_commands import COMMANDS


pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", COMMANDS)
def test_two_undisturbed_runs_are_equal(world, tmp_path, name):
    _, outcome, expected = world.undisturbed(name)
    world.begin(name, tmp_path / "again")
    assert world.run(name, tmp_path / "again").code == 0
    assert world.result(name, tmp_path / "again") == expected
    assert outcome.events > 0
