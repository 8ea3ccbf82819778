"""Atomic checkpoints, the position in a run, and atomic replacement of model folders."""

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import broadcast_object_list
from transformers import PreTrainedModel

from mra.common.command_line import try_folder, writing_to
from mra.common.digests import write_digests
from mra.common.environment import write_environment
from mra.common.files import clean_folder, flush_tree, replace_folder, unfinished_path, whole_folder, write_whole
from mra.common.recipes import format_recipe, read_mapping
from mra.retrieval import RetrievalChoice
from mra.training.arguments import RunArguments
from mra.training.averaging import check_average
from mra.training.checkpoint_manifest import (
    DamagedCheckpointError,
    check_way,
    find_damage,
    restore_random_states,
    write_manifest,
)
from mra.training.metrics_log import METRICS_FILE, read_records
from mra.training.runtime import whole_model
from mra.training.zero_checkpoints import fit_to_processes
from processing_mra import MRAProcessor


logger = get_logger(__name__)

CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.yaml"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
_SET_ASIDE = "set-aside-"
_TOKEN = "run"  # all processes of a run write to one unfinished checkpoint
_SCHEDULE_FILE, _STATE_FILE = "custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl"  # in the order of registration
# Model folders, and those to which earlier best models are moved.
_MODELS = ("best", "earlier_best", "final", "best_ema", "earlier_best_ema", "final_ema")
# Fields that checkpoints of older versions lack.
_NEWER_FIELDS = ("best_measure", "best_ema_metric", "best_ema_epoch", "best_ema_measure", "data")
# Arguments that do not affect the result of a run.
_OF_THE_CALL = ("resume", "resume_without_manifest", "overwrite_output_dir", "output_dir")


@dataclass
class TrainingState:
    """Position in a run; all other state is derived from it or saved by `accelerate`.

    Attributes:
        step: optimizer steps done.
        micro_step: batches done by each process.
        epoch: epochs done.
        samples_in_epoch: pairs of the current epoch seen by all processes.
        samples_seen: pairs of the whole run seen by all processes.
        log_lines: lines of `metrics.jsonl`.
        samples_per_batch: pairs in the last batch over all processes.
        best_metric: best `selection_metric` on validation so far, in percent; -1 before the first evaluation.
        best_epoch: epochs done when `best_metric` was reached.
        best_measure: how `best_metric` was measured; empty before the first evaluation.
        best_ema_metric: as `best_metric`, of the averaged weights.
        best_ema_epoch: as `best_epoch`, of the averaged weights.
        best_ema_measure: as `best_measure`, of the averaged weights.
        data: digest of the training set's files, as [`files_digest`] gives it; empty for a set on the Hub.
    """

    step: int = 0
    micro_step: int = 0
    epoch: int = 0
    samples_in_epoch: int = 0
    samples_seen: int = 0
    log_lines: int = 0
    samples_per_batch: int = 0
    best_metric: float = -1.0
    best_epoch: int = 0
    best_measure: str = ""
    best_ema_metric: float = -1.0
    best_ema_epoch: int = 0
    best_ema_measure: str = ""
    data: str = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the attributes."""
        return asdict(self)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the attributes.

        Raises:
            ValueError: if one is missing, unknown or of the wrong type. Checkpoints of older versions may lack the newer
                ones.
        """
        expected = asdict(self)
        if isinstance(state_dict, Mapping):
            state_dict = {name: getattr(TrainingState, name) for name in _NEWER_FIELDS} | dict(state_dict)
        if not isinstance(state_dict, Mapping) or state_dict.keys() != expected.keys():
            held = ", ".join(map(str, state_dict)) if isinstance(state_dict, Mapping) else type(state_dict).__name__
            raise ValueError(f"the position in the run must hold {', '.join(expected)}, got {held}")
        for name, value in state_dict.items():
            wanted = type(expected[name])
            if type(value) not in ((float, int) if wanted is float else (wanted,)):
                raise ValueError(f"the position in the run: `{name}` must be {wanted.__name__}, got {value!r}")
            setattr(self, name, value)

    def count_batch(self, samples: int) -> None:
        """Count one batch of every process, `samples` pairs in all."""
        self.micro_step += 1
        self.samples_per_batch = samples
        self.samples_in_epoch += samples
        self.samples_seen += samples

    def end_epoch(self) -> None:
        """Move on to the start of the next epoch."""
        self.epoch += 1
        self.samples_in_epoch = 0


