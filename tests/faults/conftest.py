"""The sources and undisturbed runs that the fault suite compares with."""

import pytest

from tests.helpers.faulty_commands import World


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Sources of all commands, and the results of undisturbed runs."""
    return World(tmp_path_factory.mktemp("faults"))
