"""Milvus by address: what a client is asked for, with a stand-in of the client, since no server is here."""

import pymilvus
import pytest

from mra.gallery.connection import is_server
from mra.gallery.milvus import EmbeddedStore, MilvusStore


class Client:
    """Remembers how it was made and has no collections."""

    made: list = []  # noqa: RUF012

    def __init__(self, uri, token):
        self.made.append((uri, token))

    def has_collection(self, name):
        return False

    def close(self):
        pass


def test_address_and_token_reach_the_client(monkeypatch):
    monkeypatch.setattr(pymilvus, "MilvusClient", Client)
    store = MilvusStore("http://host:19530", "people", "root:secret")
    assert Client.made[-1] == ("http://host:19530", "root:secret")
    assert not store.exists() and store.read_info() == {}


def test_a_server_that_is_not_there_is_said_without_the_token(monkeypatch):
    def refuse(uri, token):
        raise pymilvus.MilvusException(message="connection refused")

    monkeypatch.setattr(pymilvus, "MilvusClient", refuse)
    with pytest.raises(
        ValueError, match=r"gallery http://host:19530 cannot be opened \(connection refused\)"
    ) as caught:
        MilvusStore("http://host:19530", "people", "secret")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "options, message", [({"index": "x"}, "index must be"), ({"collection": "a b"}, "collection must")]
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        MilvusStore("http://host:19530", **{"collection": "people"} | options)


def test_what_counts_as_a_server():
    assert is_server("https://host:443") and is_server("http://host:19530")
    assert not is_server("gallery.db") and not is_server("/photos/gallery.db")


def test_a_gallery_that_cannot_be_read_says_why(tmp_path, monkeypatch):
    """And lets go of its folder, which another store of this process may have open."""

    def fail(*_, **__):
        raise RuntimeError("segment 7 is cut off")

    store = EmbeddedStore(tmp_path / "g.db", "people")
    with monkeypatch.context() as patched:
        patched.setattr(pymilvus.MilvusClient, "has_collection", fail)
        with pytest.raises(ValueError, match=r"g\.db cannot be opened \(segment 7 is cut off\)"):
            EmbeddedStore(tmp_path / "g.db", "people")
        assert EmbeddedStore._open_folders[str(tmp_path / "g.db")] == 1
    assert not store.exists()
    store.close()
    EmbeddedStore(tmp_path / "g.db", "people").close()
