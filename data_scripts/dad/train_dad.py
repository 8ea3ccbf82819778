"""Train a ControlNet that aligns a frozen Stable Diffusion with the target dataset (paper: domain-aligned data).

One process, or the eight GPUs of a machine:

    python -m data_scripts.dad.train_dad --config recipes/dad/cuhk.yaml --common.base_model FOLDER_OR_ID
    accelerate launch --multi_gpu --num_processes 8 -m data_scripts.dad.train_dad --config recipes/dad/cuhk.yaml ...

The same command continues after an interruption. SIGTERM saves a checkpoint and stops the run.
"""

import signal
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from data_scripts.dad.command import run_stage
from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.controlnet_card import build_controlnet_card, save_controlnet
from data_scripts.dad.diffusion import BaseModel, Conditions, create_controlnet, load_base, to_latents, training_target
from data_scripts.dad.sections import TrainSection
from data_scripts.dad.stage_folders import Stage, begin_stage
from data_scripts.dad.target_pairs import DenoisingPairs, list_pairs, warn_of_cut
from data_scripts.dad.target_set import load_target
from data_scripts.dad.training_validation import Validation, read_errors
from mra.common.files import write_whole
from mra.common.workers import leave_process_group
from mra.training.arguments import OptimizationArguments, RunArguments
from mra.training.checkpointing import Checkpointer, TrainingState, load_checkpoint, start_output_dir
from mra.training.metrics_log import LossWindow, MetricsLog
from mra.training.model_card import push_folder
from mra.training.optim import create_schedule
from mra.training.order import KeyedSampler
from mra.training.runtime import (
    StopSignal,
    create_accelerator,
    describe_plan,
    group_factor,
    make_plan,
    progress_bar,
    show_banner,
    start_trackers,
)


logger = get_logger(__name__)

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16}


def split_arguments(
    train: TrainSection, seed: int, output_dir: str | Path
) -> tuple[RunArguments, OptimizationArguments]:
    """Convert the section to the arguments of the training helpers."""
    run = RunArguments(
        output_dir=str(output_dir),
        num_train_epochs=train.num_train_epochs,
        max_train_steps=train.max_train_steps,
        gradient_accumulation_steps=train.gradient_accumulation_steps,
        mixed_precision=train.mixed_precision,
        seed=seed,
        logging_steps=train.logging_steps,
        log_with=train.log_with,
        save_steps=train.save_steps,
        save_total_limit=train.save_total_limit,
        resume=train.resume,
        resume_without_manifest=train.resume_without_manifest,
    )
    final = train.learning_rate if train.final_learning_rate is None else train.final_learning_rate
    optim = OptimizationArguments(
        learning_rate=train.learning_rate,
        final_learning_rate=final,
        num_warmup_steps=train.num_warmup_steps,
        max_grad_norm=train.max_grad_norm,
    )
    return run, optim


def build_loader(dataset: DenoisingPairs, sampler: KeyedSampler, train: TrainSection, seed: int) -> DataLoader:
    """Build a loader of per-process batches in the sampler's order; `accelerate` distributes them over processes."""
    return DataLoader(
        dataset,
        batch_size=train.per_device_batch_size,
        sampler=sampler,
        drop_last=True,
        num_workers=train.num_workers,
        persistent_workers=train.num_workers > 0,
        worker_init_fn=leave_process_group,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )


