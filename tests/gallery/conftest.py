"""Fixtures of the tests of galleries."""

import contextlib
import uuid

import pytest

from mra.gallery import Gallery
from tests.helpers.galleries import encoder_of, save_tiny_model, write_pictures


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def other_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(params=["memory", "milvus", pytest.param("server", marks=pytest.mark.server)])
def open_new(request, model, tmp_path):
    """A function that opens a new gallery with the given settings."""
    if request.param == "server":
        server = request.getfixturevalue("milvus_server")
        name = f"test_{uuid.uuid4().hex}"
        options = {"uri": server.uri, "token": server.token, "collection": name, "files": tmp_path / "files"}
    else:
        options = {"uri": ":memory:" if request.param == "memory" else tmp_path / "gallery.db"}
    with contextlib.ExitStack() as opened:
        yield lambda **settings: opened.enter_context(Gallery(encoder=encoder_of(model), **options, **settings))


@pytest.fixture
def gallery(open_new):
    return open_new()


@pytest.fixture
def damaged(model, tmp_path):
    """A built gallery, and the folder of its records to damage."""
    write_pictures(tmp_path / "people", 4)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people", copy_images=True)
    return tmp_path / "g.db", tmp_path / "g.db" / "collections" / "people_000001"
