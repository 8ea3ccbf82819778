"""Fixtures that several test files share."""

import pytest

from tests.hub_server import HubServer


@pytest.fixture
def hub_server(tmp_path):
    """A stand-in of the Hub; give client processes `env=hub_server.environment()`."""
    with HubServer(tmp_path / "hub") as server:
        yield server
