"""Drawing: the same images after a kill, from two processes and from jobs apart."""

import logging
import signal

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from data_scripts.dad import augment_captions, generate, target_pairs
from data_scripts.dad.diffusion import create_controlnet, load_base
from data_scripts.dad.stage_folders import WorkFolder, read_stage_rows
from tests.helpers.dad import SIZE, make_config, run_forked, tree, write_sources


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Sources, and a ControlNet whose zero convolutions are none any more."""
    root = tmp_path_factory.mktemp("generate")
    write_sources(root)
    controlnet = create_controlnet(load_base(str(root / "base")), "white")
    with torch.no_grad():
        for name, parameter in controlnet.named_parameters():
            if name.startswith(("controlnet_down_blocks", "controlnet_mid_block")):
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    controlnet.save_pretrained(root / "controlnet")
    return root


def prepare(root, work, **changes):
    """A work folder whose prompts are made; gives the configuration."""
    changes["generate"] = {"controlnet": str(root / "controlnet")} | changes.get("generate", {})
    config = make_config(root, work, **changes)
    augment_captions.run(config)
    return config


@pytest.fixture(scope="module")
def reference(root):
    """The images of one undisturbed process."""
    config = prepare(root, "reference")
    generate.run(config)
    return tree(WorkFolder(root / "reference").images)


def test_one_image_a_prompt(root, reference):
    prompts = read_stage_rows(WorkFolder(root / "reference").prompts)
    rows = read_stage_rows(WorkFolder(root / "reference").generated)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts] and len(rows) == 12
    assert len({row["seed"] for row in rows}) == 12
    for row in rows:
        with Image.open(WorkFolder(root / "reference").images / row["file_path"]) as image:
            assert image.size == (SIZE[1], SIZE[0]) and row["file_path"] == f"c_0_5000/{row['prompt_id']}.jpg"
    assert len({content for path, content in reference.items() if path.endswith(".jpg")}) == 12


@pytest.mark.parametrize("function, call", [("draw_batch", 2), ("write_whole", 5)])
def test_killed_run_draws_the_same(root, reference, function, call):
    """Between two batches, and in the middle of one; then by one process again."""
    work = f"killed-{function}"
    prepare(root, work)
    assert run_forked("generate", root / f"{work}.yaml", kill=(function, call)) == [-signal.SIGKILL]
    left = tree(WorkFolder(root / work).images)
    assert "generated.jsonl" not in left and left != {}
    assert run_forked("generate", root / f"{work}.yaml") == [0]
    assert tree(WorkFolder(root / work).images) == reference


def test_two_processes_draw_the_same(root, reference):
    prepare(root, "two")
    assert run_forked("generate", root / "two.yaml", num_processes=2) == [0, 0]
    assert tree(WorkFolder(root / "two").images) == reference


def test_the_controlnet_is_heard(root, reference):
    """Another ControlNet draws other images: the comparisons above would not pass without it."""
    generate.run(prepare(root, "quiet", generate={"controlnet_scale": 0.0}))
    quiet = tree(WorkFolder(root / "quiet").images)
    assert quiet.keys() == reference.keys()
    assert not any(quiet[path] == reference[path] for path in quiet if path.endswith(".jpg"))


def test_jobs_apart_draw_the_same(root, reference):
    config = prepare(root, "jobs")
    for shard in ("1/2", "0/2"):
        config.common.shard = shard
        generate.run(config)
    assert tree(WorkFolder(root / "jobs").images) == reference


def test_a_finished_stage_is_passed_over(root, reference, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", lambda *args: pytest.fail("loaded for nothing"))
    generate.run(prepare(root, "reference"))


def test_a_part_of_the_prompts_is_spread_over_all():
    rows = [{"prompt_id": number} for number in range(10)]
    assert [row["prompt_id"] for row in generate.choose_prompts(rows, 4)] == [0, 2, 5, 7]
    assert generate.choose_prompts(rows, None) == rows
    with pytest.raises(ValueError, match=r"`generate.num_images` must be at most the number of prompts, 10, got 11"):
        generate.choose_prompts(rows, 11)


def test_long_prompts_are_told(root, caplog):
    config = prepare(root, "long", generate={"num_images": 2, "prompt_suffix": " and a red bag" * 30})
    with caplog.at_level(logging.WARNING, logger=target_pairs.__name__):
        generate.run(config)
    assert "2 of 2 prompts have more than 77 tokens" in caplog.text


@pytest.mark.parametrize("scheduler", ["euler", "dpm", "unipc"])
def test_samplers_draw(root, scheduler):
    section = {"num_images": 2, "scheduler": scheduler, "image_size": [16, 16], "negative_prompt": "a red bag"}
    config = prepare(root, scheduler, generate=section)
    generate.run(config)
    rows = read_stage_rows(WorkFolder(root / scheduler).generated)
    with Image.open(WorkFolder(root / scheduler).images / rows[1]["file_path"]) as image:
        assert image.size == (16, 16) and image.getextrema() != ((0, 0),) * 3


def test_condition_images_follow_the_source_row(root, monkeypatch):
    folder = root / "edges"
    folder.mkdir()
    for row in range(16):
        Image.new("RGB", (4, 8), (10 * row, 0, 0)).save(folder / f"{row}.png")
    config = prepare(root, "edges-work", common={"condition": "folder", "condition_dir": str(folder)})
    seen, draw = [], generate.draw

    def remember(pipeline, prompts, seeds, conditions, section):
        seen.extend((conditions[:, 0, 0, 0] * 25.5).round().int().tolist())
        return draw(pipeline, prompts, seeds, conditions, section)

    monkeypatch.setattr(generate, "draw", remember)
    generate.run(config)
    assert seen == [row["source_row"] for row in read_stage_rows(WorkFolder(root / "edges-work").prompts)]


def test_the_safety_checker_is_loaded_on_request_alone(root, reference):
    pipeline = StableDiffusionPipeline.from_pretrained(root / "base")
    assert pipeline.safety_checker is None  # the reference drew without one, and the folder has none
    config = prepare(root, "safe", generate={"safety_checker": True})
    with pytest.raises(ValueError, match=r"`generate.safety_checker`.*safety_checker\) cannot be loaded"):
        generate.run(config)


def test_a_missing_controlnet_is_named(root):
    config = prepare(root, "elsewhere", generate={"controlnet": str(root / "nowhere")})
    with pytest.raises(ValueError, match=r"ControlNet: .*nowhere.* cannot be loaded"):
        generate.run(config)
