"""Folders, lists of files and datasets as sources of images."""

import os
from pathlib import Path

import datasets
import pytest

from mra.gallery import Gallery
from tests.helpers.galleries import contents, draw_picture, write_pictures


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


def unreadable_name(folder: Path, name: bytes) -> str:
    """Draw a picture under a name that need not be UTF-8; return its path as Python gives it."""
    path = os.fsencode(folder) + b"/" + name
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        draw_picture(0).save(file, "JPEG")
    return os.fsdecode(path)


def test_names_that_are_not_utf_8_are_reported_and_skipped(gallery, tmp_path):
    people = tmp_path / "people"
    keys = write_pictures(people, 2)
    path = unreadable_name(people, b"caf\xe9\xff.jpg")
    report = gallery.build(people)
    assert [(skipped.key, skipped.reason) for skipped in report.skipped] == [
        (r"caf\udce9\udcff.jpg", "its path is not valid UTF-8")
    ]
    assert sorted(contents(gallery)) == keys
    assert gallery.build([path, people / keys[0]], prefix="list/").skipped[0].key.endswith(r"caf\udce9\udcff.jpg")
    assert gallery.search(image=path).hits
    folder = os.path.dirname(unreadable_name(tmp_path, b"d\xe9r/x.jpg"))
    wrong = [
        (lambda: gallery.build(folder), r"images .*/d\\udce9r is not valid UTF-8"),
        (lambda: gallery.build(people, prefix="\udcff/"), r"prefix \\udcff/ is not valid UTF-8"),
        (
            lambda: gallery.build(people, [{"path": keys[0], "camera": "\udcff"}]),
            "row 1: camera must be valid Unicode",
        ),
        (lambda: gallery.build(people, [{"path": keys[0], "note": "\udcff"}]), "row 1: note must be valid Unicode"),
        (lambda: gallery.search("a \udcff coat"), "must be valid Unicode"),
        (lambda: gallery.match(["\udcff"], keys), "must be valid Unicode"),
        (lambda: Gallery(tmp_path / "\udcff.db", encoder=gallery.encoder).build(people), "not valid UTF-8"),
    ]
    for call, message in wrong:
        with pytest.raises(ValueError, match=message):
            call()
    assert len(list(gallery.build([folder + "/x.jpg", people / keys[0]], prefix="two/").skipped)) == 1
