"""Removal, full disks and damage: what an open gallery remembers and what it leaves on the disk."""

import dataclasses
import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mra.common.command_line import FullDiskError
from mra.gallery import Gallery
from mra.gallery.milvus import EmbeddedStore
from mra.gallery.place import Place
from mra.gallery.sources import Source, content_hash
from mra.gallery.state import GalleryState
from mra.gallery.store import MemoryStore, Record
from mra.gallery.types import Calibration
from mra.gallery.where import parse_where
from tests.helpers.galleries import contents, encoder_of, everything_on_disk, make_split, write_pictures


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupted(*arguments):
    raise KeyboardInterrupt


def broken(*arguments):
    raise RuntimeError("the engine is gone")


# ---------------------------------------------------------------- in memory, without a model


SHAPE = (1, 2, 3)
ENCODER = SimpleNamespace(name="org/model", fingerprint="f" * 64, embedding_dim=4, token_shape=SHAPE)
OTHER = SimpleNamespace(name="org/other", fingerprint="0" * 64, embedding_dim=8, token_shape=(1, 2, 5))


class Disk:
    """A store that outlives the process that opened it, and the calls that change it."""

    def __init__(self, files: Path) -> None:
        self.files, self.store, self.calls = files, MemoryStore(), []
        for name in ("write_info", "create", "delete", "purge"):
            setattr(self.store, name, self.recorded(name, getattr(self.store, name)))

    def recorded(self, name, method):
        def call(*arguments):
            self.calls.append(name)
            return method(*arguments)

        return call

    def open(
        self,
        model=None,
        encoder=ENCODER,
        token_cache=10_000,
        token_dtype=None,
        backend="torch",
        device="cpu",
        dtype=None,
        **place,
    ) -> GalleryState:
        self.place = Place(":memory:", files=self.files, **place)
        self.place.store = self.store
        return GalleryState(
            self.place,
            model=model,
            encoder=encoder,
            backend=backend,
            device=device,
            dtype=dtype,
            token_cache=token_cache,
            token_dtype=token_dtype,
            matched_views=1,
        )


@pytest.fixture
def disk(tmp_path):
    return Disk(tmp_path / "files")


@pytest.fixture
def people(disk, tmp_path):
    """An open gallery of five images: a, b and c of the user, c like a; copies of d and e; tokens of all."""
    state = disk.open()
    (tmp_path / "people").mkdir()
    state.remember(ENCODER, Source("people", tmp_path / "people", []), {"speed": "number"})
    records = []
    for number, (key, data) in enumerate({"c": b"A", "b": b"B", "a": b"A", "d": b"D", "e": b"E"}.items()):
        if key in "de":
            path = f"images/{key}"
            (disk.files / "images").mkdir(parents=True, exist_ok=True)
            (disk.files / path).write_bytes(data)
        else:
            path = str(tmp_path / "people" / f"{key}.png")
            Path(path).write_bytes(data)
        metadata = {"speed": number} if number else {}
        embedding = np.full(4, number, np.float32)
        records.append(Record(key, content_hash(data), path, "people", "", "", metadata, embedding))
        state.tokens.write(content_hash(data), np.full(SHAPE, number, np.float32))
    disk.store.upsert(records)
    return state


def on_disk(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.rglob("*") if path.is_file())


def kept(disk, *texts: bytes) -> bool:
    return on_disk(disk.files / "tokens") == sorted(map(content_hash, texts))


def test_settings_are_those_of_the_model_and_of_every_source(disk, tmp_path):
    state = disk.open()
    assert (state.info, state.exists, state.fields) == ({}, False, {"key": "text", "camera": "text", "time": "time"})
    assert state.roots == [disk.files / "images"] and state.calibration is None
    roots = [tmp_path / name for name in "zmaxk"]
    for root in (*roots[:-1], None):
        state.remember(ENCODER, Source("some", root, []), {})
    state.remember(ENCODER, Source("some", roots[-1], []), {"speed": "number"})
    expected = {
        "format": 2,
        "model": "org/model",
        "fingerprint": "f" * 64,
        "embedding_dim": 4,
        "token_shape": [1, 2, 3],
        "token_dtype": "float16",
        "roots": sorted(map(str, roots)),
        "fields": {"speed": "number"},
    }
    assert state.info == disk.store.read_info() == expected
    assert disk.calls == ["write_info", "create", *["write_info"] * 4]
    again = disk.open()
    again.remember(ENCODER, Source("some", tmp_path / "z", []), {"speed": "number"})
    assert again.info == expected and len(disk.calls) == 6  # nothing that has not changed is written
    assert again.roots == [*sorted(roots), disk.files / "images"]
    assert again.fields["speed"] == "number" and again.exists
    assert (again.tokens.shape, again.tokens.dtype) == (SHAPE, np.float16)


