"""The sources and undisturbed runs that the fault suite compares with, and small disks."""

import os

import pytest

from tests.helpers import faults
from tests.helpers.faulty_commands import World


@pytest.fixture(scope="session")
def mounts():
    """Mounts of this process alone; the reason where it may mount nothing."""
    try:
        faults.leave_mounts()
    except OSError as error:
        return f"needs root to mount a small disk: {error}"
    return faults.why_no_disks()


@pytest.fixture(scope="session")
def world(tmp_path_factory, mounts):
    """Sources of all commands, and the results of undisturbed runs; its processes see the disks of `disk`."""
    own = tmp_path_factory.getbasetemp()
    return World((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "faults")


@pytest.fixture
def disk(tmp_path, mounts):
    """A small disk."""
    if mounts is not None:
        pytest.skip(mounts)
    with faults.small_disk(tmp_path / "disk") as folder:
        yield folder
