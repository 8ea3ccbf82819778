"""The commands that keep a gallery, as a user runs them: every verb, wrong input, and builds killed at random."""

import importlib
import json
import multiprocessing
import os
import random
import signal

import pytest
import torch

from mra.cli import main
from mra.gallery import Gallery
from tests.helpers.galleries import draw_picture, encoder_of, save_tiny_model, write_pictures


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


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
    assert stats["cameras"] == {"": 2, "cam_0": 2, "cam_1": 2, "cam_2": 2}
    assert "threshold  0.5, not calibrated" in run("stats", *place)
    assert "8 images, 0 problems, 0 without cached tokens" in run("verify", *place)
    text = run("remove", *place, "--where", 'camera == "cam_1"')
    assert "removed 2 images" in text and "6 are left" in text and "would index them again" in text
    draw_picture(42).save(people / keys[0])
    with pytest.raises(SystemExit) as stopped:
        run("verify", *place)
    assert stopped.value.code == 1
    (people / keys[0]).unlink()
    text = run("build", *place, "--images", people, "--device", "cpu")
    assert f"(--prune removes them):\n  {keys[0]}" in text
    assert "1 removed" in run("build", *place, "--images", people, "--device", "cpu", "--prune")


def test_calibrate_writes_the_threshold(run, model, tmp_path):
    from tests.gallery.test_gallery import make_split

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
        (["build", "--images", "people"], "is new: give the model to build it with"),
        (["build", "--images", "people", "--model", "no/such/model"], "model no/such/model is neither a folder"),
        (["build", "--images", "empty", "--model", "nowhere"], "images empty is a folder without data"),
        (["build", "--images", "photos/of/2026", "--model", "nowhere"], "photos/of/2026 does not exist"),
        (["build", "--images", "people", "--backend", "onnx"], "needs --model"),
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


# ---------------------------------------------------------------- killed at random

# What a build writes with; a killed one dies right before or right after one of their calls.
WRITERS = (
    "mra.gallery.milvus.EmbeddedStore.upsert",
    "mra.gallery.milvus.EmbeddedStore.write_info",
    "mra.gallery.token_cache.TokenCache.write",
    "mra.gallery.parts.FileStore.write",
)


def build_and_die(arguments: list[str], calls: int, after: bool) -> None:
    """Runs the command in a process that kills itself at its `calls`-th write."""
    torch.set_num_threads(1)  # as in this process: sums are rounded otherwise on more
    left = [calls]

    def deadly(write):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = write(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in WRITERS:
        module, owner, method = name.rsplit(".", 2)
        owner = getattr(importlib.import_module(module), owner)
        setattr(owner, method, deadly(getattr(owner, method)))
    main(["index", *arguments])


def test_a_build_killed_five_times_equals_one_built_in_one_go(run, model, tmp_path):
    people = tmp_path / "people"
    write_pictures(people, 30)
    (people / "aaa.jpg").write_bytes(b"unreadable, and first of all")
    (people / "cam_1" / "bad.png").write_text("unreadable")
    (people / "zzz.png").write_bytes((people / "cam_0" / "000.jpg").read_bytes())
    options = ["--images", people, "--model", model, "--device", "cpu", "--batch_size", "3", "--copy_images"]
    pick, context = random.Random(), multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mra.cli", "mra.gallery.index_verbs", "pymilvus", "milvus_lite.db"])
    moments = []
    for _ in range(5):
        moments.append((pick.randint(1, 15), pick.random() < 0.5))
        arguments = ["build", "--gallery", str(tmp_path / "killed.db"), *map(str, options)]
        process = context.Process(target=build_and_die, args=(arguments, *moments[-1]))
        process.start()
        process.join(120)
        assert process.exitcode == -signal.SIGKILL, moments
    run("build", "--gallery", tmp_path / "killed.db", *options)
    run("build", "--gallery", tmp_path / "whole.db", *options)
    found = []
    for name in ("killed", "whole"):
        with Gallery(tmp_path / f"{name}.db", encoder=encoder_of(model)) as gallery:
            assert gallery.verify().problems == []
            records = {record.key: record for record in gallery._state.store.records(embeddings=True)}
            tokens = {key: gallery.image_tokens(key).numpy().tobytes() for key in records}
            copies = {path.name for path in gallery.roots[-1].rglob("*.*") if path.is_file()}
            hits = gallery.search("a red coat", top=40).hits
            embeddings = {key: record.embedding.tobytes() for key, record in records.items()}
            found.append((records, embeddings, tokens, copies, [(hit.key, hit.score) for hit in hits], gallery.fields))
    assert len(found[0][0]) == 31
    for killed, whole in zip(*found, strict=True):
        assert killed == whole, moments
