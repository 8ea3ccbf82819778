"""The whole command: stages by name and in order, on again after a stop, errors in one line."""

import sys
import types

import pytest

from data_scripts.dad import augment_captions, run
from data_scripts.dad.layout import FOLDERS, STAGES, WorkFolder, read_finished
from tests.dad_helpers import launch_module, run_module, tree, write_config, write_sources


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
    run.main(["common.work_dir=w", "common.dataset=d", "--stages", "report,train,caption"])
    assert [stage for stage, _ in ran] == ["train", "caption", "report"] and ran[0][1].common.work_dir == "w"
    ran.clear()
    run.main(["common.work_dir=w", "common.dataset=d"])
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


def test_finished_stages_are_passed_over(root, monkeypatch):
    config = write_config(root, "passed", **SHORT)
    run.main(["--config", str(config), "--stages", "augment"])
    monkeypatch.setattr(augment_captions, "load_split", lambda *args: pytest.fail("read for nothing"))
    run.main(["--config", str(config), "--stages", "augment"])


def test_bad_input_is_told_in_one_line_without_a_traceback(root):
    shown = run_module("run", "--config", write_config(root, "bad"), "--stages", "generate", check=False)
    assert shown.returncode == 1 and "Traceback" not in shown.stderr
    assert "stage 'train' was not run. Run it first: --stages train." in shown.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    "arguments, said, code",
    [
        (["--stages", "train,paint"], "--stages: unknown 'paint'", 2),
        (["generate.batch_sise=3"], "did you mean 'batch_size'", 2),
        (["--stages", "train", "common.base_model=none"], "`common.base_model` is not set", 1),
        (["--stages", "augment", "common.dataset=/nowhere"], "is no prepared set", 1),
    ],
)
def test_bad_input_ends_the_command(root, capsys, arguments, said, code):
    config = write_config(root, f"bad-{len(said)}")
    with pytest.raises(SystemExit) as end:
        run.main(["--config", str(config), *arguments])
    message = capsys.readouterr().err if code == 2 else end.value.code
    assert said in message and (end.value.code == 2) == (code == 2)
