"""Removal, full disks and damage: what an open gallery remembers and what it leaves on the disk."""

import errno
import os
import shutil

import pytest

from mra.common.command_line import FullDiskError
from mra.gallery import Gallery
from mra.gallery.milvus import EmbeddedStore
from tests.helpers.galleries import contents, encoder_of, everything_on_disk, make_split, write_pictures


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_remove_leaves_nothing_behind(model, tmp_path):
    people = tmp_path / "people"
    keys = write_pictures(people, 9)
    gone = keys[4]
    place = tmp_path / "g.db"
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        gallery.build(people, copy_images=True, batch_size=3)
        record = next(r for r in gallery._state.store.records(embeddings=True) if r.key == gone)
        traces = {
            "key": gone.encode(),
            "content": record.content.encode(),
            "vector": record.embedding.tobytes(),
            "tokens": gallery.image_tokens(gone).astype("float16").tobytes(),
            "picture": (people / gone).read_bytes(),
        }
    before = everything_on_disk(place)
    assert [name for name, trace in traces.items() if trace not in before] == []
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert gallery.remove(keys=[gone]) == 1
        during = everything_on_disk(place)
        assert len(gallery) == 8
        assert gone not in {hit.key for hit in gallery.search("a man", top=20).hits}
    after = everything_on_disk(place)
    for data in (during, after):
        assert [name for name, trace in traces.items() if trace in data] == []
    assert keys[5].encode() in after
    assert (people / gone).exists()
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert gallery.verify().problems == [] and len(gallery) == 8


def test_remove_by_where_and_with_the_files(gallery, tmp_path, caplog):
    people = tmp_path / "people"
    keys = write_pictures(people, 6)
    gallery.build(people, [{"path": key, "camera": f"c{number % 2}"} for number, key in enumerate(keys)])
    assert gallery.remove(where='camera == "c1"', delete_files=True) == 3
    assert [key for key in keys if (people / key).exists()] == sorted(contents(gallery)) == keys[::2]
    assert gallery.remove(where='camera == "c1"') == 0
    shutil.copy(people / keys[0], people / "twin.jpg")
    gallery.build(people)
    with caplog.at_level("WARNING"):
        assert gallery.remove(keys=[keys[0]]) == 1
    assert "identical images stay under 1 other keys, such as twin.jpg" in caplog.text
    for options, message in (
        ({}, "exactly one of where and keys"),
        ({"where": "speed > 1"}, "not a field"),
        ({"keys": ["x"]}, "has the key 'x'"),
    ):
        with pytest.raises(ValueError, match=message):
            gallery.remove(**options)


def test_an_interrupted_removal_is_finished_by_the_next_process(model, tmp_path, monkeypatch):
    keys = write_pictures(tmp_path / "people", 4)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        vector = next(r for r in gallery._state.store.records(embeddings=True) if r.key == keys[0]).embedding.tobytes()

        def stop(*arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(gallery._state.store, "purge", stop)
        with pytest.raises(KeyboardInterrupt):
            gallery.remove(keys=[keys[0]])
    assert vector in everything_on_disk(tmp_path / "g.db")
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        assert len(gallery) == 3
    assert vector not in everything_on_disk(tmp_path / "g.db")


def test_a_removal_without_room_to_rewrite_the_index_leaves_the_gallery_searchable(model, tmp_path, caplog):
    people, place = tmp_path / "people", tmp_path / "g.db"
    keys = write_pictures(people, 4)
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        gallery.build(people)
        vector = next(r for r in gallery._state.store.records(embeddings=True) if r.key == keys[0]).embedding.tobytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EmbeddedStore, "purge", full_disk)
            with pytest.raises(FullDiskError, match=r"cannot be rewritten without the images .* the disk is full"):
                gallery.remove(keys=[keys[0]])
        assert keys[0] not in {hit.key for hit in gallery.search("a red coat").hits}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddedStore, "purge", full_disk)
        with Gallery(place, encoder=encoder_of(model)) as gallery:
            assert "cannot be rewritten" in caplog.text
            assert sorted(hit.key for hit in gallery.search("a red coat").hits) == sorted(keys[1:])
    assert vector in everything_on_disk(place)
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert gallery.verify().problems == [] and len(gallery) == 3
    assert vector not in everything_on_disk(place)


def test_a_rewriting_that_did_not_fit_can_be_repeated_in_the_same_process(model, tmp_path):
    keys = write_pictures(tmp_path / "people", 3)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gallery._state.store._client, "flush", full_disk)
            with pytest.raises(OSError, match="No space left"):
                gallery._state.store.purge()
        assert gallery.remove(keys=[keys[0]]) == 1
        assert gallery.verify().problems == [] and len(gallery) == 2


@pytest.mark.parametrize("write", ["write_info", "upsert", "flush"])
def test_a_full_disk_names_the_gallery_and_the_next_call_succeeds(model, tmp_path, write):
    people, place = tmp_path / "people", tmp_path / "g.db"
    keys = write_pictures(people, 4)
    with Gallery(place, encoder=encoder_of(model)) as gallery, pytest.MonkeyPatch.context() as patch:
        patch.setattr(EmbeddedStore, write, full_disk)
        with pytest.raises(FullDiskError, match=rf"{place} cannot be written: the disk is full"):
            gallery.build(people)
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        gallery.build(people)
        assert gallery.verify().problems == [] and len(gallery) == 4
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EmbeddedStore, "write_info", full_disk)
            for change in (
                lambda: gallery.remove(keys=keys[:1], delete_files=True),
                lambda: gallery.calibrate(make_split(), rerank=4),
            ):
                with pytest.raises(FullDiskError, match="what was there before is unchanged"):
                    change()
        assert (people / keys[0]).exists() and len(gallery) == 4 and gallery.calibration is None


def test_a_gallery_that_cannot_be_opened_on_a_full_disk_says_so(tmp_path, monkeypatch, capfd):
    """milvus-lite logs the reason and reports only that it failed."""
    monkeypatch.setattr("milvus_lite.adapter.grpc.server.start_server_in_thread", full_disk)
    (tmp_path / "g.db").mkdir()
    with pytest.raises(FullDiskError, match=r"g\.db cannot be written: the disk is full"):
        Gallery(tmp_path / "g.db")
    assert "Traceback" not in capfd.readouterr().err


def test_a_gallery_that_lost_one_half_of_itself_says_so(model, damaged):
    place, records = damaged
    for folder, message in (
        (records, "the index of its 4 images"),
        (records.with_name("people_info"), "the settings of its 4 images"),
    ):
        shutil.move(folder / "schema.json", place.parent)
        with pytest.raises(ValueError, match=f"has lost .*{message}"):
            Gallery(place, encoder=encoder_of(model))
        shutil.move(place.parent / "schema.json", folder)
