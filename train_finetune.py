"""Fine-tune MRA on one person-retrieval dataset: the losses of pretraining on captions and on augmented captions.

One machine of four GPUs, as published:

    accelerate launch --config_file accelerate_configs/zero2_4xa100.yaml train_finetune.py --config recipes/finetune_cuhk.yaml

The sample set on a CPU:

    accelerate launch --config_file accelerate_configs/cpu.yaml train_finetune.py --config recipes/sample/finetune.yaml

An interrupted run continues with --resume latest. SIGTERM to the training processes saves a checkpoint and stops them.
"""

from pathlib import Path

from mra.common.arguments import parse_arguments, resolved_recipe
from mra.training.arguments import FINETUNING as THEMES
from mra.training.arguments import FinetuneDataArguments


if __name__ == "__main__":
    # Answer --help and report typos before the imports below, which take seconds.
    parse_arguments(THEMES, description=__doc__)

import torch
from accelerate.logging import get_logger
from accelerate.utils import set_seed
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from configuration_mra import MRAConfig
from mra.common.command_line import plain_errors
from mra.common.streaming import make_streaming
from mra.common.tables import Table, files_digest, load_split
from mra.common.workers import leave_process_group
from mra.training.augmentation import create_augmenter
from mra.training.averaging import check_averaging, create_average, models_of_run, update_average
from mra.training.checkpointing import Checkpointer, TrainingState, load_checkpoint, save_model, start_output_dir
from mra.training.collator import TrainingCollator
from mra.training.data import TrainingDataset, build_finetuning_dataset
from mra.training.metrics_log import LossWindow, MetricsLog
from mra.training.model_card import build_card, push_folder
from mra.training.model_setup import create_config, create_model, create_processor
from mra.training.optim import create_optimizer, create_schedule
from mra.training.order import KeyedSampler, make_sampler
from mra.training.runtime import (
    StopSignal,
    configure_deepspeed,
    create_accelerator,
    describe_plan,
    group_factor,
    make_plan,
    progress_bar,
    seed_negatives,
    show_banner,
    start_trackers,
    synchronize_batchnorm,
)
from mra.training.splits import hold_out_identities
from mra.training.validation import count_queries, describe_selection, record_best, validate
from processing_mra import MRAProcessor


logger = get_logger(__name__)


def build_datasets(
    data: FinetuneDataArguments, processor: MRAProcessor, config: MRAConfig, seed: int
) -> tuple[TrainingDataset, Table | None]:
    """Build the training set, with augmented captions if they are used, and the validation set, if any."""
    train = load_split(data.dataset, "train", make_streaming(data))
    validation = load_split(data.dataset, "validation", optional=True)
    if validation is None:
        train, validation = hold_out_identities(train, data.validation_fraction, seed)
    elif data.validation_fraction > 0:
        raise ValueError(
            f"`validation_fraction` is {data.validation_fraction}, but {data.dataset!r} has a validation split, which "
            "is used instead: leave it out"
        )
    dataset = build_finetuning_dataset(
        train,
        processor,
        seed=seed,
        augmenter=create_augmenter(data) if config.augmentation_weight > 0 else None,
        flip_probability=data.flip_probability,
        erasing_probability=data.erasing_probability,
        image_backend=data.image_backend,
    )
    return dataset, validation


def build_loader(
    dataset: TrainingDataset, sampler: KeyedSampler, processor: MRAProcessor, data: FinetuneDataArguments, seed: int
) -> DataLoader:
    """Build a loader of per-process batches in the sampler's order; `accelerate` distributes them over processes."""
    collator = TrainingCollator(
        processor.tokenizer,
        processor.max_text_length,
        mlm_probability=data.mlm_probability,
        mlm_max_masked=data.mlm_max_masked,
        mlm_mask_padding=data.mlm_mask_padding,
        whole_word_masking=data.whole_word_masking,
        skipgram_probability=data.skipgram_probability,
        skipgram_max_length=data.skipgram_max_length,
    )
    return DataLoader(
        dataset,
        batch_size=data.per_device_batch_size,
        sampler=sampler,
        collate_fn=collator,
        drop_last=True,
        num_workers=data.num_workers,
        persistent_workers=data.num_workers > 0,
        worker_init_fn=leave_process_group,
        pin_memory=torch.cuda.is_available(),
        # A separate generator: opening the loader must not advance the random state of dropout.
        generator=torch.Generator().manual_seed(seed),
    )