class Checkpointer:
    """Schedule and writer of the checkpoints in `output_dir/checkpoints`.

    Args:
        accelerator: the run's accelerator, with the prepared objects and the registered `TrainingState`.
        output_dir: folder of the run, shared by all processes.
        recipe: resolved arguments, saved with every checkpoint.
        save_steps: optimizer steps between checkpoints; None for none.
        save_minutes: minutes between checkpoints; None or 0 for none.
        save_total_limit: number of newest checkpoints to keep.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        output_dir: str | Path,
        recipe: Mapping[str, Any],
        save_steps: int | None = None,
        save_minutes: float | None = None,
        save_total_limit: int = 2,
    ) -> None:
        self.accelerator = accelerator
        self.folder = Path(output_dir) / CHECKPOINTS
        self.recipe = recipe
        self.save_steps = save_steps
        self.save_minutes = save_minutes
        self.save_total_limit = save_total_limit
        self.last_step = None
        self.last_time = time.monotonic()

    def is_step_due(self, step: int) -> bool:
        """Return whether `save_steps` makes a checkpoint due at this optimizer step."""
        return self.save_steps is not None and step % self.save_steps == 0

    def agree(self, step: int, stop: bool) -> tuple[bool, bool]:
        """Agree with the other processes on saving and stopping; every process must call this on the same steps.

        Args:
            step: optimizer steps done.
            stop: whether this process was asked to stop.

        Returns:
            Whether to save now, and whether to stop afterwards: true everywhere if any process was asked to.
        """
        elapsed = (time.monotonic() - self.last_time) / 60
        late = self.accelerator.is_main_process and bool(self.save_minutes) and elapsed >= self.save_minutes
        flags = torch.tensor([float(late), float(stop)], device=self.accelerator.device)
        late, stop = (flag > 0 for flag in cast(torch.Tensor, self.accelerator.reduce(flags, "sum")).tolist())
        return (late or stop or self.is_step_due(step)) and step != self.last_step, stop

    def save(self, step: int) -> Path:
        """Write `checkpoint-<step>` under a temporary name, its manifest last; flush and rename it, and remove the oldest."""
        accelerator = self.accelerator
        target = self.folder / f"checkpoint-{step}"
        unfinished = unfinished_path(target, _TOKEN)
        if accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
        accelerator.wait_for_everyone()
        with writing_to(target), self._removed_on_failure(unfinished):
            accelerator.save_state(str(unfinished))
            if accelerator.is_main_process:
                write_recipe(unfinished / RECIPE_FILE, self.recipe)
                write_environment(unfinished)
                metrics = self.folder.parent / METRICS_FILE
                if metrics.is_file():
                    shutil.copyfile(metrics, unfinished / METRICS_FILE)
            accelerator.wait_for_everyone()
            write_manifest(accelerator, unfinished, step)
            accelerator.wait_for_everyone()  # each machine flushes the whole folder, so nothing may move meanwhile
            if accelerator.is_local_main_process:
                flush_tree(unfinished)
            accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            replace_folder(unfinished, target)
            overtaken = [folder for folder in _list_steps(self.folder, _SET_ASIDE) if step_of(folder) <= step]
            for folder in [*list_checkpoints(self.folder.parent)[: -self.save_total_limit], *overtaken]:
                _remove(folder)
        accelerator.wait_for_everyone()
        self.last_step, self.last_time = step, time.monotonic()
        logger.info(f"saved {target}")
        return target

    @contextlib.contextmanager
    def _removed_on_failure(self, unfinished: Path) -> Iterator[None]:
        """Free the room that an unfinished checkpoint takes, such as on a full disk."""
        try:
            yield
        except BaseException:
            if self.accelerator.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
            raise


# ---------------------------------------------------------------- folders


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the finished checkpoints of a run, oldest first."""
    return _list_steps(Path(output_dir) / CHECKPOINTS)


def step_of(checkpoint: Path) -> int:
    """Return the number of optimizer steps in a checkpoint's name."""
    return int(checkpoint.name.rpartition("-")[2])