def test_the_folder_of_a_model_is_saved_as_it_is_found_from_anywhere(disk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    state = disk.open(token_dtype="float32")
    state.remember(SimpleNamespace(**vars(ENCODER) | {"name": "model"}), Source("some", None, []), {})
    assert state.info["model"] == str(tmp_path / "model")
    assert state.info["token_dtype"] == "float32" and state.tokens.dtype == np.float32


def test_a_build_killed_between_the_settings_and_the_index_can_be_repeated(disk, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        state = disk.open()
        patch.setattr(disk.store, "create", interrupted)
        state.remember(ENCODER, Source("some", None, []), {})
    assert disk.store.read_info() and not disk.store.exists()
    state = disk.open()
    assert not state.exists
    with pytest.raises(ValueError, match="there is no gallery"):
        state.parts()
    state.remember(ENCODER, Source("some", None, []), {})
    assert state.exists and disk.calls == ["write_info", "create"]


def test_one_format_is_read(disk):
    for found in (1, 3, None):
        disk.store.write_info({"format": found})
        with pytest.raises(ValueError, match=f"gallery :memory: has format {found}, expected 2: build it again"):
            disk.open()
    disk.store.write_info({"format": 2})
    assert disk.open().info == {"format": 2}


def test_a_gallery_that_cannot_be_opened_is_released(disk):
    disk.store.write_info({"format": 1})
    with pytest.raises(ValueError, match="format"):
        disk.open()
    assert disk.place.store is None


def test_a_lost_half_is_noticed_and_an_empty_one_is_not(people, disk):
    disk.store.write_info({})
    with pytest.raises(ValueError, match=r"has lost the settings of its 5 images, the model included: .*damaged"):
        disk.open()
    disk.store.delete([*"abcde"])
    assert disk.open().info == {}
    disk.store.exists = lambda: False
    disk.store.write_info({"format": 2, "images": 1234})
    with pytest.raises(ValueError, match="has lost the index of its 1,234 images: a file of it is damaged"):
        disk.open()
    disk.store.write_info({"format": 2, "images": 0})
    assert not disk.open().exists


def test_closing_forgets_the_gallery(people, disk):
    old = people.tokens
    people.close()
    assert people.place.store is None and people.info == {}
    people.remember(OTHER, Source("some", None, []), {})
    assert people.tokens is not old and people.tokens.shape == (1, 2, 5)
    people.close()
    with pytest.raises(AssertionError, match="call `require` or `remember` first"):
        people.store  # noqa: B018


def test_a_model_must_be_the_one_that_built_the_gallery(people, disk):
    assert people.encoder is ENCODER and disk.open().encoder is ENCODER
    wrong = disk.open(encoder=OTHER)
    message = r"was built with org/model \(fingerprint f{12}\), not with org/other \(fingerprint 0{12}\)"
    for use in (lambda: wrong.encoder, wrong.parts):
        with pytest.raises(ValueError, match=message):
            use()


@pytest.mark.parametrize(
    "backend, device, dtype, has_driver, has_export, expected",
    [
        ("torch", "cpu", None, False, True, "torch"),
        ("onnx", "cpu", None, False, True, "onnx"),
        ("onnx", None, None, True, True, "onnx"),
        (
            "onnx",
            "cpu",
            None,
            False,
            False,
            r"no ONNX export \(onnx\.json is neither in it nor in its folder onnx\): make one with `mra export --model org",
        ),
        ("auto", "cpu", None, False, True, "onnx"),
        ("auto", "cpu", None, True, True, "onnx"),
        ("auto", None, None, False, True, "onnx"),
        ("auto", None, None, True, True, "torch"),
        ("auto", "cuda", None, False, True, "torch"),
        ("auto", "cpu", "auto", False, True, "torch"),
        ("auto", "cpu", None, False, False, "torch"),
    ],
)
def test_which_runtime_a_model_gets(
    people, disk, tmp_path, monkeypatch, backend, device, dtype, has_driver, has_export, expected
):
    export, driver = tmp_path / "export", tmp_path / "driver"
    if has_driver:
        driver.touch()
    monkeypatch.setattr("mra.gallery.state._GPU_DRIVERS", (tmp_path / "none", driver))
    monkeypatch.setattr("mra.retrieval.onnx_encoder.find_export", lambda model: export if has_export else None)
    monkeypatch.setattr(
        "mra.retrieval.onnx_encoder.read_description", lambda folder: {"fingerprint": ENCODER.fingerprint}
    )
    runtimes = {"torch": "mra.retrieval.encoders.TorchEncoder", "onnx": "mra.retrieval.onnx_encoder.OnnxEncoder"}
    for name, place in runtimes.items():
        made = SimpleNamespace(**vars(ENCODER), runtime=name)
        monkeypatch.setattr(place, lambda *arguments, made=made: made)
    state = disk.open(encoder=None, model="org/model", backend=backend, device=device, dtype=dtype)
    if expected in runtimes:
        assert state.encoder.runtime == expected
    else:
        with pytest.raises(ValueError, match=f"model org/model has {expected}"):
            state.encoder  # noqa: B018


def test_an_export_of_other_weights_is_not_used(people, disk, tmp_path, monkeypatch):
    monkeypatch.setattr("mra.retrieval.onnx_encoder.find_export", lambda model: tmp_path)
    monkeypatch.setattr(
        "mra.retrieval.onnx_encoder.read_description", lambda folder: {"fingerprint": OTHER.fingerprint}
    )
    monkeypatch.setattr("mra.retrieval.encoders.TorchEncoder", lambda *arguments: ENCODER)
    assert disk.open(encoder=None, backend="auto").encoder is ENCODER


def test_a_model_is_loaded_by_its_name_at_first_use(people, disk, monkeypatch):
    loaded = []

    def load(*arguments):
        loaded.append(arguments)
        return ENCODER

    monkeypatch.setattr("mra.retrieval.encoders.TorchEncoder", load)
    state = disk.open(encoder=None)
    assert loaded == []
    assert state.encoder is ENCODER and state.encoder is ENCODER and state.parts().encoder is ENCODER
    assert disk.open(encoder=None, model="org/named").encoder is ENCODER
    assert [name for name, *_ in loaded] == ["org/model", "org/named"]
    new = Disk(disk.files).open(encoder=None)
    with pytest.raises(ValueError, match="gallery :memory: is new: pass the model to build it with"):
        new.encoder  # noqa: B018


def test_what_is_not_there_is_said_with_the_command_that_builds_it(disk):
    with pytest.raises(ValueError, match=r"there is no gallery at :memory:: .*--gallery :memory: --images"):
        disk.open().require()
    message = r"there is no gallery cars at :memory:: .*--gallery :memory: --collection cars --images"
    with pytest.raises(ValueError, match=message):
        disk.open(collection="cars").find([])


def test_records_are_found_in_the_order_of_their_keys(people):
    assert [record.key for record in people.find(["e", "a", "e", "b"])] == ["e", "a", "b"]
    message = r"no image of the gallery has the key 'x' \(2 of 3 keys are unknown\)"
    with pytest.raises(ValueError, match=message):
        people.find(["a", "x", "y", "x"])
    parts = people.parts()
    assert (parts.store, parts.files, parts.tokens, parts.encoder, parts.lock) == (
        people.store, people.files, people.tokens, ENCODER, people.lock
    )  # fmt: skip
    assert parts.roots == people.roots


def test_an_empty_condition_is_none(people):
    assert people.parse(None) is None and people.parse("") is None and people.parse(" \n") is None
    assert people.parse(" speed > 1 ") == parse_where("speed > 1", {"speed": "number"})


def test_a_calibration_is_read_as_it_was_written(people, disk):
    calibration = Calibration(0.5, 0.1, 0.2, 1.0, 128, 7, "val", [(0.0, 1.0, 0.0), (1.0, 0.0, 1.0)])
    saved = dataclasses.asdict(calibration) | {"curve": [list(point) for point in calibration.curve]}  # as from JSON
    people.write_info(calibration=saved)
    assert people.calibration == disk.open().calibration == calibration
    assert disk.store.read_info()["fingerprint"] == people.info["fingerprint"] == "f" * 64


def test_sweeping_deletes_what_no_record_needs(people, disk):
    people.tokens.write(content_hash(b"gone"), np.zeros(SHAPE, np.float32))
    (disk.files / "images" / "x").write_bytes(b"gone")
    people.sweep()
    assert kept(disk, b"A", b"B", b"D", b"E") and on_disk(disk.files / "images") == ["d", "e"]
    people.store.delete(["b", "c", "d"])
    people.sweep()
    assert kept(disk, b"A", b"E") and on_disk(disk.files / "images") == ["e"]


def test_a_removal_is_announced_finished_and_leaves_the_files_of_the_user(people, disk, tmp_path, monkeypatch, caplog):
    disk.calls.clear()
    announced, delete = [], disk.store.delete
    monkeypatch.setattr(disk.store, "delete", lambda keys: (announced.append(disk.store.read_info()), delete(keys))[1])
    with caplog.at_level("WARNING"):
        people.remove(people.find(["b", "d"]), delete_files=False, keys=["b", "d"])
    assert (announced[0]["is_removing"], announced[0]["images"]) == (True, 3)
    assert disk.calls == ["write_info", "delete", "purge", "write_info"] and caplog.text == ""
    assert (people.info["is_removing"], people.info["images"]) == (False, 3) and disk.store.read_info() == people.info
    assert [record.key for record in disk.store.records()] == ["c", "a", "e"]
    assert kept(disk, b"A", b"E") and on_disk(disk.files / "images") == ["e"]
    assert on_disk(tmp_path / "people") == ["a", "b", "c"]
    disk.calls.clear()
    assert disk.open().exists and disk.calls == []  # nothing is left to finish


def test_a_removal_with_the_files_spares_those_that_took_the_name(people, disk, tmp_path):
    (tmp_path / "people" / "a.png").write_bytes(b"someone else")
    (tmp_path / "people" / "c.png").unlink()
    people.remove(people.find(["a", "b", "c", "d"]), delete_files=True, keys=["a", "b", "c", "d"])
    assert on_disk(tmp_path / "people") == ["a"] and on_disk(disk.files / "images") == ["e"]


def test_identical_images_that_stay_are_named(people, caplog):
    record = people.find(["b"])[0]
    people.store.upsert(
        [dataclasses.replace(record, key=key, embedding=np.zeros(4, np.float32)) for key in ("z", "y")]
    )
    with caplog.at_level("WARNING"):
        people.remove([record], delete_files=False, keys=[record.key])
    assert "identical images stay under 2 other keys, such as y: remove them too" in caplog.text


@pytest.mark.parametrize("step", ["purge", "write_info"])
def test_a_removal_without_room_is_finished_by_the_next_opening(people, disk, monkeypatch, caplog, step):
    method, calls = getattr(disk.store, step), []

    def fill(*arguments):
        calls.append(1)
        return full_disk() if step == "purge" or len(calls) > 1 else method(*arguments)

    monkeypatch.setattr(disk.store, step, fill)
    with pytest.raises(FullDiskError, match=r"cannot be rewritten .*the disk is full \(No space left on device\)"):
        people.remove(people.find(["b"]), delete_files=False, keys=["b"])
    with caplog.at_level("WARNING"):
        state = disk.open()
    assert "cannot be rewritten" in caplog.text and state.info["is_removing"] and len(state.find("acde")) == 4
    monkeypatch.setattr(disk.store, step, method)
    caplog.clear()
    state = disk.open()
    assert state.info["is_removing"] is False and disk.store.read_info()["is_removing"] is False and caplog.text == ""


def test_an_error_of_a_removal_that_is_not_a_full_disk_is_not_hidden(people, disk, monkeypatch):
    monkeypatch.setattr(disk.store, "purge", broken)
    with pytest.raises(RuntimeError, match="the engine is gone"):
        people.remove(people.find(["b"]), delete_files=False, keys=["b"])
    with pytest.raises(RuntimeError, match="the engine is gone"):
        disk.open()


# ---------------------------------------------------------------- on the disk, with a model


def interrupt(*arguments, **options):
    raise KeyboardInterrupt


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

        monkeypatch.setattr(gallery._state.store, "purge", interrupt)
        with pytest.raises(KeyboardInterrupt):
            gallery.remove(keys=[keys[0]])
    assert vector in everything_on_disk(tmp_path / "g.db")
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        assert len(gallery) == 3
    assert vector not in everything_on_disk(tmp_path / "g.db")


@pytest.mark.parametrize("deleted", [1, 2])
def test_an_interrupted_removal_can_be_repeated(model, tmp_path, caplog, deleted):
    first, second, other, *_ = write_pictures(tmp_path / "people", 4)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        store = gallery._state.store

        def delete_some(keys):
            EmbeddedStore.delete(store, keys[:deleted])
            interrupt()

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(store, "delete", delete_some)
            gallery.remove(keys=[first, second])
        assert gallery.remove(keys=[second, first]) == 2 - deleted
        assert f"already removed: {deleted} of 2 images" in caplog.text
        assert not gallery._state.info["is_removing"]
        with pytest.raises(ValueError, match="1 of 1 keys are unknown"):
            gallery.remove(keys=[first])
        with pytest.raises(ValueError, match="1 of 2 keys are unknown"):
            gallery.remove(keys=[first, other])
        assert len(gallery) == 2 and gallery.verify().problems == []


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
