"""The whole command: stages by name and in order, on again after a stop, errors in one line."""

import runpy
import sys
import types

import pytest

from data_scripts.dad import augment_captions, run
from data_scripts.dad.config import STAGES
from data_scripts.dad.reporting.domain_distance import measure_distance
from data_scripts.dad.stage_folders import FOLDERS, WorkFolder, read_finished
from data_scripts.dad.tiny.make_diffusion import build, read_images
from data_scripts.dad.tiny.make_readers import make_readers
from data_scripts.dad.training_validation import read_errors
from data_scripts.make_sample import main as make_sample
from data_scripts.prepare_pedes import main as prepare_pedes
from data_scripts.prepare_sda import main as prepare_sda
from mra.common.tables import load_split
from tests.helpers.dad import launch_module, tree, write_config, write_sources
from tests.helpers.sources import read_set


SHORT = {
    "train": {"max_train_steps": None, "num_train_epochs": 0, "validation_images": 0},
    "generate": {"num_images": 8, "num_inference_steps": 1},
}
OURS = "train,augment,generate"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_sources(root)
    return root


def test_stages_run_in_order_and_are_found_by_name(monkeypatch):
    ran = []
    for stage in STAGES:
        module = types.ModuleType(stage)
        module.run = lambda config, stage=stage: ran.append((stage, config))
        monkeypatch.setitem(sys.modules, f"data_scripts.dad.{run.MODULES.get(stage, stage)}", module)
    run.main(["--common.work_dir=w", "--common.dataset=d", "--stages", "report,train,caption"])
    assert [stage for stage, _ in ran] == ["train", "caption", "report"] and ran[0][1].common.work_dir == "w"
    ran.clear()
    run.main(["--common.work_dir=w", "--common.dataset=d"])
    assert [stage for stage, _ in ran] == list(STAGES)


def test_every_stage_has_a_module_and_a_folder():
    for stage in STAGES:
        __import__(f"data_scripts.dad.{run.MODULES.get(stage, stage)}")
    assert len(set(FOLDERS.values())) == len(STAGES)


def test_two_processes_run_stage_after_stage_and_draw_what_one_draws(root):
    """The processes' group outlives training; without training steps the images are equal to the last bit."""
    paths = [write_config(root, work, **SHORT) for work in ("one", "two")]
    run.main(["--config", str(paths[0]), "--stages", OURS])
    shown = launch_module("run", "--config", paths[1], "--stages", OURS).stderr
    assert "2 (MULTI_CPU, cpu" in shown
    ones, twos = (WorkFolder(root / work) for work in ("one", "two"))
    assert tree(ones.folder("augment")) == tree(twos.folder("augment"))
    assert tree(ones.images) == tree(twos.images) and len(tree(ones.images)) == 9
    assert read_finished(twos, "generate")["finished"] == {"images": 8}


READING = {
    "filter": {
        "min_width": 8,
        "min_height": 8,
        "min_contrast": 0,
        "min_colour": 0,
        "min_sharpness": 0,
        "min_detail": 0,
    }
    | {"max_detail": 100_000},
    "caption": {"prompt": None, "max_new_tokens": 6},
    "ground": {"box_threshold": 0.0, "text_threshold": 0.0},
    "report": {"images": 8},
}


def call_module(monkeypatch, stage, *arguments):
    """`python -m data_scripts.dad.<module>` in this process."""
    name = f"data_scripts.dad.{run.MODULES.get(stage, stage)}"
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.delitem(sys.modules, name, raising=False)  # as where nothing has imported it
    runpy.run_module(name, run_name="__main__")


def test_every_stage_runs_alone_up_to_a_prepared_set(root, monkeypatch):
    make_readers(root / "readers", ("blip", "grounding"))
    sections = {name: dict(values) for name, values in (SHORT | READING).items()}
    for stage, reader in (("caption", "blip"), ("ground", "grounding")):
        sections[stage]["model"] = str(root / "readers" / reader)
    config = write_config(root, "alone", **sections)
    for stage in STAGES:
        call_module(monkeypatch, stage, "--config", config)
    work = WorkFolder(root / "alone")
    assert {path.name for path in work.root.iterdir()} == {*FOLDERS.values(), "sda"}
    assert "8" in (work.folder("report") / "index.md").read_text()
    prepare_sda(["--annotations", str(work.annotations), "--images", str(work.images), "--output", str(root / "sda")])
    rows = read_set(root / "sda")["train"]
    assert len(rows) == read_finished(work, "filter")["finished"]["kept"] > 0 and any(row["boxes"] for row in rows)


