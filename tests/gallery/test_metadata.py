"""CSV files and rows: what matches which image, and what is refused."""

import re

import pytest

from mra.gallery.metadata import read_metadata
from mra.gallery.sources import open_source
from tests.helpers.galleries import draw_picture, write_pictures


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
        (b"path,note\n0.png,a\n0.png,b\n", "row 3: differs from row 2 of the same image '0.png'"),
        (b"path,note,\n0.png,a,b\n", "column '' must be a name"),
        (b"path,note,note\n0.png,a,b\n", "has two columns 'note'"),
        (
            b"path,time\n0.png,9999-12-31T23:59:59-23:59\n",
            "row 2: time expected a time in the years 1 to 9999",
        ),
        (b"path,note\n2.png,a\n", "row 2: path '2.png' matches the images '2.png' and 'sub/2.png'"),
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
