"""Folders, lists of files and datasets as sources of images."""

import hashlib
import io
import os
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest

from mra.gallery import Gallery
from mra.gallery.sources import MAX_KEY_BYTES, content_hash, open_source
from tests.helpers.galleries import contents, draw_picture, write_pictures


def touch(folder: Path, *names: str) -> None:
    """Write files whose bytes are their names."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())


def listed(source) -> dict[str, bytes]:
    """Keys and bytes of the images, in order."""
    return {item.key: item.read() for item in source.items}


PICTURES = ["B.JPG", "a.jpeg", "b/c/d.png", "b/e.webp", "b/z.tif", "f.bmp"]  # sorted


def test_every_picture_below_a_folder_is_found(tmp_path):
    touch(tmp_path, *reversed(PICTURES), "notes.txt", "paper.pdf", "film.mpg", "noend", ".hidden.png", ".git/x.png")
    touch(tmp_path, "b/.cache/y.png")
    source = open_source(tmp_path)
    assert listed(source) == {name: name.encode() for name in PICTURES} and list(listed(source)) == PICTURES
    assert (source.name, source.root, source.refused) == (str(tmp_path), tmp_path, [])
    assert [item.path for item in source.items] == [tmp_path / name for name in PICTURES]
    assert all(item.columns == {} for item in source.items)
    named = open_source(str(tmp_path), prefix="one/")
    assert list(listed(named)) == [f"one/{name}" for name in PICTURES]
    assert named.name == f"{tmp_path} as one/"


def test_the_gallery_in_the_folder_is_no_picture(tmp_path):
    touch(tmp_path, "a.png", "g.db/files/b.png", "x/g.db/c.png")
    assert list(listed(open_source(tmp_path, gallery_folder=tmp_path / "g.db"))) == ["a.png", "x/g.db/c.png"]
    assert len(open_source(tmp_path).items) == 3


def test_links_may_stay_in_the_folder(tmp_path):
    touch(tmp_path, "in/a.png", "in/z.png", "out.png")
    (tmp_path / "in" / "b.png").symlink_to("a.png")
    for name in ("y.png", "x.png", "w.png", "c.png"):
        (tmp_path / "in" / name).symlink_to(tmp_path / "out.png")
    source = open_source(tmp_path / "in")
    assert list(listed(source)) == ["a.png", "b.png", "z.png"]
    reason = "it is a link to a file outside the folder"
    assert source.refused == [(name, reason) for name in ("c.png", "w.png", "x.png", "y.png")]
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert (open_source(tmp_path / "link").root, len(open_source(tmp_path / "link").items)) == (tmp_path / "in", 3)


def test_a_folder_of_refused_files_is_no_data_set(tmp_path):
    touch(tmp_path, "out.png")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").symlink_to(tmp_path / "out.png")
    source = open_source(tmp_path / "in")
    assert source.items == [] and len(source.refused) == 1


def test_keys_have_a_largest_length(tmp_path):
    touch(tmp_path, "a.png")
    prefix = "é" * ((MAX_KEY_BYTES - len("x/a.png")) // 2) + "x" * ((MAX_KEY_BYTES - len("x/a.png")) % 2) + "x/"
    assert MAX_KEY_BYTES == 1024 and len(f"{prefix}a.png".encode()) == 1024
    assert len(open_source(tmp_path, prefix).items) == 1
    source = open_source(tmp_path, "y" + prefix)
    assert source.items == [] and source.refused == [(f"y{prefix}a.png", "its path is longer than 1024 bytes")]
    assert open_source([tmp_path / "a.png"], "y" * 1024).refused[0][1] == "its path is longer than 1024 bytes"


def test_files_of_a_list_keep_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "x/b.png", "x/y/a.png")
    source = open_source(["x/y/a.png", Path("x/b.png"), "x/./b.png"])
    assert listed(source) == {"x/b.png": b"x/b.png", "x/y/a.png": b"x/y/a.png"}
    assert list(listed(source)) == ["x/b.png", "x/y/a.png"]
    assert [item.path for item in source.items] == [tmp_path / "x/b.png", tmp_path / "x/y/a.png"]
    assert (source.root, source.name) == (tmp_path / "x", f"files under {tmp_path / 'x'}")
    assert list(listed(open_source(("x/b.png",), prefix="p/"))) == ["p/x/b.png"]


def picture_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    draw_picture(seed, (8, 16)).save(file, "PNG")
    return file.getvalue()


def test_rows_of_a_data_set_with_the_columns_that_filters_can_use(tmp_path):
    (tmp_path / "c.png").write_bytes(picture_bytes(3))
    dataset = datasets.Dataset.from_dict(
        {
            "image": [
                {"bytes": picture_bytes(1), "path": None},
                None,
                {"bytes": None, "path": str(tmp_path / "c.png")},
            ],
            "camera": ["c1", None, "c2"],
            "time": ["2026-01-31", None, None],
            "person": [7, 8, None],
            "captions": [["a"], ["b"], ["c"]],
            "key": ["x", "y", "z"],
            "größe": [1, 2, 3],
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "camera": datasets.Value("string"),
                "time": datasets.Value("string"),
                "person": datasets.Value("int64"),
                "captions": datasets.List(datasets.Value("string")),
                "key": datasets.Value("string"),
                "größe": datasets.Value("int64"),
            }
        ),
    )
    source = open_source(dataset, prefix="set/")
    assert (source.root, source.name, source.refused) == (None, "data set", [])
    assert [(item.key, item.path, item.columns) for item in source.items] == [
        ("set/000000", None, {"camera": "c1", "time": "2026-01-31", "person": 7}),
        ("set/000001", None, {"person": 8}),
        ("set/000002", None, {"camera": "c2"}),
    ]
    assert [source.items[row].read() for row in (0, 2)] == [picture_bytes(1), picture_bytes(3)]
    with pytest.raises(ValueError, match="the row has no image"):
        source.items[1].read()
    only_images = open_source(dataset.select_columns("image").with_format("torch").select([2]))
    assert [(item.columns, item.read()) for item in only_images.items] == [({}, picture_bytes(3))]


@pytest.mark.parametrize(("columns", "row"), [(["photo", "image"], 1), (["photo", "crop"], 0)])
def test_the_column_image_or_the_first_of_images_is_read(columns, row):
    data = {name: [{"bytes": picture_bytes(number), "path": None}] for number, name in enumerate(columns)}
    features = datasets.Features(dict.fromkeys(columns, datasets.Image()))
    (item,) = open_source(datasets.Dataset.from_dict(data, features=features)).items
    assert item.read() == picture_bytes(row)


def test_a_data_set_is_named_with_its_split():
    data = {"image": [{"bytes": picture_bytes(1), "path": None}]}
    info = datasets.DatasetInfo(features=datasets.Features({"image": datasets.Image()}), dataset_name="many")
    source = open_source(datasets.Dataset.from_dict(data, info=info, split=datasets.Split.TRAIN))
    assert source.name == "data set many train"


def test_a_folder_without_pictures_is_read_as_a_data_set(tmp_path):
    dataset = datasets.Dataset.from_dict(
        {"image": [{"bytes": picture_bytes(1), "path": None}], "camera": ["c1"]},
        features=datasets.Features({"image": datasets.Image(), "camera": datasets.Value("string")}),
    )
    for split in ("train", "test"):
        dataset.to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    for options, key in (({}, "test/000000"), ({"prefix": "p/"}, "p/000000")):
        (item,) = open_source(tmp_path, split="test", **options).items
        assert (item.key, item.columns, item.read()) == (key, {"camera": "c1"}, picture_bytes(1))
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    source = open_source(str(tmp_path))
    assert (source.items[0].key, source.name) == ("000000", str(tmp_path))


def test_what_is_no_source_is_refused(tmp_path):
    touch(tmp_path, "a.png")
    no_images = datasets.Dataset.from_dict({"text": ["a"], "n": [1]})
    empty = datasets.Dataset.from_dict({"image": []}, features=datasets.Features({"image": datasets.Image()}))
    for images, message in (
        (tmp_path / "a.png", r"a\.png is a file: expected a folder"),
        ([], "is an empty list"),
        ((draw_picture(1),), "must be a list of paths"),
        ([tmp_path / "a.png", draw_picture(1)], "must be a list of paths"),
        ([1], "must be a list of paths"),
        (no_images, "images data set must have an image column, got text, n"),
        (empty, "images data set has no images: expected at least one"),
        (7, r"must be a folder, a list of files or a datasets\.Dataset, got int"),
        (SimpleNamespace(features={}), "must be a folder, a list of files"),
        ({"a": 1}, r"must be a folder, a list of files or a datasets\.Dataset, got dict"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(images)


def test_the_hash_of_a_content_is_sha_256():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert content_hash(b"") == empty and content_hash(b"abc") == hashlib.sha256(b"abc").hexdigest()


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
