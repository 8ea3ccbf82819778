"""The whole command: stages by name and in order, on again after a stop, errors in one line."""

import json
import sys
import types

import pytest

from data_scripts.dad import run
from data_scripts.dad.layout import FOLDERS, STAGES, WorkFolder
from tests.dad_helpers import launch_module, run_module, tree, write_config, write_sources


SHORT = {
    "train": {"max_train_steps": 2, "validation_images": 0},
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


def test_two_processes_run_stage_after_stage_as_one_does(root):
    """The processes' group outlives training: what follows shares its work, and draws what one process draws."""
    one = write_config(root, "one", **SHORT)
    run_module("run", "--config", one, "--stages", OURS)
    two = write_config(root, "two", **SHORT | {"train": SHORT["train"] | {"per_device_batch_size": 2}})
    launch_module("run", "--config", two, "--stages", OURS)
    ones, twos = (WorkFolder(root / work) for work in ("one", "two"))
    assert tree(ones.folder("augment")) == tree(twos.folder("augment"))
    assert tree(ones.images).keys() == tree(twos.images).keys() and len(tree(ones.images)) == 9
    for folder in (ones, twos):
        assert json.loads((folder.images / "manifest.json").read_text())["finished"] == {"images": 8}
    again = run_module("run", "--config", one, "--stages", OURS)
    assert "ControlNet training" not in again.stderr  # passed over


@pytest.mark.parametrize(
    "arguments, said, code",
    [
        (["--stages", "train,paint"], "--stages: unknown 'paint'", 2),
        (["generate.batch_sise=3"], "did you mean 'batch_size'", 2),
        (["--stages", "caption"], "stage 'filter' was not run", 1),
        (["--stages", "train", "common.base_model=none"], "`common.base_model` is not set", 1),
        (["--stages", "augment", "common.dataset=/nowhere"], "is no prepared set", 1),
    ],
)
def test_bad_input_is_told_in_one_line(root, arguments, said, code):
    config = write_config(root, f"bad-{abs(hash(said))}")
    result = run_module("run", "--config", config, *arguments, check=False)
    assert result.returncode == code and said in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