def _list_steps(folder: Path, prefix: str = "") -> list[Path]:
    paths = folder.iterdir() if folder.is_dir() else []
    found = [path for path in paths if path.name.startswith(prefix) and _CHECKPOINT.match(path.name[len(prefix) :])]
    return sorted(found, key=step_of)


def find_checkpoint(resume: str | None, output_dir: str | Path) -> Path | None:
    """Find the checkpoint to continue from, without verifying it.

    Args:
        resume: `latest`, `latest_whole`, the path of a checkpoint, or None.
        output_dir: folder of the run.

    Returns:
        Its path; None to start from the beginning, also if `latest` finds no checkpoint.

    Raises:
        ValueError: if the path is not a finished checkpoint.
    """
    if resume is None:
        return None
    if resume in ("latest", "latest_whole"):
        checkpoints = list_checkpoints(output_dir)
        return checkpoints[-1] if checkpoints else None
    path = Path(resume)
    if not _CHECKPOINT.match(path.name) or not path.is_dir():
        raise ValueError(
            f"`resume` must be `latest`, `latest_whole` or the path of a finished checkpoint-N folder, got {resume!r}; "
            f"finished ones are {', '.join(map(str, list_checkpoints(output_dir))) or 'none'}"
        )
    return path


def start_output_dir(
    accelerator: Accelerator,
    args: RunArguments,
    recipe: Mapping[str, Any],
    option: Callable[[str, str], str] = "--{} {}".format,
) -> Path | None:
    """Prepare the folder of a run and write arguments and environment to it; every process must call this.

    Args:
        accelerator: the run's accelerator.
        args: a `RunArguments`.
        recipe: the resolved arguments.
        option: formats an option of this command from name and value, for error messages.

    Returns:
        The verified checkpoint to continue from, or None.

    Raises:
        DamagedCheckpointError: on every process, if that checkpoint is damaged; nothing was changed.
        ValueError: if there is no such checkpoint, its states are sharded differently, only one of it and this run has an
            average of the weights, or the folder holds another run.
    """
    if accelerator.is_main_process:
        prepare_output_dir(args.output_dir, args.resume, args.overwrite_output_dir and args.resume is None)
    accelerator.wait_for_everyone()
    checkpoint = find_whole_checkpoint(accelerator, args, option)
    if checkpoint is not None:
        check_way(accelerator, checkpoint)
        check_average(checkpoint, recipe)
    if accelerator.is_main_process:
        if checkpoint is not None:
            set_newer_aside(args.output_dir, checkpoint)
        write_recipe(Path(args.output_dir) / RECIPE_FILE, recipe)
        write_environment(args.output_dir)
    accelerator.wait_for_everyone()
    return checkpoint


def find_whole_checkpoint(
    accelerator: Accelerator, args: RunArguments, option: Callable[[str, str], str] = "--{} {}".format
) -> Path | None:
    """Find and verify the checkpoint to continue from; every process must call this and gets the same result.

    Args:
        accelerator: the run's accelerator.
        args: a `RunArguments`; with `resume: latest_whole` damaged checkpoints are skipped with a warning.
        option: formats an option of this command from name and value, for error messages.

    Raises:
        DamagedCheckpointError: if it is damaged and `resume` allows no other; the message names the damage, the newest
            undamaged checkpoint and how to use it.
        ValueError: if there is no such checkpoint.
    """
    named = find_checkpoint(args.resume, args.output_dir)
    (named,) = broadcast_object_list([named])  # a file system may show the newest one to some processes first
    if named is None:
        return None
    without_manifest = None if args.resume_without_manifest else option("resume_without_manifest", "true")

    def damage_of(folder: Path) -> list[str]:
        return find_damage(accelerator, folder, _check_contents, without_manifest)

    damage = damage_of(named)
    if not damage:
        return named
    siblings = [path for path in _list_steps(named.parent)[::-1] if path.name != named.name]
    (siblings,) = broadcast_object_list([siblings])
    whole = next((path for path in siblings if not damage_of(path)), None)
    text = f"{named} is damaged: {'; '.join(damage)}"
    if whole is None:
        raise DamagedCheckpointError(
            f"{text}; no other checkpoint is undamaged: remove {named.parent} to start from the beginning with "
            f"{option('resume', 'latest')}"
        )
    if args.resume == "latest_whole":
        logger.warning(f"{text}; continuing from {whole}, the newest undamaged one")
        return whole
    raise DamagedCheckpointError(
        f"{text}; the newest undamaged one is {whole}: use it with {option('resume', str(whole))} or "
        f"{option('resume', 'latest_whole')}"
    )


