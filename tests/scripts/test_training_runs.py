"""The training scripts themselves, on a few tiny rows: through `accelerate launch`, killed, stopped and resumed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModel

from mra.training.checkpointing import list_checkpoints
from tests.helpers.runs import (
    ROOT,
    TIMEOUT,
    launch,
    launch_environment,
    read_metrics,
    run_forked,
    write_recipe,
    write_sets,
)


SCRIPTS = {"pretrain": "train_pretrain", "finetune": "train_finetune"}
STEPS = {("pretrain", 1): 16, ("pretrain", 2): 8, ("finetune", 1): 16, ("finetune", 2): 8}
TERMS = {
    "pretrain": {"itc_loss", "itm_loss", "mlm_loss", "region_itc_loss", "region_itm_loss"},
    "finetune": {"itc_loss", "itm_loss", "mlm_loss", "augmented_itc_loss", "augmented_itm_loss"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sets, tokenizer, one recipe of each stage, and in `start` what a short pretraining gave."""
    root = tmp_path_factory.mktemp("runs")
    write_sets(root)
    recipe = write_recipe(root, "pretrain", validation_dataset=None, max_train_steps=1, output_dir=str(root / "seed"))
    assert run_forked("train_pretrain", "--config", recipe) == [0]
    shutil.copytree(root / "seed" / "final", root / "start")
    return root


@pytest.fixture(scope="module")
def reference(root):
    """Folder of a run that nothing disturbed, by stage and number of processes, through `accelerate launch`."""
    runs = {}

    def run(stage, num_processes):
        if (stage, num_processes) not in runs:
            output_dir = root / f"{stage}-{num_processes}"
            recipe = write_recipe(root, stage)
            config = "cpu" if num_processes == 1 else "ddp_4x3090"
            arguments = [f"{SCRIPTS[stage]}.py", "--config", recipe, "--output_dir", output_dir]
            shown = launch(*arguments, num_processes=num_processes, config=config)
            runs[stage, num_processes] = output_dir, shown.stderr
        return runs[stage, num_processes]

    return run


@pytest.mark.parametrize(
    "stage, num_processes",
    [case if case != ("finetune", 1) else pytest.param(*case, marks=pytest.mark.slow) for case in STEPS],
)
def test_launched_run(reference, stage, num_processes):
    output_dir, shown = reference(stage, num_processes)
    kind = "(NO, cpu)" if num_processes == 1 else "(MULTI_CPU, cpu:0)"
    assert f"{num_processes} {kind}" in shown
    records = read_metrics(output_dir)
    training = [record for record in records if "loss" in record]
    validation = [record["validation"] for record in records if "validation" in record]
    assert training[-1]["step"] == STEPS[stage, num_processes] and training[-1]["samples"] == 64
    assert TERMS[stage] | {"loss", "learning_rate"} <= training[0].keys()
    assert len(validation) == 2 and {"similarity", "reranked"} == validation[0].keys()
    assert [path.name for path in list_checkpoints(output_dir)][-1] == f"checkpoint-{training[-1]['step'] // 3 * 3}"
    for name in ("best", "final"):
        model, info = AutoModel.from_pretrained(output_dir / name, trust_remote_code=True, output_loading_info=True)
        assert not info["missing_keys"] and type(model).__name__ == "MRAModel"
        card = (output_dir / name / "README.md").read_text()
        assert "model-index" in card and "R@1 (after re-ranking)" in card
    recipe = yaml.safe_load((output_dir / "recipe.yaml").read_text())
    assert recipe["learning_rate"] == 1e-3 and recipe["save_total_limit"] == 2
    assert json.loads((output_dir / "environment.json").read_text())["libraries"]["torch"]


def test_learning_rates_of_the_run(reference):
    """16 steps of which 2 warm up: the first has none, the last is one step from the end of the linear schedule."""
    records = [record for record in read_metrics(reference("pretrain", 1)[0]) if "loss" in record]
    rates = {record["step"]: record["learning_rate"] for record in records}
    assert (
        rates[2] == pytest.approx(5e-4) and rates[3] == pytest.approx(1e-3) and rates[16] == pytest.approx(1e-3 / 14)
    )


