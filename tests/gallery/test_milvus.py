"""Milvus by address: what a client is asked for, with a stand-in of the client, since no server is here."""

import errno
import os
from pathlib import Path

import numpy as np
import pymilvus
import pytest

from mra.gallery import Gallery
from mra.gallery.connection import is_server
from mra.gallery.milvus import EmbeddedStore, MilvusStore
from mra.gallery.store import Record
from mra.gallery.where import RECORD_FIELDS, parse_where
from tests.helpers.galleries import encoder_of, write_pictures


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


ODD_NAMES = [
    'z".png',
    "z'.png",
    "z\\.jpg",
    "z\\n.png",
    'z\\".png',
    "z\n.png",
    "z\r.png",
    "z\t.png",
    "z\x01.png",
    "z\x7f.png",
    "z\u2028.png",
    "z%.png",
    "-z.png",
    "z{0}{}.png",
    'z" or key != "".png',
    " z .png",
    "z😀.png",
    "é" * 125 + ".png",
]


@pytest.mark.parametrize("page", [1, 1000])
def test_every_name_of_a_file_can_be_listed_found_and_removed(tmp_path, monkeypatch, page):
    """Whichever record ends a page: its key stands in the condition of the next."""
    monkeypatch.setattr("mra.gallery.milvus.RECORDS_PER_REQUEST", page)
    monkeypatch.setattr("mra.gallery.milvus.RECORDS_PER_PAGE", page)
    store = EmbeddedStore(tmp_path / "g.db", "people")
    store.create(2)
    store.upsert([Record(name, "0" * 64, "/x", "/", embedding=np.ones(2, np.float32)) for name in ODD_NAMES])
    assert sorted(record.key for record in store.records(embeddings=True)) == sorted(ODD_NAMES)
    assert sorted(record.key for record in store.records(keys=ODD_NAMES)) == sorted(ODD_NAMES)
    for left, name in reversed(list(enumerate(ODD_NAMES))):
        where = parse_where(f"key == {name!r}", RECORD_FIELDS)
        assert [record.key for record in store.records(where)] == [name]
        store.delete([name])
        assert store.count() == left
    store.close()


@pytest.mark.parametrize("damage", ["cut", "folder", "empty"])
@pytest.mark.parametrize("name", ["schema.json", "manifest.json", "*.parquet"])
def test_a_damaged_index_is_reported_in_one_sentence(model, damaged, name, damage):
    place, records = damaged
    (file,) = records.rglob(name)
    data = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    else:
        file.write_bytes(data[: len(data) // 2] if damage == "cut" else b"")
    if name == "manifest.json" and damage != "folder":
        with Gallery(place, encoder=encoder_of(model)) as gallery:
            assert gallery.verify().problems
        return
    with pytest.raises(ValueError, match=r"gallery .*g\.db cannot be read \(.*a file of its index is damaged"):
        Gallery(place, encoder=encoder_of(model))


@pytest.mark.parametrize("size", [0, 200])
def test_an_index_file_that_was_not_written_to_its_end_is_written_again(model, damaged, caplog, size):
    place, records = damaged
    (file,) = records.rglob("*.idx")
    whole = file.read_bytes()
    file.write_bytes(whole[:size])
    for _ in range(2):
        with Gallery(place, encoder=encoder_of(model)) as gallery:
            assert gallery.verify().problems == [] and len(gallery.search("a red coat").hits) == 4
    assert file.read_bytes() == whole
    assert caplog.text.count("had an index file that was not complete") == 1


def test_what_could_not_be_renamed_on_a_full_disk_is_removed(tmp_path, monkeypatch):
    replace = os.replace

    def refuse(source, target):
        if Path(target).name == "aliases.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    store = EmbeddedStore(tmp_path / "g.db", "people")
    with pytest.raises(ValueError, match="No space left on device"):
        store.create(2)
    assert list((tmp_path / "g.db").glob("*.tmp"))
    store.close()
    assert not list((tmp_path / "g.db").rglob("*.tmp"))


def test_a_gallery_whose_model_is_gone_is_named(model, damaged):
    place, _ = damaged
    store = EmbeddedStore(place, "people")
    store.write_info(store.read_info() | {"model": "no/such/model"})
    store.close()
    with Gallery(place) as gallery, pytest.raises(ValueError, match=r"gallery .*g\.db: its model cannot be loaded"):
        gallery.search("a red coat")


def test_an_index_without_its_alias_is_named_again(model, damaged, caplog):
    place, _ = damaged
    (place / "aliases.json").unlink()
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert len(gallery) == 4 and gallery.verify().problems == []
    assert "had lost the alias of its index: restored" in caplog.text


def test_folders_of_collections_that_a_kill_left_without_a_schema_are_removed(model, tmp_path):
    people, place = tmp_path / "people", tmp_path / "g.db"
    first, *_ = write_pictures(people, 3)
    (place / "collections" / "people_info").mkdir(parents=True)  # while it was created
    (place / "collections" / "people_000001").mkdir()
    (place / "collections" / "people_000001" / "schema.json.tmp").touch()
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        gallery.build(people)
    (place / "collections" / "people_000002").mkdir()
    (dropped := place / "collections" / "people_000000" / "partitions").mkdir(parents=True)
    (dropped / "data.parquet").write_bytes(b"of removed people")
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert gallery.remove(keys=[first]) == 1
        assert gallery.verify().problems == [] and len(gallery) == 2
    assert {path.name for path in (place / "collections").iterdir()} == {"people_000002", "people_info"}