def denoising_errors(controlnet: nn.Module, base: BaseModel, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error of each pair's prediction over its latents: `(batch,)`.

    Args:
        controlnet: the prepared model.
        base: the frozen parts.
        batch: stacked items of [`DenoisingPairs`].
    """
    dtype = base.unet.dtype
    with torch.no_grad():
        latents = to_latents(base.vae, batch["pixel_values"], batch["latent_noise"])
        text = base.text_encoder(batch["input_ids"])[0]
        noise, timesteps = batch["noise"].to(dtype), batch["timesteps"]
        noisy = base.scheduler.add_noise(latents, noise, timesteps)
        target = training_target(base.scheduler, latents, noise, timesteps)
    down, middle = controlnet(noisy, timesteps, text, batch["conditions"].to(dtype), return_dict=False)
    prediction = base.unet(
        noisy,
        timesteps,
        text,
        down_block_additional_residuals=[residual.to(dtype) for residual in down],
        mid_block_additional_residual=middle.to(dtype),
    ).sample
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))


def push_once(stage: Stage, config: FactoryConfig) -> None:
    """Push the trained ControlNet if requested and not done yet, even if an earlier run trained it."""
    train, finished = config.train, stage.manifest["finished"]
    if not train.push_to_hub or finished.get("pushed_to") == train.hub_model_id:
        return
    if stage.state.is_main_process:
        errors = {int(step): error for step, error in finished["validation_errors"].items()}
        card = build_controlnet_card(config, finished["steps"], errors)  # the card names the repository
        write_whole(stage.work.controlnet / "README.md", card)
        push_folder(stage.work.controlnet, train, "Upload ControlNet")
    stage.finish(**finished | {"pushed_to": train.hub_model_id})


def run(config: FactoryConfig) -> None:
    """Train the configured ControlNet, or continue its training."""
    # Parse
    common, train = config.common, config.train
    stage = begin_stage(config, "train", splits=False)
    if stage.is_finished:
        push_once(stage, config)
        return
    run, optim = split_arguments(train, common.seed, stage.folder)
    recipe = {"common": config.deciding("common"), "train": config.deciding("train")}

    # Accelerator
    accelerator = create_accelerator(run)
    stop = StopSignal()
    checkpoint = start_output_dir(accelerator, run, recipe, "--train.{} {}".format)
    set_seed(run.seed)

    # Data
    base = load_base(common.base_model, common.base_revision)
    base.to(accelerator.device, PRECISIONS.get(accelerator.mixed_precision, torch.float32))
    rows = load_target(common.dataset)
    conditions = Conditions(common.condition, common.image_size, common.condition_dir)
    captions = list(rows["captions"])
    pairs = list_pairs(captions, train.data_fraction, common.seed)
    conditions.require(row for row, _ in pairs)
    if accelerator.is_main_process:
        texts = [captions[row][index] for row, index in pairs]
        warn_of_cut(base.tokenizer, texts, "captions", "their ends are ignored")
    dataset = DenoisingPairs(
        rows,
        pairs,
        base,
        conditions,
        common.seed,
        caption_dropout=train.caption_dropout,
        flip_probability=train.flip_probability,
    )
    sampler = KeyedSampler(len(dataset), run.seed)
    loader = build_loader(dataset, sampler, train, run.seed)

    # Model
    controlnet = create_controlnet(base, common.condition)
    if train.gradient_checkpointing:
        controlnet.enable_gradient_checkpointing()
        base.unet.enable_gradient_checkpointing()

    # Optimizer and schedule
    plan = make_plan(len(dataset), train.per_device_batch_size, accelerator.num_processes, run)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in controlnet.parameters() if parameter.requires_grad],
        lr=optim.learning_rate,
        betas=(train.adam_beta1, train.adam_beta2),
        weight_decay=train.weight_decay,
        fused=accelerator.device.type in ("cuda", "cpu"),
    )
    schedule = create_schedule(optim, plan.total_steps)

    # Prepare
    controlnet, optimizer, loader = accelerator.prepare(controlnet, optimizer, loader)
    scheduler = LambdaLR(optimizer, schedule)
    state = TrainingState()
    accelerator.register_for_checkpointing(scheduler, state)
    window, log = LossWindow(accelerator, controlnet, run.output_dir), MetricsLog(accelerator, run.output_dir, state)
    checkpointer = Checkpointer(accelerator, run.output_dir, recipe, run.save_steps, None, run.save_total_limit)
    validation = Validation(accelerator, base, config, stage.folder / "validation", denoising_errors)
    start_trackers(accelerator, run.project_name, recipe)
    facts = describe_plan(accelerator, controlnet, plan, run, train.per_device_batch_size, len(dataset))
    show_banner("ControlNet training", facts | {"condition": common.condition, "base model": common.base_model})

    # Resume
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint, recipe, state, scheduler, plan.samples_per_batch)
    log.cut_back(checkpoint)  # also if a killed run logged but left no checkpoint
    if state.step == 0:
        validation.run(controlnet, log, state.step)

    # Loop
    progress = progress_bar(accelerator, plan.total_steps, state.step)
    for _ in range(state.epoch, plan.num_epochs):
        sampler.set_position(state.epoch, state.samples_in_epoch)
        controlnet.train()
        for index, batch in enumerate(loader):
            if state.step >= plan.total_steps:
                break
            with accelerator.accumulate(controlnet):
                loss = denoising_errors(controlnet, base, batch).mean()
                accelerator.backward(loss * group_factor(accelerator, index, len(loader)))
                if accelerator.sync_gradients and optim.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(controlnet.parameters(), optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            window.add({"loss": loss}, batch, state, plan.samples_per_batch, scheduler.get_last_lr()[0])
            state.count_batch(plan.samples_per_batch)
            if not accelerator.sync_gradients:
                continue
            scheduler.step()
            state.step += 1
            progress.update()
            is_last = accelerator.gradient_state.end_of_dataloader or state.step == plan.total_steps
            is_validated = validation.is_due(state.step, plan.total_steps)
            if is_last or is_validated or state.step % run.logging_steps == 0 or checkpointer.is_step_due(state.step):
                record = log.write(**window.flush())
                progress.set_postfix(loss=f"{record['loss']:.3f}")
                if is_validated:
                    validation.run(controlnet, log, state.step)
                    window.pause()
                is_due, is_stopped = checkpointer.agree(state.step, stop.received)
                if is_due:
                    checkpointer.save(state.step)
                if is_stopped:
                    logger.info(f"stopped by SIGTERM after step {state.step}; the same command continues from there")
                    accelerator.end_training()
                    raise SystemExit(128 + signal.SIGTERM)
        state.end_epoch()

    # Save
    progress.close()
    accelerator.wait_for_everyone()
    errors = read_errors(run.output_dir)
    card = build_controlnet_card(config, state.step, errors)
    save_controlnet(accelerator, controlnet, stage.work.controlnet, card)
    for tracker in accelerator.trackers:  # `end_training` would also end the process group, which later stages need
        tracker.finish()
    stage.finish(steps=state.step, pairs=state.samples_seen, validation_errors=errors)
    push_once(stage, config)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main(argv: list[str] | None = None) -> None:
    """Run this stage alone."""
    run_stage("data_scripts.dad.train_dad", run, __doc__, ("train", "generate"), argv)


if __name__ == "__main__":
    main()
