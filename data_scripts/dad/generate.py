"""Generate one image for each prompt, with the base model and the trained ControlNet.

    python -m data_scripts.dad.generate --config recipes/dad/cuhk.yaml --common.base_model FOLDER_OR_ID
    accelerate launch --multi_gpu --num_processes 8 -m data_scripts.dad.generate --config recipes/dad/cuhk.yaml ...

Batches are fixed and every image has its own seed, so another number of processes, or a run that was killed and restarted,
gives the same images.
"""

import io
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from data_scripts.dad.command import run_stage
from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.diffusion import Conditions, import_diffusers, load_base, require_base
from data_scripts.dad.reading import DTYPES
from data_scripts.dad.sampling import draw, load_safety_checker, make_pipeline
from data_scripts.dad.stage_folders import begin_stage, device_of, image_path, read_stage_rows
from data_scripts.dad.target_pairs import warn_of_cut
from mra.common.files import write_whole
from mra.common.pretrained import load_pretrained
from mra.common.sharding import cut_batches
from mra.training.order import key_to_seed


def choose_prompts(rows: list[dict], num_images: int | None) -> list[dict]:
    """Return the prompts to use, spread evenly over all.

    Raises:
        ValueError: if there are none, or fewer than requested.
    """
    count = len(rows) if num_images is None else num_images
    if not 0 < count <= len(rows):
        raise ValueError(f"`generate.num_images` must be at most the number of prompts, {len(rows)}, got {count}")
    return [rows[index * len(rows) // count] for index in range(count)]


def load_pipeline(config: FactoryConfig, controlnet: str | Path, device: torch.device) -> Any:
    """Load the image pipeline.

    Raises:
        ValueError: if base model or ControlNet cannot be loaded.
    """
    common, section = config.common, config.generate
    base = load_base(common.base_model, common.base_revision)
    network = load_pretrained(import_diffusers().ControlNetModel, str(controlnet), "ControlNet")
    checker = (
        load_safety_checker(require_base(common.base_model), common.base_revision)
        if section.safety_checker
        else (None, None)
    )
    pipeline = make_pipeline(base, network.eval(), section.scheduler, *checker)
    return pipeline.to(device, DTYPES[section.dtype])


def draw_batch(
    pipeline: Any, batch: list[dict], conditions: Conditions, config: FactoryConfig, folder: Path
) -> list[dict]:
    """Generate the images of one batch, write each atomically, and return their rows."""
    section = config.generate
    seeds = [key_to_seed("image", config.common.seed, row["prompt_id"]) for row in batch]
    control = torch.stack([conditions(row["source_row"]) for row in batch])
    images = draw(pipeline, [row["prompt"] for row in batch], seeds, control, section)
    rows = []
    for row, seed, image in zip(batch, seeds, images, strict=True):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=section.jpeg_quality)
        path = image_path(row["prompt_id"])
        write_whole(folder / path, buffer.getvalue())
        rows.append({"file_path": path, "prompt_id": row["prompt_id"], "prompt": row["prompt"], "seed": seed})
    return rows


def run(config: FactoryConfig) -> None:
    """Generate the missing images."""
    common, section = config.common, config.generate
    stage = begin_stage(config, "generate")
    if stage.is_finished:
        return
    prompts = choose_prompts(read_stage_rows(stage.work.prompts), section.num_images)
    pipeline = load_pipeline(config, section.controlnet or stage.work.controlnet, device_of(stage.state))
    if stage.state.is_main_process:
        texts = [row["prompt"] + section.prompt_suffix for row in prompts]
        warn_of_cut(pipeline.tokenizer, texts, "prompts", "their ends are ignored")
    conditions = Conditions(common.condition, section.image_size or common.image_size, common.condition_dir)
    conditions.require(row["source_row"] for row in prompts)
    rows = stage.rows(stage.work.generated)
    done = rows.read().keys()
    batches = stage.shard.own(cut_batches(len(prompts), section.batch_size))
    for batch in tqdm(batches, desc="generate", unit="batch", disable=not stage.state.is_main_process):
        batch = [prompts[index] for index in batch]
        if all(row["prompt_id"] in done for row in batch):
            continue
        made = draw_batch(pipeline, batch, conditions, config, stage.folder)
        rows.append([row for row in made if row["prompt_id"] not in done])
    stage.finish_rows(rows, expected=len(prompts), name="images")


def main(argv: list[str] | None = None) -> None:
    """Run this stage alone."""
    run_stage("data_scripts.dad.generate", run, __doc__, ("generate",), argv)


if __name__ == "__main__":
    main()