def main(argv: list[str] | None = None) -> None:
    """Fine-tune a model from a recipe and the command line."""
    # Parse
    arguments = parse_arguments(THEMES, description=__doc__, argv=argv)
    model_args, objective, data, optim, run, evaluation, hub = arguments
    recipe = resolved_recipe(*arguments)

    # Accelerator
    accelerator = create_accelerator(run)
    check_averaging(accelerator, optim.ema_decay)
    stop = StopSignal()
    checkpoint = start_output_dir(accelerator, run, recipe)
    configure_deepspeed(accelerator, optim, checkpoint)
    set_seed(run.seed)

    # Data
    config = create_config(model_args, objective.overrides())
    processor = create_processor(model_args, config)
    dataset, validation = build_datasets(data, processor, config, run.seed)
    evaluated_on = data.dataset
    sampler = make_sampler(dataset, run.seed, data.per_device_batch_size)
    loader = build_loader(dataset, sampler, processor, data, run.seed)

    # Model
    model = synchronize_batchnorm(create_model(model_args, config, optim.max_grad_norm), run)
    average = create_average(model, optim.ema_decay, accelerator.device)

    # Optimizer and schedule
    plan = make_plan(len(dataset), data.per_device_batch_size, accelerator.num_processes, run)
    optimizer = create_optimizer(model, optim, fused=accelerator.device.type in ("cuda", "cpu"))
    schedule = create_schedule(optim, plan.schedule_steps(optim.count_dropped_batch))

    # Prepare
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    scheduler = LambdaLR(optimizer, schedule)  # on DeepSpeed's optimizer; prepared, it would step once per process
    state = TrainingState(data=files_digest(data.dataset) or "")
    accelerator.register_for_checkpointing(scheduler, state, *([average] if average is not None else []))
    set_seed(run.seed, device_specific=True)
    negatives = torch.Generator(device=accelerator.device)
    drawing_process = 0 if config.itm_negatives == "all" else accelerator.process_index
    window, log = LossWindow(accelerator, model, run.output_dir), MetricsLog(accelerator, run.output_dir, state)
    checkpointer = Checkpointer(
        accelerator, run.output_dir, recipe, run.save_steps, run.save_minutes, run.save_total_limit
    )
    start_trackers(accelerator, run.project_name, recipe)
    show_banner("Fine-tuning", describe_plan(accelerator, model, plan, run, data.per_device_batch_size, len(dataset)))

    # Resume
    if checkpoint is not None:
        load_checkpoint(accelerator, checkpoint, recipe, state, scheduler, plan.samples_per_batch)
    log.cut_back(checkpoint)  # also if a killed run logged but left no checkpoint

    # Loop
    progress, validated = progress_bar(accelerator, plan.total_steps, state.step), {}
    for _ in range(state.epoch, plan.num_epochs):
        sampler.set_position(state.epoch, state.samples_in_epoch)
        model.train()
        for index, batch in enumerate(loader):
            if state.step >= plan.total_steps:
                break
            with accelerator.accumulate(model):
                seed_negatives(negatives, run.seed, state.micro_step, drawing_process)
                outputs = model(**batch, generator=negatives)
                accelerator.backward(outputs.loss * group_factor(accelerator, index, len(loader)))
                if accelerator.sync_gradients and optim.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            window.add(outputs, batch, state, plan.samples_per_batch, scheduler.get_last_lr()[0])
            state.count_batch(plan.samples_per_batch)
            if not accelerator.sync_gradients:
                continue
            update_average(accelerator, average, model)
            scheduler.step()
            state.step += 1
            progress.update()
            is_last = accelerator.gradient_state.end_of_dataloader or state.step == plan.total_steps
            if is_last or state.step % run.logging_steps == 0 or checkpointer.is_step_due(state.step):
                record = log.write(**window.flush())
                progress.set_postfix(loss=f"{record['loss']:.3f}")
                is_due, is_stopped = checkpointer.agree(state.step, stop.received)
                if is_due:
                    checkpointer.save(state.step)
                if is_stopped:
                    logger.info(f"stopped by SIGTERM after step {state.step}; continue with --resume latest")
                    return accelerator.end_training()
        state.end_epoch()

        # Evaluate
        is_last = state.epoch == plan.num_epochs
        if validation is not None and (is_last or state.epoch % evaluation.eval_every_epochs == 0):
            num_queries = count_queries(evaluation, plan.num_epochs - state.epoch)
            for suffix, weights in models_of_run(model, average).items():
                result, choice = validated[suffix] = validate(
                    accelerator,
                    weights,
                    processor,
                    validation,
                    evaluation,
                    evaluated_on,
                    num_workers=data.num_workers,
                    num_queries=num_queries,
                    seed=run.seed,
                )
                log.write(**{f"validation{suffix}": result.metrics, f"ranking{suffix}": result.ranking})
                if record_best(accelerator, state, result, evaluation, run.output_dir, f"best{suffix}"):
                    how = describe_selection(evaluation, result.sample)
                    card = build_card(recipe, state.epoch, result, evaluated_on, choice, how, bool(suffix))
                    save_model(accelerator, weights, processor, Path(run.output_dir) / f"best{suffix}", card, choice)
            window.pause()

    # Save
    progress.close()
    for suffix, weights in models_of_run(model, average).items():
        result, choice = validated.get(suffix, (None, None))
        card = build_card(recipe, state.epoch, result, evaluated_on, choice, is_averaged=bool(suffix))
        save_model(accelerator, weights, processor, Path(run.output_dir) / f"final{suffix}", card, choice)
    if hub.push_to_hub and accelerator.is_main_process:
        push_folder(Path(run.output_dir) / ("best" if state.best_epoch else "final"), hub)
    accelerator.end_training()


if __name__ == "__main__":
    with plain_errors("train_finetune.py", from_libraries=False):
        main()