@pytest.mark.parametrize("stage, num_processes", [("pretrain", 1), ("finetune", 2)])
def test_killed_and_stopped_run_gives_the_same_losses(reference, root, stage, num_processes):
    """SIGKILL at a random batch, resumed, SIGTERM at another, resumed: the records are those of one run."""
    expected, _ = reference(stage, num_processes)
    output_dir = root / f"{stage}-{num_processes}-killed"
    script, recipe = SCRIPTS[stage], write_recipe(root, stage)
    arguments = ["--config", recipe, "--output_dir", output_dir]
    steps = STEPS[stage, num_processes]
    killed = random.randrange(4, steps - 1)
    stopped = random.randrange(killed + 1, steps)
    victim = num_processes - 1
    last = f"killed at {killed}, stopped at {stopped}"

    codes = run_forked(script, *arguments, num_processes=num_processes, fault=(victim, killed, signal.SIGKILL))
    assert codes[victim] == -signal.SIGKILL and 0 not in codes, last  # the other may see it die and fail first
    (output_dir / "checkpoints" / ".unfinished-run-checkpoint-99").mkdir()
    resume = [*arguments, "--resume", "latest"]
    codes = run_forked(script, *resume, num_processes=num_processes, fault=(victim, stopped, signal.SIGTERM))
    assert codes == [0] * num_processes, last
    if stopped < steps - 1:
        assert not (output_dir / "final").exists(), last
    assert list_checkpoints(output_dir)[-1].name in (f"checkpoint-{stopped + 1}", f"checkpoint-{stopped + 2}"), last
    assert run_forked(script, *resume, num_processes=num_processes) == [0] * num_processes

    assert read_metrics(output_dir) == read_metrics(expected), last
    assert not list((output_dir / "checkpoints").glob(".unfinished*"))
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (output_dir, expected))
    assert all(ours[name].equal(theirs[name]) for name in theirs), last


@pytest.mark.parametrize(
    ("stage", "num_processes"), [("pretrain", 1), pytest.param("finetune", 2, marks=pytest.mark.slow)]
)
def test_averaged_weights_are_validated_saved_and_resumed(reference, root, stage, num_processes):
    """The trained weights are those of a run without average; a killed run averages as one that nothing disturbed."""
    expected, _ = reference(stage, num_processes)
    changes = {"ema_decay": 0.8, "eval_queries": 5, "eval_whole_epochs": 1, "selection_metric": "mAP"}
    arguments = [SCRIPTS[stage], "--config", write_recipe(root, stage, **changes), "--output_dir"]
    whole, killed = root / f"{stage}-averaged", root / f"{stage}-averaged-killed"
    assert run_forked(*arguments, whole, num_processes=num_processes) == [0] * num_processes
    fault = (num_processes - 1, STEPS[stage, num_processes] - 2, signal.SIGKILL)  # after the first validation
    assert 0 not in run_forked(*arguments, killed, num_processes=num_processes, fault=fault)
    codes = run_forked(*arguments, killed, "--resume", "latest", num_processes=num_processes)
    assert codes == [0] * num_processes

    assert read_metrics(killed) == read_metrics(whole)
    weights = {
        name: load_file(name / "model.safetensors")
        for name in (expected / "final", whole / "final", whole / "final_ema", killed / "final", killed / "final_ema")
    }
    of_expected, trained, averaged, resumed, resumed_average = weights.values()
    for ours, theirs in ((trained, of_expected), (resumed, of_expected), (resumed_average, averaged)):
        assert ours.keys() == theirs.keys() and all(ours[name].equal(theirs[name]) for name in theirs)
    assert not all(averaged[name].equal(trained[name]) for name in trained)
    validations = [record for record in read_metrics(whole) if "validation_ema" in record]
    assert len(validations) == 2 and validations[0]["validation_ema"].keys() == {"similarity", "reranked"}
    for name, sample in (("best_ema", False), ("final_ema", False), ("earlier_best_ema/epoch-1", True)):
        card = (whole / name / "README.md").read_text()
        assert ("5 captions drawn by seed 42 as queries" in card) is sample and "keeps a share of 0.8" in card, name
        assert ("Selected as the best" in card) is (name != "final_ema"), name
    assert "moving averages" not in (whole / "best" / "README.md").read_text()


