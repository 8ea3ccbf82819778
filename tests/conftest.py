"""Fixtures that several test files share."""

import pytest
import torch

from tests.helpers.hub_server import HubServer
from tests.helpers.milvus_server import running_server


@pytest.fixture
def hub_server(tmp_path):
    """A stand-in of the Hub; give client processes `env=hub_server.environment()`."""
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads that share busy cores wait for each other far longer than one takes alone."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory):
    """A real Milvus server, for tests marked `server`."""
    with running_server(tmp_path_factory.mktemp("milvus")) as server:
        yield server
