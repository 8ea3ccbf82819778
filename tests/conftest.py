"""Fixtures that several test files share."""

import hypothesis
import pytest
import torch

from tests.helpers.hub_server import HubServer
from tests.helpers.milvus_server import running_server
from tests.helpers.properties import QUICK_EXAMPLES


# Property tests: the same few examples on every run, or `pytest --hypothesis-profile thorough` for more, drawn anew each time.
# A test that is slow for one example asks for less by `examples` of tests.helpers.properties.
COMMON = {"deadline": None, "suppress_health_check": list(hypothesis.HealthCheck)}
hypothesis.settings.register_profile("quick", derandomize=True, database=None, max_examples=QUICK_EXAMPLES, **COMMON)
hypothesis.settings.register_profile(
    "thorough", database=None, print_blob=True, max_examples=50 * QUICK_EXAMPLES, **COMMON
)
# Mutants are only to be noticed; a small example of what they do would take most of the time.
hypothesis.settings.register_profile(
    "unshrunk",
    hypothesis.settings.get_profile("quick"),
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    report_multiple_bugs=False,
)
hypothesis.settings.load_profile("quick")


@pytest.fixture
def hub_server(tmp_path):
    """A stand-in of the Hub; give client processes `env=hub_server.environment()`."""
    with HubServer(tmp_path / "hub") as server:
        yield server


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads that share busy cores wait for each other far longer than one takes alone."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def cache_of_precisions(tmp_path_factory):
    """Keep what tests measure of this processor out of the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mra.retrieval.precision.CACHE", tmp_path_factory.mktemp("precision") / "precision.json")
        yield


@pytest.fixture(scope="session")
def milvus_server(tmp_path_factory):
    """A real Milvus server, for tests marked `server`."""
    with running_server(tmp_path_factory.mktemp("milvus")) as server:
        yield server
