"""A gallery from Python: what is encoded when, ranks as evaluation gives them, removal for good, and who may open it."""

import dataclasses
import errno
import io
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps

from mra.common.command_line import FullDiskError
from mra.gallery import Gallery
from mra.gallery.metadata import read_metadata
from mra.gallery.milvus import EmbeddedStore
from mra.gallery.sources import open_source
from mra.gallery.token_cache import HEADER_BYTES
from mra.retrieval import RetrievalChoice, encode_images, evaluate_retrieval
from mra.retrieval.encoders import TorchEncoder
from tests.helpers.galleries import draw_picture, encoder_of, save_tiny_model, write_pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def other_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("other"), seed=1)


@pytest.fixture(params=["memory", "milvus", pytest.param("server", marks=pytest.mark.server)])
def gallery(request, model, tmp_path):
    if request.param == "server":
        server = request.getfixturevalue("milvus_server")
        name = f"test_{uuid.uuid4().hex}"
        options = {"uri": server.uri, "token": server.token, "collection": name, "files": tmp_path / "files"}
    else:
        options = {"uri": ":memory:" if request.param == "memory" else tmp_path / "gallery.db"}
    with Gallery(encoder=encoder_of(model), **options) as gallery:
        yield gallery


def contents(gallery) -> dict:
    """Everything that the records hold."""
    return {
        record.key: (
            record.content,
            record.path,
            record.camera,
            record.time,
            record.metadata,
            record.embedding.tobytes(),
        )
        for record in gallery._state.store.records(embeddings=True)
    }


# ---------------------------------------------------------------- indexing


def test_only_what_is_new_or_changed_is_encoded(gallery, tmp_path):
    keys = write_pictures(tmp_path / "people", 9)
    first = gallery.build(tmp_path / "people", batch_size=4)
    assert (first.added, first.encoded, first.skipped, len(gallery)) == (9, 9, [], 9)
    write_pictures(tmp_path / "people", 3, first=9)
    draw_picture(99).save(tmp_path / "people" / keys[0])
    again = gallery.build(tmp_path / "people", batch_size=4)
    assert (again.added, again.changed, again.unchanged, again.encoded) == (3, 1, 8, 4)
    assert gallery.build(tmp_path / "people").encoded == 0
    assert len(gallery) == 12
    assert gallery.verify().problems == []


def test_embeddings_are_those_of_evaluation(gallery, model, tmp_path):
    keys = write_pictures(tmp_path / "people", 8)
    gallery.build(tmp_path / "people", batch_size=8)
    encoder = encoder_of(model)
    images = [Image.open(tmp_path / "people" / key) for key in keys]
    expected = encode_images(encoder.model, encoder.processor, images, batch_size=8)
    found = {record.key: record.embedding for record in gallery._state.store.records(embeddings=True)}
    for key, embedding in zip(keys, expected.embeds, strict=True):
        torch.testing.assert_close(torch.tensor(found[key]), embedding, rtol=0, atol=1e-6)


