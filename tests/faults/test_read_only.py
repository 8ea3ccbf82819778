"""Every command on a disk that cannot be written: one sentence says so, and nothing is changed."""

import pytest

from tests.helpers import faults
from tests.helpers.faulty_commands import COMMANDS
from tests.helpers.faulty_readers import READERS


pytestmark = pytest.mark.faults


@pytest.mark.parametrize("name", COMMANDS)
def test_output_on_a_read_only_disk(world, disk, name):
    world.begin(name, disk)
    before = faults.names(disk)
    faults.remount(disk, "ro")
    outcome = world.run(name, disk)
    assert outcome.code in (1, 2) and "Traceback" not in outcome.shown, outcome.shown
    assert any(outcome.names(output.split("/")[0]) for output in COMMANDS[name].outputs), outcome.shown
    assert "Read-only file system" in outcome.sentence, outcome.shown
    assert faults.names(disk) == before


@pytest.mark.parametrize("name", READERS)
def test_input_on_a_read_only_disk(world, tmp_path, disk, name):
    reader = READERS[name]
    world.begin_reading(name, disk)
    faults.remount(disk, "ro")
    (work := tmp_path / "work").mkdir()
    (work / reader.folder).symlink_to(disk / reader.folder)
    outcome = world.read(name, work)
    if outcome.code == 0:
        assert reader.result(work, outcome.shown) == world.undamaged(name)
    else:
        assert "Traceback" not in outcome.shown, outcome.shown
        assert outcome.names(reader.folder) and "Read-only file system" in outcome.sentence, outcome.shown