def _check_contents(checkpoint: Path) -> None:
    """Read and check the small state files of a checkpoint.

    Raises:
        ValueError: if a file has wrong content; the message names it.
    """
    found = {}
    for name in (_SCHEDULE_FILE, _STATE_FILE):
        try:
            found[name] = torch.load(checkpoint / name, map_location="cpu", weights_only=False)
        except Exception as error:  # unpickling can raise anything
            raise ValueError(f"{name} cannot be read ({error})") from None
    state, step = TrainingState(), step_of(checkpoint)
    try:
        state.load_state_dict(found[_STATE_FILE])
    except ValueError as error:
        raise ValueError(f"{_STATE_FILE}: {error}") from None
    schedule = found[_SCHEDULE_FILE]
    scheduled = schedule.get("last_epoch") if isinstance(schedule, Mapping) else None
    for name, steps in ((_STATE_FILE, state.step), (_SCHEDULE_FILE, scheduled)):
        if steps != step:
            raise ValueError(f"{name} is at step {steps} instead of {step}")
    read_mapping(checkpoint / RECIPE_FILE)
    records = read_records(checkpoint / METRICS_FILE)
    if records and len(records) != state.log_lines:
        raise ValueError(f"{METRICS_FILE} holds {len(records)} lines instead of {state.log_lines}")


def set_newer_aside(output_dir: str | Path, checkpoint: Path) -> None:
    """Rename checkpoints of later steps than the one to continue from, so that they are not mistaken for this run's.

    The run removes them when it reaches their steps.
    """
    for path in list_checkpoints(output_dir):
        if step_of(path) > step_of(checkpoint):
            aside = path.with_name(f"{_SET_ASIDE}{path.name}")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning(f"renamed {path} to {aside.name}: the run continues from {checkpoint.name}")