def test_unreadable_images_are_reported_and_skipped(gallery, tmp_path):
    people = tmp_path / "people"
    keys = write_pictures(people, 4)
    (people / "empty.jpg").write_bytes(b"")
    (people / "letter.png").write_text("no picture")
    data = (people / keys[0]).read_bytes()
    whole = io.BytesIO()
    draw_picture(5, (200, 200)).save(whole, "png")
    (people / "cut.png").write_bytes(whole.getvalue()[:300])
    (people / "notes.txt").write_text("not meant as a picture")
    (people / ".hidden.jpg").write_bytes(data)
    (tmp_path / "outside.jpg").write_bytes(data)
    (people / "link.jpg").symlink_to(tmp_path / "outside.jpg")
    report = gallery.build(people)
    assert report.added == 4
    reasons = {skipped.key: skipped.reason for skipped in report.skipped}
    assert sorted(reasons) == ["cut.png", "empty.jpg", "letter.png", "link.jpg"]
    assert reasons["empty.jpg"] == "the file is empty"
    assert reasons["letter.png"] == "not an image that Pillow can read"
    assert reasons["cut.png"].startswith("the image is damaged")
    assert "outside the folder" in reasons["link.jpg"]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_whatever_their_exif_says(model, tmp_path, orientation):
    upright = draw_picture(3, (40, 90))
    undo = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # what exif_transpose will undo
    stored = upright if undo is None else upright.transpose(Image.Transpose(undo))
    exif = Image.Exif()
    exif[0x0112] = orientation
    (tmp_path / "people").mkdir()
    stored.save(tmp_path / "people" / "turned.png", exif=exif)
    assert ImageOps.exif_transpose(Image.open(tmp_path / "people" / "turned.png")).tobytes() == upright.tobytes()
    with Gallery(":memory:", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        assert gallery.image("turned.png").tobytes() == upright.tobytes()


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(model, tmp_path, mode):
    people = tmp_path / "people"
    people.mkdir()
    if mode == "I;16":
        Image.fromarray((np.arange(64 * 32, dtype=np.uint16) * 30).reshape(64, 32)).save(people / "x.png")
    else:
        draw_picture(1).convert(mode).save(people / ("x.tif" if mode == "CMYK" else "x.png"))
    with Gallery(":memory:", encoder=encoder_of(model)) as gallery:
        assert gallery.build(people).added == 1
        image = gallery.image(next(iter(contents(gallery))))
        assert image.mode == "RGB"
        assert len(set(image.convert("L").tobytes())) > 1  # not all of it clipped to one grey


def test_equal_and_renamed_pictures_are_encoded_once(gallery, tmp_path):
    people = tmp_path / "people"
    keys = write_pictures(people, 4)
    shutil.copy(people / keys[0], people / "twin.jpg")
    report = gallery.build(people)
    assert (report.added, report.encoded) == (5, 4)
    (people / keys[1]).rename(people / "renamed.png")
    report = gallery.build(people)
    assert (report.added, report.encoded, report.missing) == (1, 0, [keys[1]])
    assert gallery.build(people, prune=True).removed == 1
    assert sorted(contents(gallery)) == sorted([*(key for key in keys if key != keys[1]), "renamed.png", "twin.jpg"])


def test_two_pictures_that_change_places_are_both_right(gallery, tmp_path):
    people = tmp_path / "people"
    people.mkdir()
    for number, name in enumerate("ab"):
        draw_picture(number).save(people / f"{name}.png")
    gallery.build(people)
    before = contents(gallery)
    (people / "a.png").rename(people / "c.tmp")
    (people / "b.png").rename(people / "a.png")
    (people / "c.tmp").rename(people / "b.png")
    assert gallery.build(people).changed == 2
    after = contents(gallery)
    assert (after["a.png"][0], after["a.png"][-1]) == (before["b.png"][0], before["b.png"][-1])
    assert (after["b.png"][0], after["b.png"][-1]) == (before["a.png"][0], before["a.png"][-1])


def test_a_moved_folder_is_no_conflict_but_two_with_equal_names_are(gallery, tmp_path):
    keys = write_pictures(tmp_path / "one", 3)
    write_pictures(tmp_path / "two", 3)
    draw_picture(77).save(tmp_path / "two" / keys[0])
    gallery.build(tmp_path / "one")
    with pytest.raises(ValueError, match=r"belong to other images of .*one in this gallery: give a prefix"):
        gallery.add(tmp_path / "two")
    assert gallery.add(tmp_path / "two", prefix="two/").added == 3
    (tmp_path / "one").rename(tmp_path / "moved")
    report = gallery.build(tmp_path / "moved")
    assert (report.unchanged, report.encoded, report.relabelled) == (3, 0, 3)
    assert gallery.search("a man", top=9).hits[0].path.exists()


def test_a_list_and_a_data_set(gallery, tmp_path):
    keys = write_pictures(tmp_path / "people", 3)
    paths = [tmp_path / "people" / key for key in keys]
    assert gallery.build(paths).added == 3
    dataset = datasets.Dataset.from_dict(
        {"image": [draw_picture(50), draw_picture(51)], "camera": ["c1", None], "person": [7, 8]},
        features=datasets.Features(
            {"image": datasets.Image(), "camera": datasets.Value("string"), "person": datasets.Value("int64")}
        ),
    )
    assert gallery.add(dataset, prefix="set/").added == 2
    (hit,) = gallery.search("a man", where="person == 7").hits
    assert (hit.key, hit.camera, hit.metadata) == ("set/000000", "c1", {"person": 7})
    assert gallery.image("set/000000").tobytes() == draw_picture(50).tobytes()
    assert hit.path.is_relative_to(gallery.roots[-1])
    assert gallery.add(dataset, prefix="set/").unchanged == 2


def test_metadata_of_a_csv_file(gallery, tmp_path):
    people = tmp_path / "people"
    keys = write_pictures(people, 4)
    table = tmp_path / "people.csv"
    table.write_text(
        "path,camera,time,speed,note\n"
        f"{keys[0]},c1,2026-01-31 08:15,1.5,by the gate\n{keys[1]},c2,,3,\n"
        f"{people / keys[2]},c1,2026-02-01,,007\nno.jpg,c9,,,\n"
    )
    report = gallery.build(people, table)
    assert report.unmatched == ["no.jpg"]
    assert gallery.fields == {"key": "text", "camera": "text", "time": "time", "speed": "number", "note": "text"}
    hits = {hit.key: hit for hit in gallery.search("a man").hits}
    assert (hits[keys[0]].camera, hits[keys[0]].time) == ("c1", "2026-01-31T08:15:00")
    assert hits[keys[0]].metadata == {"speed": 1.5, "note": "by the gate"}
    assert hits[keys[2]].metadata == {"note": "007"}
    assert (hits[keys[3]].camera, hits[keys[3]].time, hits[keys[3]].metadata) == (None, None, {})
    wanted = gallery.search("a man", where='camera == "c1" and time > "2026-01-31T12:00"').hits
    assert [hit.key for hit in wanted] == [keys[2]]
    table.write_text(f"path,camera\n{keys[0]},c5\n")
    report = gallery.build(people, table)
    assert (report.relabelled, report.encoded) == (1, 0)
    assert {hit.key for hit in gallery.search("a man", where='camera == "c5"').hits} == {keys[0]}
    assert gallery.stats().cameras == {"": 1, "c1": 1, "c2": 1, "c5": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,note\n0.png,a\n1.png,caf\xe9\n", "line 3: byte 0xe9 is not UTF-8: save the file as UTF-8"),
        (b"path,caf\xe9\n0.png,a\n", "line 1: byte 0xe9"),
        ("path,note\n0.png,a\n".encode("utf-16"), "byte 0xff is not UTF-8: save the file as UTF-8"),
        (b"path,speed\n0.png,1\n1.png,1e400\n", "row 3: speed must be a finite number, got '1e400'"),
        (b"path,note\n0.png,a\n0.png,b\n", "row 3: row 2 says something else of the same image '0.png'"),
        (b"path,note,\n0.png,a,b\n", "a column cannot be called ''"),
        (b"path,note,note\n0.png,a,b\n", "has two columns 'note'"),
        (
            b"path,time\n0.png,9999-12-31T23:59:59-23:59\n",
            "row 2: time expected a time that lies in the years 1 to 9999",
        ),
        (b"path,note\n2.png,a\n", "row 2: path '2.png' names the images '2.png' and 'sub/2.png'"),
    ],
)
def test_metadata_that_would_be_taken_wrongly_is_refused(tmp_path, content, message):
    for name in ("0.png", "1.png", "2.png", "sub/2.png", "cam_a/3.png"):
        path = tmp_path / "people" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(0).save(path)
    table = tmp_path / "people/sub/people.csv"
    table.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_metadata(str(table), open_source(tmp_path / "people"), {})