def test_a_signal_to_the_whole_process_group_saves_and_stops(root):
    """`timeout` and many schedulers signal the group, in which the workers of the data loader would be."""
    output_dir = root / "group"
    changes = {"num_workers": 1, "logging_steps": 1, "num_train_epochs": 500, "validation_dataset": None}
    recipe = write_recipe(root, "pretrain", **changes)
    command = [sys.executable, ROOT / "train_pretrain.py", "--config", recipe, "--output_dir", output_dir]
    with (root / "group.txt").open("w") as shown:
        run = subprocess.Popen(
            command, cwd=ROOT, env=launch_environment(), stdout=shown, stderr=shown, start_new_session=True
        )
        deadline = time.monotonic() + TIMEOUT
        while not (output_dir / "metrics.jsonl").is_file() or len(read_metrics(output_dir)) < 2:
            assert run.poll() is None and time.monotonic() < deadline, (root / "group.txt").read_text()
            time.sleep(0.1)
        os.killpg(run.pid, signal.SIGTERM)
        assert run.wait(TIMEOUT) == 0, (root / "group.txt").read_text()
    assert list_checkpoints(output_dir) and not (output_dir / "final").exists()


@pytest.mark.parametrize(
    ("stage", "num_processes", "damaged"),
    [("pretrain", 1, "random_states_0.pkl"), ("finetune", 2, "random_states_1.pkl")],
)
def test_damaged_checkpoint_stops_a_run_and_a_queue_goes_on_without_it(reference, root, stage, num_processes, damaged):
    expected, _ = reference(stage, num_processes)
    output_dir = root / f"{stage}-{num_processes}-damaged"
    shutil.copytree(expected, output_dir)
    older, newest = list_checkpoints(output_dir)
    (newest / damaged).write_bytes((newest / damaged).read_bytes()[:100])
    script, arguments = SCRIPTS[stage], ["--config", write_recipe(root, stage), "--output_dir", output_dir]
    assert run_forked(script, *arguments, "--resume", "latest", num_processes=num_processes) == [1] * num_processes
    assert list_checkpoints(output_dir) == [older, newest]
    with (output_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "lo')
    codes = run_forked(script, *arguments, "--resume", "latest_whole", num_processes=num_processes)
    assert codes == [0] * num_processes
    assert list_checkpoints(output_dir) == [older, newest] and not list(newest.parent.glob("set-aside*"))
    assert read_metrics(output_dir) == read_metrics(expected)
    ours, theirs = (load_file(folder / "final" / "model.safetensors") for folder in (output_dir, expected))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_accumulation_workers_and_precision(root):
    """Accumulated batches, workers, compiled-free bf16 in chunks and a tracker in one run that stops at a number of steps."""
    pytest.importorskip("tensorboard")
    output_dir = root / "accumulated"
    recipe = write_recipe(root, "finetune", gradient_accumulation_steps=3, num_workers=1, max_train_steps=5)
    arguments = ["--mixed_precision", "bf16", "--gradient_checkpointing", "selective", "--log_with", "tensorboard"]
    arguments += ["--chunk_size", "3"]
    assert run_forked("train_finetune", "--config", recipe, "--output_dir", output_dir, *arguments) == [0]
    training = [record for record in read_metrics(output_dir) if "loss" in record]
    # 8 batches an epoch: steps of 3, 3 and 2 batches of 4 pairs
    assert [(record["step"], record["samples"]) for record in training if record["step"] in (3, 5)] == [
        (3, 32),
        (5, 56),
    ]
    assert list(output_dir.rglob("events.out.tfevents*"))


def test_identities_are_held_out_where_there_is_no_validation(root):
    changes = {"dataset": str(root / "icfg"), "num_train_epochs": 1}
    recipe = write_recipe(root, "finetune", validation_fraction=0.3, **changes)
    assert run_forked("train_finetune", "--config", recipe, "--output_dir", root / "held") == [0]
    assert (root / "held" / "best").is_dir() and read_metrics(root / "held")[-2]["samples"] == 28
    recipe = write_recipe(root, "finetune", **changes)
    assert run_forked("train_finetune", "--config", recipe, "--output_dir", root / "last") == [0]
    assert not (root / "last" / "best").exists() and (root / "last" / "final").is_dir()
    assert "not evaluated" in (root / "last" / "final" / "README.md").read_text()


def test_region_and_augmentation_terms_can_be_left_out(root):
    recipe = write_recipe(root, "pretrain", region_weight=0, max_train_steps=2, data_fraction=0.5)
    assert run_forked("train_pretrain", "--config", recipe, "--output_dir", root / "no-regions") == [0]
    recipe = write_recipe(root, "finetune", augmentation_weight=0, max_train_steps=2)
    assert run_forked("train_finetune", "--config", recipe, "--output_dir", root / "no-eda") == [0]
    for name in ("no-regions", "no-eda"):
        terms = {term for term in read_metrics(root / name)[0] if term.endswith("loss")}
        assert terms == {"loss", "itc_loss", "itm_loss", "mlm_loss"}


def test_non_finite_loss_stops_every_process(root):
    output_dir = root / "broken"
    changes = {"learning_rate": "1e20", "num_warmup_steps": 0, "logging_steps": 4, "save_steps": 4}
    recipe = write_recipe(root, "finetune", **changes, max_grad_norm=None)
    codes = run_forked("train_finetune", "--config", recipe, "--output_dir", output_dir, num_processes=2)
    assert codes == [1, 1]
    diagnostic = json.loads(next(output_dir.glob("non_finite_step_*.json")).read_text())
    assert "loss" in diagnostic["non_finite_terms"] and len(diagnostic["identity_ids"]) == 8
    assert list_checkpoints(output_dir) == [] and not (output_dir / "metrics.jsonl").exists()


def test_unknown_arguments_and_other_runs_are_refused(root):
    recipe = write_recipe(root, "pretrain", region_wieght=0.5)
    assert run_forked("train_pretrain", "--config", recipe, "--output_dir", root / "unknown") == [2]
    assert not (root / "unknown").exists()
    recipe = write_recipe(root, "pretrain")
    assert run_forked("train_pretrain", "--config", recipe, "--output_dir", root / "seed") == [1]


def test_best_model_is_pushed_and_loads_from_the_hub(root, hub_server, tmp_path):
    recipe = write_recipe(root, "finetune", max_train_steps=2, push_to_hub=True, hub_model_id="user/mra-tiny")
    command = [
        sys.executable,
        str(ROOT / "train_finetune.py"),
        "--config",
        str(recipe),
        "--output_dir",
        tmp_path / "run",
    ]
    run = subprocess.run(
        command, env=hub_server.environment(), cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
    )
    assert run.returncode == 0, run.stderr
    files = hub_server.files("user/mra-tiny")
    best = tmp_path / "run" / "best"
    assert {path.name: path.read_bytes() for path in best.iterdir()} == {
        name: path.read_bytes() for name, path in files.items() if name != ".gitattributes"
    }
    assert "model-index" in files["README.md"].read_text()
    code = (
        "from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained('user/mra-tiny', trust_remote_code=True)\n"
        "processor = AutoProcessor.from_pretrained('user/mra-tiny', trust_remote_code=True)\n"
        "print(model.get_text_features(**processor(text='a man')).shape)\n"
    )
    shown = subprocess.run(
        [sys.executable, "-I", "-c", code],
        env=hub_server.environment("reader", login=False),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert "torch.Size([1, 16])" in shown.stdout, shown.stderr