def prepare_output_dir(output_dir: str | Path, resume: str | None, overwrite: bool) -> None:
    """Create the folder of a run and clean up after an interrupted run; only the main process may call this.

    Raises:
        ValueError: if it holds another run that is neither resumed nor to be overwritten.
    """
    output_dir = Path(output_dir)
    try_folder(output_dir, "`output_dir`")
    results = [CHECKPOINTS, METRICS_FILE, *_MODELS, RECIPE_FILE]
    present = [name for name in results if (output_dir / name).exists()]
    if present and resume is None and not overwrite:
        raise ValueError(
            f"`output_dir` {str(output_dir)!r} holds another run ({', '.join(present)}): continue it with "
            "--resume latest, replace it with --overwrite_output_dir, or choose another folder"
        )
    if overwrite:
        for name in present:
            path = output_dir / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    (output_dir / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
    for folder in (output_dir, output_dir / CHECKPOINTS):
        for path in clean_folder(folder):
            logger.warning(f"cleaned up {path} of an interrupted run")


def keep_aside(accelerator: Accelerator, output_dir: str | Path, epoch: int, name: str = "best") -> Path:
    """Move `best` to `earlier_best`, so that a later best model does not replace it; every process must call this.

    Args:
        accelerator: the run's accelerator.
        output_dir: folder of the run.
        epoch: epochs of training, which name the folder. An existing folder of that name, from an earlier resume of the
            same checkpoint, is kept.
        name: `best`, or `best_ema`, which moves to `earlier_best_ema`.

    Returns:
        Its new path.
    """
    best, aside = Path(output_dir) / name, Path(output_dir) / f"earlier_{name}" / f"epoch-{epoch}"
    if accelerator.is_main_process and best.exists() and not aside.exists():
        aside.parent.mkdir(exist_ok=True)
        best.rename(aside)
    accelerator.wait_for_everyone()
    return aside


def load_checkpoint(
    accelerator: Accelerator,
    checkpoint: Path,
    recipe: Mapping[str, Any],
    state: TrainingState,
    scheduler: Any,
    samples_per_batch: int,
) -> None:
    """Restore a run and warn about arguments that have changed since it was saved.

    Args:
        accelerator: the run's accelerator, with the prepared objects, `state` and `scheduler`.
        checkpoint: an undamaged checkpoint from `start_output_dir`.
        recipe: resolved arguments of this run.
        state: restored in place.
        scheduler: restored in place.
        samples_per_batch: current number of pairs in one batch over all processes.
    """
    changed = changed_keys(recipe, checkpoint)
    if changed:
        listing = ", ".join(f"{name} ({before!r} before, {now!r} now)" for name, (before, now) in changed.items())
        logger.warning(f"resuming {checkpoint} with other arguments: {listing}")
    data = state.data
    with fit_to_processes(accelerator, checkpoint) as folder:
        accelerator.load_state(str(folder))
    if "dataset" not in changed and "" not in (data, state.data) and data != state.data:
        raise ValueError(
            f"`dataset` {recipe['dataset']}: its files differ from those that {checkpoint} was trained on; resume with that "
            "dataset, or start a new run from the weights (--model_name_or_path)"
        )
    state.data = data
    accelerator.step = 0  # groups of accumulated batches start here, even with another size than before
    not_restored = restore_random_states(accelerator, checkpoint)
    if not_restored is not None:
        logger.warning(f"resuming {checkpoint}: {not_restored}")
    if state.samples_per_batch not in (0, samples_per_batch):
        logger.warning(
            f"the batch of all processes had {state.samples_per_batch} pairs and now has {samples_per_batch}: the run "
            "continues with other batches and another number of steps"
        )
    for group, learning_rate in zip(scheduler.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
        group["lr"] = learning_rate  # DeepSpeed does not restore it everywhere
    logger.info(f"resumed {checkpoint} at step {state.step}, {state.samples_in_epoch} pairs into epoch {state.epoch}")


def save_model(
    accelerator: Accelerator,
    model: PreTrainedModel,
    processor: MRAProcessor,
    folder: str | Path,
    card: str | None = None,
    choice: RetrievalChoice | None = None,
) -> None:
    """Write model, processor and code atomically as a folder for `from_pretrained`.

    Args:
        accelerator: the run's accelerator, which collects sharded weights; every process must call this.
        model: the prepared model.
        processor: the `MRAProcessor`.
        folder: replaced if it exists.
        card: text of the `README.md`.
        choice: ranking chosen on validation, or None.
    """
    folder = Path(folder)
    unwrapped: Any = accelerator.unwrap_model(model, keep_torch_compile=False)
    if accelerator.is_fsdp2:  # its modules have other classes
        unwrapped = whole_model(unwrapped)
        state_dict = unwrapped.state_dict()
    else:
        state_dict = cast(dict[str, torch.Tensor], accelerator.get_state_dict(model))
    if accelerator.is_main_process:
        state_dict = {name.removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()}  # torch.compile
        for name in unwrapped._tied_weights_keys:  # DeepSpeed copies tied weights
            state_dict.pop(name, None)
        with writing_to(folder), whole_folder(folder) as unfinished:
            unwrapped.save_pretrained(unfinished, state_dict=state_dict)
            processor.save_pretrained(unfinished)
            if card is not None:
                (unfinished / "README.md").write_text(card, encoding="utf-8")
            if choice is not None:
                choice.save(unfinished)
            write_digests(unfinished)
    accelerator.wait_for_everyone()


def _remove(folder: Path) -> None:
    """Remove a checkpoint after renaming it, so that a partly removed one never looks finished."""
    unfinished = unfinished_path(folder)
    folder.rename(unfinished)
    shutil.rmtree(unfinished)


# ---------------------------------------------------------------- recipes


def write_recipe(path: str | Path, recipe: Mapping[str, Any]) -> None:
    """Save resolved arguments atomically as YAML for `--config`, with markers that reveal truncation."""
    write_whole(path, format_recipe(recipe))


def changed_keys(recipe: Mapping[str, Any], checkpoint: str | Path) -> dict[str, tuple[Any, Any]]:
    """Return the arguments that differ from those of a checkpoint: name -> (then, now)."""
    before = read_mapping(Path(checkpoint) / RECIPE_FILE)
    names = sorted({*before, *recipe} - set(_OF_THE_CALL))
    return {name: (before.get(name), recipe.get(name)) for name in names if before.get(name) != recipe.get(name)}