def test_metadata_of_windows_and_of_pandas(tmp_path):
    for name in ("0.png", "cam_a/3.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        draw_picture(0).save(path)
    rows = [{"path": "cam_a\\3.png", "speed": 1.5}, {"path": "0.png", "speed": float("nan")}]
    labels = read_metadata(rows, open_source(tmp_path), {})
    assert labels.kinds == {"speed": "number"} and labels.unmatched == []
    assert {key: label["metadata"] for key, label in labels.of_key.items()} == {
        "cam_a/3.png": {"speed": 1.5},
        "0.png": {},
    }


# ---------------------------------------------------------------- searching


def make_split(count: int = 12) -> datasets.Dataset:
    captions = [
        f"a {colour} coat and {shoes} shoes" for colour in ("red", "blue", "green") for shoes in ("white", "black")
    ]
    return datasets.Dataset.from_dict(
        {
            "image": [draw_picture(number) for number in range(count)],
            "captions": [[captions[number % len(captions)]] for number in range(count)],
            "image_id": [number // 2 for number in range(count)],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "captions": datasets.List(datasets.Value("string")),
                "image_id": datasets.Value("int64"),
            }
        ),
    )


@pytest.mark.parametrize("rerank", [0, 5, 12])
def test_a_search_ranks_as_evaluation_does(gallery, model, rerank):
    split, encoder = make_split(), encoder_of(model)
    expected = evaluate_retrieval(encoder.model, encoder.processor, split, rerank_k=rerank, score_fusion="posterior")
    gallery.build(split)
    for row in range(6):
        hits = gallery.search(split[row]["captions"][0], top=12, rerank=rerank).hits
        order = expected.scores[row].argsort(descending=True, stable=True).tolist()
        assert [int(hit.key) for hit in hits] == order
        similarity = torch.tensor([hit.similarity for hit in hits])
        torch.testing.assert_close(similarity, expected.similarity[row, order], rtol=0, atol=1e-6)
        if rerank:
            matched = dict(zip(expected.top_indices[row].tolist(), expected.match_scores[:, row].T, strict=True))
            for hit in hits:
                log_odds = matched.get(int(hit.key))
                probability = None if log_odds is None else log_odds.sigmoid().mean().item()
                assert hit.score == (None if probability is None else pytest.approx(probability, abs=1e-5))


def test_an_image_finds_itself_and_words_move_the_answer(gallery, tmp_path):
    keys = write_pictures(tmp_path / "people", 8)
    gallery.build(tmp_path / "people")
    result = gallery.search(image=tmp_path / "people" / keys[3])
    assert (result.hits[0].key, result.hits[0].score, result.reranked) == (keys[3], None, 0)
    assert result.likely_in_gallery is None
    both = gallery.search("a red coat", image=gallery.image(keys[3]), top=8)
    alone = gallery.search("a red coat", top=8)
    of_image = {hit.key: hit.similarity for hit in result.hits}
    of_text = {hit.key: hit.similarity for hit in alone.hits}
    for hit in both.hits:
        assert hit.similarity == pytest.approx((of_image[hit.key] + of_text[hit.key]) / 2, abs=1e-5)
    assert both.reranked == 8 and both.hits[0].score is not None


def test_scores_do_not_depend_on_the_cache(model, tmp_path):
    keys = write_pictures(tmp_path / "people", 10)
    scores = []
    for token_cache in (2**30, 0, 3 * (HEADER_BYTES + 4 * 2 * 3 * 64)):
        with Gallery(tmp_path / f"{token_cache}.db", encoder=encoder_of(model), token_cache=token_cache) as gallery:
            gallery.build(tmp_path / "people", batch_size=5)
            for _ in range(2):
                result = gallery.search("a red coat")
                scores.append({hit.key: hit.score for hit in result.hits})
            assert gallery.image_tokens(keys[0]).shape == (2, *gallery.encoder.token_shape[1:])
        assert (result.tokens_encoded == 0) == (token_cache == 2**30)
    for other in scores[1:]:
        assert other == {key: pytest.approx(score, abs=1e-5) for key, score in scores[0].items()}


def test_tokens_are_encoded_anew_where_the_cache_is_gone(model, tmp_path):
    write_pictures(tmp_path / "people", 5)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        first = gallery.search("a red coat")
    shutil.rmtree(tmp_path / "g.db" / "files" / "people" / "tokens")
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        assert gallery.verify().tokens_missing == 5
        again = gallery.search("a red coat")
        assert (again.tokens_encoded, gallery.search("a red coat").tokens_encoded) == (5, 0)
    assert [hit.key for hit in again.hits] == [hit.key for hit in first.hits]


def test_a_picture_that_is_gone_is_ranked_by_similarity_alone(gallery, tmp_path, caplog):
    keys = write_pictures(tmp_path / "people", 5)
    gallery._state._token_cache = 0
    gallery.build(tmp_path / "people")
    (tmp_path / "people" / keys[0]).unlink()
    draw_picture(88).save(tmp_path / "people" / keys[1])
    scores = {hit.key: hit.score for hit in gallery.search("a red coat").hits}
    assert [key for key, score in scores.items() if score is None] and set(scores) == set(keys)
    assert {key for key, score in scores.items() if score is None} == set(keys[:2])
    assert "cannot be read" in caplog.text and "has changed since it was indexed" in caplog.text
    assert sorted(problem.key for problem in gallery.verify().problems) == sorted(keys[:2])
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        gallery.image(keys[1])


def test_phrases_have_scores_of_their_own(gallery, tmp_path):
    keys = write_pictures(tmp_path / "people", 4)
    gallery.build(tmp_path / "people")
    scores = gallery.match(["a red coat with a long belt", "shoes"], keys)
    assert scores.shape == (2, 4)
    alone = gallery.match(["shoes"], [keys[2]])
    torch.testing.assert_close(scores[1:, 2:3], alone, rtol=0, atol=1e-5)
    (hit,) = gallery.search("shoes", where=f'key == "{keys[2]}"').hits
    assert hit.score == pytest.approx(alone.item(), abs=1e-5)


def test_the_threshold_marks_hits(gallery, tmp_path):
    write_pictures(tmp_path / "people", 8)
    gallery.build(tmp_path / "people")
    scores = sorted(hit.score for hit in gallery.search("a red coat").hits)
    result = gallery.search("a red coat", threshold=scores[4])
    assert sum(hit.likely for hit in result.hits) == 4
    assert gallery.search("a red coat", threshold=1.0).likely_in_gallery is False
    assert gallery.search("a red coat", threshold=0.0).likely_in_gallery is True


def test_calibration_is_saved_with_the_gallery(model, tmp_path):
    write_pictures(tmp_path / "people", 4)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
        assert (gallery.threshold, gallery.calibration) == (0.5, None)
        saved = gallery.calibrate(make_split(), rerank=4, name="drawn")
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        assert gallery.calibration == saved
        assert gallery.search("a red coat").threshold == saved.threshold


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "search needs a text, an image or both"),
        ({"text": " "}, "text must have a word"),
        ({"text": "x", "top": 0}, "top must be at least 1"),
        ({"text": "x", "rerank": -1}, "rerank must be at least 0"),
        ({"text": "x", "threshold": 2}, "threshold must be a probability"),
        ({"text": "x", "where": "hat == 1"}, "'hat' is not a field of this gallery"),
        ({"image": "nowhere.jpg"}, "image nowhere.jpg cannot be read"),
    ],
)
def test_wrong_searches_say_why(model, tmp_path, options, message):
    write_pictures(tmp_path / "people", 2)
    with Gallery(":memory:", encoder=encoder_of(model)) as gallery:
        with pytest.raises(ValueError, match="there is no gallery at"):
            gallery.search("x")
        gallery.build(tmp_path / "people")
        with pytest.raises(ValueError, match=message):
            gallery.search(**options)


