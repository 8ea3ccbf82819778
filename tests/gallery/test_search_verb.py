"""The search command as a user runs it: table, JSON, picture, filters, phrases, and errors in one line."""

import json
import os

import pytest
from PIL import Image

from mra.cli import main
from mra.gallery import Gallery
from tests.helpers.galleries import draw_picture, encoder_of, save_tiny_model, write_pictures


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A gallery of six pictures from two cameras, and their keys."""
    folder = tmp_path_factory.mktemp("search")
    model = save_tiny_model(folder / "model")
    keys = write_pictures(folder / "people", 6)
    with Gallery(folder / "g.db", encoder=encoder_of(model)) as gallery:
        gallery.build(folder / "people", [{"path": key, "camera": f"c{n % 2}"} for n, key in enumerate(keys)])
    return folder, keys


@pytest.fixture
def run(place, capsys):
    def run(*arguments) -> str:
        capsys.readouterr()
        main(["search", *map(str, arguments), "--gallery", str(place[0] / "g.db"), "--device", "cpu"])
        return capsys.readouterr().out

    return run


def test_a_table_of_hits(run, place):
    lines = run("a red coat", "--top", "4", "--rerank", "3", "--threshold", "0").splitlines()
    assert lines[0] == "a red coat" and lines[1].startswith("4 hits, 3 re-ranked (posterior 1); seconds: encode ")
    assert lines[2].split() == ["rank", "score", "similarity", "key", "camera", "time"]
    rows = [line.split() for line in lines[3:7]]
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert {row[3] for row in rows} <= set(place[1]) and rows[3][1] == "-"
    assert lines[1].endswith("; matched 3 of 3")
    assert "matched" not in run("a red coat", "--rerank", "0")


def test_hits_below_the_threshold_are_marked(run):
    text = run("a red coat", "--threshold", "1")
    assert "probably not in the gallery: the first hit does not reach 1.000" in text
    assert sum(line.endswith("probably not in the gallery") for line in text.splitlines()) == 6


def test_json_holds_everything(run, place):
    first, second = map(
        json.loads, run("a red coat", "a hat", "--json", "--phrase", "red", "--phrase", "blue").splitlines()
    )
    assert (first["query"], second["query"]) == ("a red coat", "a hat")
    assert [hit["rank"] for hit in first["hits"]] == [1, 2, 3, 4, 5, 6]
    hit = first["hits"][0]
    assert set(hit) == {
        "rank", "key", "path", "score", "similarity", "likely", "camera", "time", "metadata", "phrases"
    }  # fmt: skip
    assert set(hit["phrases"]) == {"red", "blue"} and 0 <= hit["phrases"]["red"] <= 1
    with Gallery(place[0] / "g.db", device="cpu") as gallery:
        scores = gallery.match(["red"], [hit["key"]])
    assert hit["phrases"]["red"] == pytest.approx(scores.item(), abs=1e-5)


def test_by_image_and_with_a_filter(run, place):
    folder, keys = place
    result = json.loads(run("--image", folder / "people" / keys[2], "--json", "--where", 'camera == "c0"'))
    assert result["hits"][0]["key"] == keys[2]
    assert [hit["score"] for hit in result["hits"]] == [None] * 3
    assert {hit["key"] for hit in result["hits"]} == set(keys[::2])


def test_the_picture_has_a_row_for_each_sentence(run, tmp_path):
    assert f"wrote {tmp_path / 'r.png'}" in run("a red coat", "--save", tmp_path / "r.png")
    run("a red coat", "a hat", "--save", tmp_path / "two.png", "--json")
    one, two = Image.open(tmp_path / "r.png"), Image.open(tmp_path / "two.png")
    assert one.width == two.width and two.height > 1.5 * one.height
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.png", "two.png"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "TEXT or --image must be given, or both"),
        (
            ["x", "--where", "hat == 1"],
            "mra search: where: 'hat' is not a field of this gallery: it has key, camera, time",
        ),
        (["x", "--where", 'camera = "c0"'], "cannot be parsed"),
        (["--image", "nowhere.jpg"], "image nowhere.jpg cannot be read"),
        (["x", "--token_cache", "nan"], "`--token_cache` must be a finite number, got 'nan'"),
        (["x", "--token_cache", "-1"], "--token_cache must be at least 0 GiB, got -1.0"),
        (["x", "--top", "0"], "top must be at least 1"),
        (["x", "--where", 'camera == "c7"', "--save", "r.png"], "--save has no hit to draw"),
        (["x", "--save", "nowhere/r.png"], "--save nowhere/r.png cannot be written"),
        (["x", "--save", "r.unknown"], "--save r.unknown cannot be written"),
        (
            ["x", "--backend", "onnx"],
            "has no ONNX export (onnx.json is neither in it nor in its folder onnx): make one with `mra export --model",
        ),
        (["x", "--backend", "onnx", "--dtype", "float16"], "--dtype cannot be used with --backend onnx"),
    ],
)
def test_wrong_input_ends_in_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    assert message in f"{stopped.value} {capsys.readouterr().err}"
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_not_utf_8_are_printed_and_drawn(run, place, tmp_path):
    image = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")
    draw_picture(0).save(image)
    saved = os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9sult.png")
    assert r"caf\udce9.jpg" in run("a red coat", "--image", image, "--save", saved)
    assert os.path.getsize(saved)
    assert json.loads(run("--image", image, "--json"))["query"].endswith("caf\udce9.jpg")


def test_the_number_of_matched_images_is_printed(run, monkeypatch):
    monkeypatch.setattr("mra.gallery.searching.ROUND_SIZES", {"cpu": 2})
    monkeypatch.setattr("mra.retrieval.encoders.TorchEncoder.largest_log_odds", {1: 1.0})
    monkeypatch.setattr("mra.retrieval.encoders.TorchEncoder.match_weight", 0.0)
    assert run("a red coat", "--top", "1").splitlines()[1].endswith("; matched 2 of 6")
    result = json.loads(run("a red coat", "--top", "1", "--json"))
    assert (result["matched"], result["reranked"], len(result["hits"])) == (2, 6, 1)
    assert json.loads(run("a red coat", "--top", "1", "--json", "--early_stop", "false"))["matched"] == 6