@pytest.mark.parametrize("stage", STAGES)
def test_help_lists_the_arguments_of_the_stage(stage, monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        call_module(monkeypatch, stage, "--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0 and "--common.work_dir" in shown and f"\n{stage}:\n" in shown
    others = set(STAGES) - {stage, "generate"}  # training draws as generation does
    assert not any(f"\n{other}:\n" in shown for other in others)


def test_finished_stages_are_passed_over(root, monkeypatch):
    config = write_config(root, "passed", **SHORT)
    run.main(["--config", str(config), "--stages", "augment"])
    monkeypatch.setattr(augment_captions, "load_target", lambda *args: pytest.fail("read for nothing"))
    run.main(["--config", str(config), "--stages", "augment"])


@pytest.mark.parametrize(
    "arguments, said, code",
    [
        (["--stages", "train,paint"], "--stages: unknown 'paint'", 2),
        (["--generate.batch_sise=3"], "did you mean '--generate.batch_size'", 2),
        (["--stages", "generate"], "stage 'train' was not run; run it first: --stages train", 1),
        (["--stages", "train", "--common.base_model=none"], "`common.base_model` is not set", 1),
        (["--stages", "augment", "--common.dataset=/nowhere"], "does not exist; expected a dataset", 1),
    ],
)
def test_bad_input_ends_the_command(root, capsys, arguments, said, code):
    config = write_config(root, f"bad-{len(said)}")
    with pytest.raises(SystemExit) as end:
        run.main(["--config", str(config), *arguments])
    message = capsys.readouterr().err if code == 2 else end.value.code
    assert said in message and (end.value.code == 2) == (code == 2)


def test_training_halves_the_error_and_draws_closer_to_the_target(tmp_path):
    """On the sample set and through the stages: the error under fixed noise, and the report's distance of the images."""
    sample, size = tmp_path / "sample", [32, 16]
    make_sample(
        ["--output", str(sample), "--sda_pairs", "32", "--train_ids", "12", "--val_ids", "4", "--test_ids", "4"]
    )
    places = ["--annotations", str(sample / "finetune"), "--images", str(sample / "images")]
    prepare_pedes(["--dataset", "cuhk", *places, "--output", str(tmp_path / "pedes"), "--no_size_check"])
    build(
        tmp_path / "base", read_images(sample / "images" / "SDA", size, 0), (32, 32), 100, "sample"
    )  # another domain
    common = {"image_size": size}
    generate = {"num_images": 24, "batch_size": 24, "num_inference_steps": 5, "guidance_scale": 1.0}
    learning = {"max_train_steps": 100, "per_device_batch_size": 8, "learning_rate": "1e-2", "num_warmup_steps": 0.1}
    learning |= {"final_learning_rate": 0.0, "save_steps": None, "validation_steps": None, "validation_images": 0}
    distances = {}
    for work, train in (("trained", learning), ("untrained", SHORT["train"])):
        augment = {"max_captions": 24, "prompts_per_caption": 1}
        config = write_config(tmp_path, work, common=common, train=train, augment=augment, generate=generate)
        run.main(["--config", str(config), "--stages", OURS])
        drawn = sorted((tmp_path / work / "images").rglob("*.jpg"))
        distances[work] = measure_distance(drawn, load_split(str(tmp_path / "pedes"), "train"))
    errors = read_errors(tmp_path / "trained" / "controlnet")
    assert errors[100] < 0.5 * errors[0], errors
    assert distances["trained"].kid < 0.6 * distances["untrained"].kid, distances
    assert distances["trained"].fid < 0.6 * distances["untrained"].fid, distances