# ---------------------------------------------------------------- removing


def everything_on_disk(folder: Path) -> bytes:
    """All files as they are, and the columns of compressed ones as they are read."""
    parts = []
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        parts.append(path.read_bytes())
        parts.append(str(path).encode())
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            parts += [
                str(table.drop_columns([n for n in table.column_names if n == "embedding"]).to_pylist()).encode()
            ]
            if "embedding" in table.column_names:
                parts += [np.asarray(row, np.float32).tobytes() for row in table["embedding"].to_pylist()]
        elif path.suffix == ".arrow":
            with pa.memory_map(str(path)) as source:
                parts.append(str(list(pa.ipc.open_stream(source))).encode())
    return b"".join(parts)


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
            "tokens": gallery.image_tokens(gone).numpy().tobytes(),
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
    assert "equal pictures stay under 1 other keys, such as twin.jpg" in caplog.text
    for options, message in (
        ({}, "either where or keys"),
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


# ---------------------------------------------------------------- full disks


def full_disk(*arguments, **options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


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


# ---------------------------------------------------------------- opening


def test_a_gallery_of_another_model_is_refused(model, other_model, tmp_path):
    write_pictures(tmp_path / "people", 2)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people")
    with Gallery(tmp_path / "g.db", encoder=encoder_of(other_model)) as gallery:
        for ask in (lambda: gallery.search("a man"), lambda: gallery.build(tmp_path / "people")):
            with pytest.raises(ValueError, match=r"was built with .* their embeddings cannot be compared"):
                ask()
        assert gallery.stats().images == 2
        assert gallery.remove(where='key != "x"') == 2
    with Gallery(tmp_path / "g.db", device="cpu") as gallery:
        assert gallery.encoder.name == model


HOLD = "import sys, milvus_lite.db as m; d = m.MilvusLite(sys.argv[1]); print('held', flush=True); sys.stdin.read(); d.close()"


def test_a_second_process_is_told_why_it_must_wait(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path / "g.db")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=r"g\.db is open in another process, and an embedded gallery serves one"):
            Gallery(tmp_path / "g.db")
    with Gallery(tmp_path / "g.db") as one, Gallery(tmp_path / "g.db") as two:  # one process may open it twice
        assert (len(one), len(two)) == (0, 0)


@pytest.mark.parametrize(
    "uri, message",
    [("gallery", "must end in .db"), ("nowhere/g.db", "there is no folder"), ("file.db", "is a file")],
)
def test_places_that_cannot_be_opened(model, tmp_path, monkeypatch, uri, message):
    monkeypatch.chdir(tmp_path)
    Path("file.db").write_text("")
    write_pictures(tmp_path / "people", 1)
    with pytest.raises(ValueError, match=message):
        Gallery(uri, encoder=encoder_of(model)).build(tmp_path / "people")


def test_asking_makes_no_gallery(model, tmp_path):
    with Gallery(tmp_path / "typo.db", encoder=encoder_of(model)) as gallery:
        with pytest.raises(ValueError, match=r"there is no gallery at .*typo\.db: make one with"):
            gallery.search("a man")
        with pytest.raises(ValueError, match="there is no gallery at"):
            gallery.add(tmp_path)
    named = pytest.raises(ValueError, match=r"no gallery other at .*typo\.db: .* --collection other --images")
    with Gallery(tmp_path / "typo.db", encoder=encoder_of(model), collection="other") as gallery, named:
        gallery.stats()
    assert not (tmp_path / "typo.db").exists()


def test_importing_the_package_needs_no_extra():
    loaded = "print([n for n in ('pymilvus', 'gradio') if n in sys.modules])"
    code = f"import sys, mra.retrieval; {loaded}; from mra.gallery import Gallery"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    assert run.stdout == "[]\n"


def test_ranking_takes_the_weight_chosen_for_the_model(tmp_path):
    """`posterior` of the saved choice, unless it was made without mirror images."""
    model = save_tiny_model(tmp_path / "model")
    assert TorchEncoder(model).match_weight is None
    figures = {"R1": 50.0, "mAP": 40.0}
    choice = RetrievalChoice(4, "validation", 9, "posterior", 0.4, True, 0.05, {8: figures})
    choice.save(model)
    write_pictures(tmp_path / "pictures", 4)
    with Gallery(":memory:", encoder=TorchEncoder(model)) as gallery:
        gallery.build(tmp_path / "pictures")
        assert gallery.search("a red coat", rerank=3).match_weight == 0.4
        assert gallery.search("a red coat", rerank=0).match_weight is None
    dataclasses.replace(choice, flip=False).save(model)
    assert TorchEncoder(model).match_weight is None


# ---------------------------------------------------------------- damage


@pytest.fixture
def damaged(model, tmp_path):
    """A built gallery, and the folder of its records to damage."""
    write_pictures(tmp_path / "people", 4)
    with Gallery(tmp_path / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(tmp_path / "people", copy_images=True)
    return tmp_path / "g.db", tmp_path / "g.db" / "collections" / "people_000001"


def test_verify_sees_an_index_that_was_rolled_back(model, damaged):
    place, records = damaged
    (records / "manifest.json").write_text("{")  # milvus-lite takes the one before, which is empty
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        (problem,) = gallery.verify().problems
    assert (problem.key, problem.reason[:30]) == ("index", "4 of 4 images are missing from")


def test_verify_sees_vectors_that_changed(model, damaged):
    place, records = damaged
    (file,) = records.rglob("*.parquet")
    table = pq.read_table(file)
    column = table.column_names.index("embedding")
    vectors = table["embedding"].to_pylist()
    vectors[2][5] *= -1
    pq.write_table(table.set_column(column, table.field(column), pa.array(vectors, table.field(column).type)), file)
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        (problem,) = gallery.verify().problems
    assert problem.reason == "the embedding is not the one that was written"


def test_verify_sees_an_index_that_differs_from_the_records(model, damaged):
    place, records = damaged
    (file,) = records.rglob("*.embedding.flat.idx")
    data = bytearray(file.read_bytes())
    data[-1] ^= 0x80  # the sign of the last number
    file.write_bytes(data)
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        (problem,) = gallery.verify().problems
    assert problem.reason == "a search compares with another embedding than the one written"


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


def test_a_gallery_that_lost_one_half_of_itself_says_so(model, damaged):
    place, records = damaged
    for folder, message in (
        (records, "the index of its 4 images"),
        (records.with_name("people_info"), "remembers of"),
    ):
        shutil.move(folder / "schema.json", place.parent)
        with pytest.raises(ValueError, match=f"has lost .*{message}"):
            Gallery(place, encoder=encoder_of(model))
        shutil.move(place.parent / "schema.json", folder)


def test_an_index_without_its_alias_is_named_again(model, damaged, caplog):
    place, _ = damaged
    (place / "aliases.json").unlink()
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert len(gallery) == 4 and gallery.verify().problems == []
    assert "had lost the name of its index: restored" in caplog.text


def test_a_damaged_copy_is_written_again_by_the_next_build(model, damaged, tmp_path):
    place, _ = damaged
    copies = [path for path in (place / "files" / "people" / "images").rglob("*") if path.is_file()]
    copies[0].write_bytes(b"x")
    copies[1].unlink()
    copies[2].unlink()
    copies[2].mkdir()
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert len(gallery.verify().problems) == 3
        gallery.build(tmp_path / "people", copy_images=True)
        assert gallery.verify().problems == []


def test_a_search_that_overlaps_a_removal_writes_nothing_back(gallery, tmp_path, monkeypatch):
    keys = write_pictures(tmp_path / "people", 4)
    gallery.build(tmp_path / "people")
    content = next(record.content for record in gallery._state.store.records(keys=[keys[0]]))
    gallery._state.tokens.keep_only(set())
    encode, is_removed = gallery.encoder.encode_images, []

    def encode_and_remove(images):
        if not is_removed:
            is_removed.append(gallery.remove(keys=[keys[0]]))
        return encode(images)

    monkeypatch.setattr(gallery.encoder, "encode_images", encode_and_remove)
    gallery.search("a red coat")
    assert is_removed == [1] and content not in gallery._state.tokens and len(gallery._state.tokens) == 3


def test_a_query_embedding_that_is_not_finite_is_refused(gallery, tmp_path, monkeypatch):
    write_pictures(tmp_path / "people", 2)
    gallery.build(tmp_path / "people")
    encode = gallery.encoder.encode_texts

    def encode_badly(texts):
        encodings = encode(texts)
        return dataclasses.replace(encodings, embeds=encodings.embeds * float("nan"))

    monkeypatch.setattr(gallery.encoder, "encode_texts", encode_badly)
    with pytest.raises(ValueError, match=r"embedding .* not finite"):
        gallery.search("a red coat", rerank=0)
