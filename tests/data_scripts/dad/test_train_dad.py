"""Training of the ControlNet: what is trained, what stays neutral, resumed and shared runs, learning in small."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import ControlNetModel
from safetensors.torch import load_file

from data_scripts.dad import train_dad
from data_scripts.dad.command import run_stage
from data_scripts.dad.diffusion import Conditions, create_controlnet, load_base, training_target
from data_scripts.dad.target_pairs import DenoisingPairs, count_cut, list_pairs
from data_scripts.dad.tiny.make_diffusion import build
from data_scripts.dad.train_dad import denoising_errors
from data_scripts.dad.training_validation import read_errors
from tests.helpers.dad import SIZE, make_config, run_forked, tree, write_config, write_sources
from tests.helpers.runs import ROOT, TIMEOUT, read_metrics
from tests.helpers.training import make_pedes


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    write_sources(root)
    return root


@pytest.fixture(scope="module")
def base(root):
    return load_base(str(root / "base"))


@pytest.fixture(scope="module")
def reference(root):
    """Folder of a run that nothing disturbed."""
    assert run_forked("train_dad", write_config(root, "reference")) == [0]
    return root / "reference" / "controlnet"


def make_batch(base, kind="white", count=4):
    rows = make_pedes(count)
    dataset = DenoisingPairs(rows, list_pairs(rows["captions"]), base, Conditions(kind, SIZE), seed=0)
    return torch.utils.data.default_collate([dataset[0, pair] for pair in range(count)])


def test_only_the_controlnet_is_trained(base):
    controlnet = create_controlnet(base, "white")
    denoising_errors(controlnet, base, make_batch(base)).mean().backward()
    assert all(parameter.grad is not None for parameter in controlnet.parameters())
    frozen = [base.unet, base.vae, base.text_encoder]
    assert all(
        parameter.grad is None and not parameter.requires_grad for part in frozen for parameter in part.parameters()
    )


def test_an_untrained_controlnet_changes_nothing(base):
    batch = make_batch(base)
    noisy, text = torch.randn(4, 4, 8, 4), base.text_encoder(batch["input_ids"])[0]
    down, middle = create_controlnet(base, "white")(
        noisy, batch["timesteps"], text, batch["conditions"], return_dict=False
    )
    assert not middle.any() and not any(residual.any() for residual in down)


def test_training_targets():
    class Scheduler:
        class config:
            prediction_type = "epsilon"

        def get_velocity(self, latents, noise, timesteps):
            return latents - noise

    latents, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    scheduler, found = Scheduler(), {}
    for kind in ("epsilon", "v_prediction", "sample"):
        scheduler.config.prediction_type = kind
        found[kind] = training_target(scheduler, latents, noise, torch.tensor([1, 2]))
    assert found["epsilon"] is noise and found["sample"] is latents and found["v_prediction"].equal(latents - noise)
    scheduler.config.prediction_type = "flow"
    with pytest.raises(ValueError, match="'flow'; expected epsilon, v_prediction or sample"):
        training_target(scheduler, latents, noise, None)


def test_the_prediction_type_comes_from_the_schedulers_config(tmp_path):
    folder = build(tmp_path / "base", channels=(8, 16), prediction_type="v_prediction")
    base = load_base(str(folder))
    assert base.scheduler.config.prediction_type == "v_prediction"
    assert denoising_errors(create_controlnet(base, "none"), base, make_batch(base)).shape == (4,)


def test_pairs_follow_from_their_key(base):
    rows = make_pedes(4)
    pairs = list_pairs(rows["captions"])
    assert pairs == [(row, caption) for row in range(4) for caption in range(2)]
    assert len(list_pairs(rows["captions"], 0.5, seed=1)) == 4

    def make():
        return DenoisingPairs(
            rows, pairs, base, Conditions("white", SIZE), 5, flip_probability=0.5, caption_dropout=0.5
        )

    first, second = make(), make()
    [first[0, pair] for pair in range(8)]  # what was asked for before changes nothing
    for name, value in first[3, 2].items():
        assert value.equal(second[3, 2][name])
    assert not first[3, 2]["noise"].equal(first[4, 2]["noise"])
    assert {first[epoch, 0]["pixel_values"].equal(first[0, 0]["pixel_values"]) for epoch in range(9)} == {True, False}
    empty = base.tokenizer([""], padding="max_length", return_tensors="pt").input_ids[0]
    assert {first[epoch, 0]["input_ids"].equal(empty) for epoch in range(9)} == {True, False}


def test_captions_that_name_a_side_are_not_mirrored(base):
    rows = make_pedes(1).remove_columns("captions").add_column("captions", [["a bag in the left hand"]])
    dataset = DenoisingPairs(rows, [(0, 0)], base, Conditions("white", SIZE), 5, flip_probability=1.0)
    plain = DenoisingPairs(rows, [(0, 0)], base, Conditions("white", SIZE), 5)
    assert dataset[0, 0]["pixel_values"].equal(plain[0, 0]["pixel_values"])


def test_long_prompts_are_counted(base):
    assert count_cut(base.tokenizer, ["a man"] * 3 + ["a man " * 60]) == 1
    assert count_cut(base.tokenizer, ["a " * 75, "a " * 76]) == 1  # begin and end take two of the 77


def test_condition_images(tmp_path):
    assert Conditions("none", SIZE)(3).sum() == 0 and Conditions("white", SIZE)(3).mean() == 1
    make_pedes(1)[0]["image"].save(tmp_path / "7.png")
    conditions = Conditions("folder", SIZE, str(tmp_path))
    assert conditions(7).shape == (3, *SIZE) and 0 < conditions(7).mean() < 1
    conditions.require([7, 7])
    for look in (conditions, lambda row: conditions.require([7, row])):
        with pytest.raises(ValueError, match="no image of row 8"):
            look(8)


def test_run(reference, root):
    records = read_metrics(reference)
    assert [record["step"] for record in records if "loss" in record] == [2, 3, 4, 6]
    assert sorted(read_errors(reference)) == [0, 3, 6]
    assert sorted(path.name for path in (reference / "validation").iterdir()) == [
        f"step_{step:06d}.png" for step in (0, 3, 6)
    ]
    controlnet = ControlNetModel.from_pretrained(reference / "final")
    start = create_controlnet(load_base(str(root / "base")), "white")
    assert any(not a.equal(b) for a, b in zip(controlnet.parameters(), start.parameters(), strict=True))
    card = (reference / "final" / "README.md").read_text()
    assert "at step 0" in card and str(root / "base") in card
    assert json.loads((reference / "manifest.json").read_text())["finished"]["steps"] == 6


@pytest.mark.parametrize("batch", [3, 4])
def test_killed_run_gives_the_same_weights(reference, root, batch):
    """SIGKILL between two checkpoints (and while validating), then the same command again."""
    config = write_config(root, f"killed-{batch}")
    # the first three calls measure the start: 6 pairs x 2 draws in batches of 4
    assert run_forked("train_dad", config, kill=("denoising_errors", 3 + batch)) == [-signal.SIGKILL]
    assert run_forked("train_dad", config) == [0]
    killed = root / f"killed-{batch}" / "controlnet"
    assert read_metrics(killed) == read_metrics(reference)
    ours, theirs = (load_file(folder / "final/diffusion_pytorch_model.safetensors") for folder in (killed, reference))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_two_processes_train_as_one_with_the_whole_batch(reference, root):
    config = write_config(root, "two", train={"per_device_batch_size": 2})
    assert run_forked("train_dad", config, num_processes=2) == [0, 0]
    ours, theirs = read_metrics(root / "two" / "controlnet"), read_metrics(reference)
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        if "validation" in mine:
            assert mine["validation"]["mse"] == pytest.approx(other["validation"]["mse"], rel=1e-4)
        else:
            assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_without_condition_the_control_image_stays_unseen(root):
    """Trained weights, and still no image whatever changes a single bit."""
    train = {"max_train_steps": 3, "validation_images": 0, "gradient_accumulation_steps": 2, "mixed_precision": "bf16"}
    train |= {"gradient_checkpointing": True}
    config = write_config(root, "none", common={"condition": "none"}, train=train)
    assert run_forked("train_dad", config) == [0]
    controlnet = ControlNetModel.from_pretrained(root / "none" / "controlnet" / "final")
    noisy, text, timesteps = torch.randn(2, 4, 8, 4), torch.randn(2, 77, 32), torch.tensor([5, 900])
    images = [torch.zeros(2, 3, *SIZE), torch.ones(2, 3, *SIZE), torch.rand(2, 3, *SIZE)]
    with torch.no_grad():
        assert not controlnet.controlnet_cond_embedding(images[2]).any()
        outputs = [controlnet(noisy, timesteps, text, image, return_dict=False) for image in images]
    for down, middle in outputs[1:]:
        assert middle.equal(outputs[0][1]) and all(a.equal(b) for a, b in zip(down, outputs[0][0], strict=True))
    assert outputs[0][1].any()  # it was trained


def test_no_steps_keep_the_base_model(root):
    config = write_config(root, "untrained", train={"max_train_steps": None, "num_train_epochs": 0})
    assert run_forked("train_dad", config) == [0]
    weights = load_file(root / "untrained/controlnet/final/diffusion_pytorch_model.safetensors")
    assert not any(tensor.any() for name, tensor in weights.items() if name.startswith("controlnet_down_blocks"))


def test_other_settings_are_refused_in_one_line(reference, root):
    before, arguments = tree(reference), ["--config", str(root / "reference.yaml"), "--train.learning_rate=1"]
    with pytest.raises(SystemExit, match=r"train\.learning_rate \(0\.003 then, 1\.0 now\)"):
        run_stage("train_dad", train_dad.run, "", ("train",), arguments)
    assert tree(reference) == before


@pytest.mark.parametrize("base", [None, "/nowhere"])
def test_a_base_model_must_be_named_and_there(root, base):
    config = make_config(root, f"base-{base is None}", common={"base_model": base})
    with pytest.raises(ValueError, match=r"`common.base_model`"):
        load_base(config.common.base_model)


def test_controlnet_is_pushed_once_also_after_training(root, hub_server):
    train = {"max_train_steps": None, "num_train_epochs": 0, "validation_images": 0, "validation_pairs": 2}
    config = write_config(root, "pushed", train=train)
    assert run_forked("train_dad", config) == [0]
    command = [sys.executable, "-c", _PUSH_TWICE, str(config)]
    run = subprocess.run(
        command, cwd=ROOT, env=hub_server.environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("pushed ") == 1
    files = hub_server.files("user/dad")
    assert {"config.json", "diffusion_pytorch_model.safetensors", "README.md"} <= files.keys()
    card = files["README.md"].read_text()
    assert 'ControlNetModel.from_pretrained("user/dad")' in card and "at step 0" in card


_PUSH_TWICE = """
import sys
from data_scripts.dad import train_dad
from data_scripts.dad.command import with_plain_errors
from tests.helpers.dad import load_config

config = load_config(sys.argv[1], ["--train.push_to_hub=true", "--train.hub_model_id=user/dad"])
for _ in range(2):
    with_plain_errors("train_dad", lambda: train_dad.run(config), config.common.work_dir)
"""
