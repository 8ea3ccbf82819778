"""The commands that keep a gallery, as a user runs them: every verb, wrong input, and commands that are killed."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mra.cli import main
from mra.gallery import Gallery, index_verbs
from mra.gallery.connection import Client
from tests.helpers.galleries import contents, draw_picture, encoder_of, make_split, write_pictures


@pytest.fixture
def run(capsys):
    def run(*arguments) -> str:
        capsys.readouterr()
        main(["index", *map(str, arguments)])
        return capsys.readouterr().out

    return run


def test_the_life_of_a_gallery(run, model, tmp_path):
    people, place = tmp_path / "people", ["--gallery", tmp_path / "g.db"]
    keys = write_pictures(people, 6)
    (people / "bad.jpg").write_bytes(b"")
    (tmp_path / "people.csv").write_text("path,camera\n" + "".join(f"{key},{key[:5]}\n" for key in keys))
    text = run(
        "build", *place, "--model", model, "--device", "cpu", "--images", people, "--metadata", tmp_path / "people.csv"
    )
    assert "6 added, 0 changed, 0 unchanged" in text and "bad.jpg: the file is empty" in text
    write_pictures(tmp_path / "more", 2, first=6)
    text = run("add", *place, "--images", tmp_path / "more", "--prefix", "more/", "--device", "cpu", "--copy_images")
    assert "2 added" in text and "8 images" in text
    stats = json.loads(run("stats", *place, "--json"))
    assert (stats["images"], stats["copies"], stats["tokens"]) == (8, 2, 8)
    assert (stats["matched_views"], stats["token_dtype"]) == (1, "float16")
    assert "tokens     of 8 images in float16; matched views: 1\n" in run("stats", *place)
    assert stats["cameras"] == {"": 2, "cam_0": 2, "cam_1": 2, "cam_2": 2}
    assert "threshold  0.5, not calibrated" in run("stats", *place)
    assert "8 images, 0 problems, 0 without cached tokens" in run("verify", *place)
    text = run("remove", *place, "--where", 'camera == "cam_1"')
    assert "removed 2 images" in text and "6 remain" in text and "would index them again" in text
    draw_picture(42).save(people / keys[0])
    with pytest.raises(SystemExit) as stopped:
        run("verify", *place)
    assert stopped.value.code == 1
    (people / keys[0]).unlink()
    text = run("build", *place, "--images", people, "--device", "cpu")
    assert f"(--prune removes them):\n  {keys[0]}" in text
    assert "1 removed" in run("build", *place, "--images", people, "--device", "cpu", "--prune")


def test_calibrate_writes_the_threshold(run, model, tmp_path):
    write_pictures(tmp_path / "people", 2)
    (tmp_path / "set").mkdir()
    make_split().to_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet")
    place = ["--gallery", tmp_path / "g.db"]
    run("build", *place, "--model", model, "--device", "cpu", "--images", tmp_path / "people")
    text = run("calibrate", *place, "--dataset", tmp_path / "set", "--rerank", 4, "--device", "cpu")
    assert text.startswith("threshold 0.") and "over 12 queries" in text
    assert "calibrated on" in run("stats", *place)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["stats"], "mra index stats: there is no gallery at"),
        (["remove", "--keys", "x"], "there is no gallery at"),
        (["add", "--images", "people"], "there is no gallery at"),
        (["build", "--images", "people"], "is new: pass the model to build it with"),
        (["build", "--images", "people", "--model", "no/such/model"], "model no/such/model is neither a folder"),
        (["build", "--images", "empty", "--model", "nowhere"], "images empty is a folder without data"),
        (["build", "--images", "photos/of/2026", "--model", "nowhere"], "photos/of/2026 does not exist"),
        (
            ["build", "--images", "people", "--backend", "onnx", "--model", "m"],
            "model m has no ONNX export (onnx.json is neither in it nor in its folder onnx): make one with",
        ),
        (["build", "--images", "people", "--metadata", "no.csv", "--model", "m"], "no.csv cannot be read"),
    ],
)
def test_wrong_input_ends_in_one_line(run, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    write_pictures(tmp_path / "people", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stopped:
        run(arguments[0], "--gallery", "g.db", *arguments[1:])
    sentence = capsys.readouterr().err if stopped.value.code == 2 else str(stopped.value)  # 2: a wrong argument
    assert message in sentence and "\n" not in sentence.partition(message)[0]
    assert not (tmp_path / "g.db").exists()


# ---------------------------------------------------------------- killed

# What the commands write with: requests to the engine, and files. A killed command dies right before or after one of them.
REQUESTS = ("create_collection", "create_alias", "alter_alias", "drop_collection", "upsert", "delete", "flush")
WRITERS = (
    "mra.gallery.token_cache.TokenCache.write",
    "mra.gallery.token_cache.TokenCache.remove",
    "mra.gallery.token_cache.TokenCache.keep_only",
    "mra.gallery.parts.FileStore.write",
    "mra.gallery.parts.FileStore.keep_only",
)


@contextlib.contextmanager
def counted_writes(deadly: int | None = None, after: bool = False):
    """Count the writes of the commands in the block, and kill this process at one of them.

    Yields:
        A list of one number, the writes until now.
    """
    count = [0]

    def counting(write):
        def call(*args, **kwargs):
            count[0] += 1
            dies = count[0] == deadly
            if dies and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = write(*args, **kwargs)
            if dies:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    get = Client.__getattr__

    def get_counting(self, name):
        return counting(get(self, name)) if name in REQUESTS else get(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Client, "__getattr__", get_counting)
        for name in WRITERS:
            module, owner, method = name.rsplit(".", 2)
            owner = getattr(importlib.import_module(module), owner)
            patch.setattr(owner, method, counting(getattr(owner, method)))
        yield count


def run_and_die(arguments: list[str], moment: tuple[int, bool]) -> None:
    """Run the command in a process that kills itself at a write."""
    torch.set_num_threads(1)  # as in this process: sums are rounded otherwise on more
    with counted_writes(*moment):
        main(["index", *arguments])


def state_of(place: Path, model: str) -> dict:
    """Read everything that a gallery holds, and search it."""
    with Gallery(place, encoder=encoder_of(model)) as gallery:
        assert gallery.verify().problems == []
        hits = gallery.search("a red coat", top=40).hits
        info = {name: value for name, value in gallery._state.info.items() if name != "is_removing"}
        return {
            "records": contents(gallery),
            "tokens": {hit.key: gallery.image_tokens(hit.key).astype("float16").tobytes() for hit in hits},
            "files": sorted(
                path.relative_to(place).as_posix() for path in (place / "files").rglob("*") if path.is_file()
            ),
            "hits": sorted((hit.key, hit.score) for hit in hits),  # equal images have no order
            "info": info,
        }


@pytest.fixture(scope="module")
def started(model, tmp_path_factory):
    """A gallery, its folder of images, and that folder as it is later; a labelled split."""
    folder = tmp_path_factory.mktemp("started")
    keys = write_pictures(folder / "before", 7)
    cameras = "".join(f"{key},c{number % 3}\n" for number, key in enumerate(keys))
    (folder / "before.csv").write_text(f"path,camera\n{cameras}")
    people = folder / "people"
    shutil.copytree(folder / "before", people)
    build = ["--model", model, "--device", "cpu", "--batch_size", "3", "--copy_images"]
    place = ["--gallery", f"{folder}/before.db", "--images", str(people), "--metadata", f"{folder}/before.csv"]
    main(["index", "build", *build, *place])
    (people / keys[0]).unlink()
    draw_picture(99).save(people / keys[1])
    shutil.copy(people / keys[2], people / "twin.jpg")
    (people / "aaa.jpg").write_bytes(b"unreadable, and first of all")
    write_pictures(people, 2, first=7)
    make_split(6).to_parquet(folder / "split" / "validation.parquet")
    return folder, build


VERBS = ("build", "prune", "remove", "calibrate")


def check_killed(started, model: str, tmp_path: Path, verb: str, most: int | None) -> None:
    """Kill a command at some of its writes, or all; each time the gallery works, and the same command finishes."""
    folder, build = started
    arguments = {
        "build": ["build", *build, "--images", f"{folder}/people"],
        "prune": ["build", *build, "--images", f"{folder}/people", "--prune"],
        "remove": ["remove", "--where", 'camera in ["c0", "c1"]'],
        "calibrate": ["calibrate", "--dataset", f"{folder}/split", "--rerank", "3", "--device", "cpu"],
    }[verb]

    def start(name: str) -> tuple[Path, list[str]]:
        place = tmp_path / name / "g.db"
        place.parent.mkdir()
        if verb != "build":
            shutil.copytree(folder / "before.db", place)
        return place, [*arguments, "--gallery", str(place)]

    whole, command = start("whole")
    with counted_writes() as count:
        main(["index", *command])
    expected = state_of(whole, model)
    moments = [(number, after) for number in range(1, count[0] + 1) for after in (False, True)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mra.cli", "mra.gallery.index_verbs", "pymilvus", "milvus_lite.db"])
    for moment in moments if most is None else random.Random(verb).sample(moments, most):
        place, command = start("{}_{}".format(*moment))
        process = context.Process(target=run_and_die, args=(command, moment))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, moment
        with Gallery(place, encoder=encoder_of(model)) as gallery:
            if len(gallery):
                assert gallery.search("a red coat").hits
        main(["index", *command])
        found = state_of(place, model)
        assert [name for name in expected if found[name] != expected[name]] == [], moment


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_command_leaves_a_gallery_that_works_and_finishes_when_repeated(started, model, tmp_path, verb):
    check_killed(started, model, tmp_path, verb, most=2)


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_command_can_be_killed_at_any_write(started, model, tmp_path, verb):
    check_killed(started, model, tmp_path, verb, most=None)


def test_the_progress_bar_forecasts_from_the_images_that_take_time(monkeypatch):
    clock, shown = iter([100.0, 140.0, 200.0]), []
    monkeypatch.setattr(index_verbs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(
        index_verbs.tqdm, "set_postfix_str", lambda bar, text, refresh: shown.append((text, bar.bar_format))
    )
    update = index_verbs.progress_bar("images")
    for done in (900, 932, 964):  # the first 900 are unchanged and done at once
        update(done, 1000)
    assert shown == [
        ("1,250 ms an image, 1 min left", index_verbs.BAR),
        ("1,562 ms an image, 57 s left", index_verbs.BAR),
    ]


HINT = "about 1 h 18 min with --dtype auto, which would encode in bfloat16 on this CPU"


@pytest.mark.parametrize("gain, words", [(2.5, [HINT]), (None, [])])
def test_a_long_build_says_once_what_auto_would_take(monkeypatch, gain, words):
    clock, written, asked = iter([0.0, 40.0, 80.0]), [], []
    monkeypatch.setattr(index_verbs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(index_verbs.tqdm, "write", lambda *arguments: written.append(arguments[-1]))
    update = index_verbs.progress_bar("images", lambda: (asked.append(gain), gain)[1])
    for done in (0, 32, 64):
        update(done, 9_500)
    assert (written, asked) == (words, [gain])


def test_a_short_build_asks_for_no_gain(monkeypatch):
    clock = iter([0.0, 40.0])
    monkeypatch.setattr(index_verbs, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    update = index_verbs.progress_bar("images", lambda: pytest.fail("asked"))
    for done in (0, 32):
        update(done, 200)


@pytest.mark.parametrize(
    "seconds, left, expected",
    [
        (1.25, 10_000, "1,250 ms an image, 3 h 28 min left"),
        (0.0052, 10_000, "5.2 ms an image, 52 s left"),
        (0.6, 100, "600 ms an image, 1 min left"),
        (1.25, 0, "1,250 ms an image, 0 s left"),
    ],
)
def test_forecasts(seconds, left, expected):
    assert index_verbs.forecast(seconds, left) == expected
