"""Logging of losses to `metrics.jsonl` and the trackers, with a check that losses and weights are finite."""

import json
import math
import os
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from torch.distributed.tensor import DTensor

from mra.common.command_line import writing_to
from mra.common.files import write_whole


if TYPE_CHECKING:  # a circular import otherwise
    from mra.training.checkpointing import TrainingState


logger = get_logger(__name__)

METRICS_FILE = "metrics.jsonl"
_HISTORY = 50
_REMEDY = "with a lower learning_rate, max_grad_norm or another mixed_precision"


class NonFiniteLossError(RuntimeError):
    """Loss term or weight that is NaN or infinite; the message names the step and what is not finite."""


class LossWindow:
    """Loss terms of recent batches, kept on the device until they are logged so that no step waits for the host.

    Args:
        accelerator: the run's accelerator, which averages over processes.
        model: as prepared; its trained weights are checked with the losses.
        output_dir: folder for the diagnostic of a loss that is not finite.
    """

    def __init__(self, accelerator: Accelerator, model: torch.nn.Module, output_dir: str | Path) -> None:
        self.accelerator = accelerator
        self.model = model
        self.output_dir = Path(output_dir)
        self.history = deque(maxlen=_HISTORY)
        self._clear()

    def _clear(self) -> None:
        self.names: tuple[str, ...] = ()
        self.values: list[torch.Tensor] = []
        self.steps: list[int] = []
        self.places: list[tuple[int, int]] = []
        self.identity_ids: list[torch.Tensor | None] = []
        self.samples, self.learning_rate, self.start = 0, math.nan, time.perf_counter()

    def pause(self) -> None:
        """Exclude the time since the last flush from the measured speed, for work other than training."""
        self.start = time.perf_counter()

    def add(
        self,
        outputs: Mapping[str, Any],
        batch: dict[str, torch.Tensor],
        state: "TrainingState",
        samples: int,
        learning_rate: float | torch.Tensor,
    ) -> None:
        """Add the terms of one batch.

        Args:
            outputs: an `MRAPreTrainingOutput`.
            batch: the model's arguments for that batch.
            state: the `TrainingState` before the batch is counted.
            samples: pairs in the batch over all processes.
            learning_rate: learning rate of that step, for parameters without multiplier.
        """
        terms = {name: value for name, value in outputs.items() if name.endswith("loss") and value is not None}
        names = tuple(terms)
        if self.names not in ((), names):
            raise ValueError(f"the terms of the loss changed within a run: {self.names} before, {names} now")
        self.names = names
        self.values.append(torch.stack([value.detach().float() for value in terms.values()]))
        self.steps.append(state.step + 1)
        self.places.append((state.epoch, state.samples_in_epoch))
        self.identity_ids.append(batch.get("identity_ids"))
        self.samples += samples
        self.learning_rate = float(learning_rate)

    def flush(self) -> dict[str, float]:
        """Average the window over batches and processes and empty it; every process must call this on the same steps.

        Returns:
            Mean of each term, `learning_rate` of the last step and `samples_per_second`.

        Raises:
            NonFiniteLossError: if any value of any process is not finite, after saving a diagnostic, or any weight.
        """
        values = cast(
            torch.Tensor, self.accelerator.reduce(torch.stack(self.values), reduction="mean")
        ).cpu()  # batches, terms
        for step, row in zip(self.steps, values.tolist(), strict=True):
            self.history.append({"step": step, **dict(zip(self.names, row, strict=True))})
        broken = (~values.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if broken:
            self._raise_non_finite(broken[0], values[broken[0]])
        self._check_weights()
        seconds = time.perf_counter() - self.start
        record = dict(zip(self.names, values.double().mean(dim=0).tolist(), strict=True))
        record |= {"learning_rate": self.learning_rate, "samples_per_second": round(self.samples / seconds, 2)}
        self._clear()
        return record

    def _raise_non_finite(self, index: int, row: torch.Tensor) -> None:
        terms = dict(zip(self.names, row.tolist(), strict=True))
        named = [name for name, value in terms.items() if not math.isfinite(value)]
        identity_ids = self.identity_ids[index]
        if identity_ids is not None:
            identity_ids = cast(torch.Tensor, self.accelerator.gather(identity_ids)).tolist()
        step = self.steps[index]
        path = self.output_dir / f"non_finite_step_{step}.json"
        if self.accelerator.is_main_process:
            diagnostic = {
                "step": step,
                "non_finite_terms": named,
                "terms": terms,
                "learning_rate": self.learning_rate,
                "epoch": self.places[index][0],
                "position_in_epoch": self.places[index][1],
                "identity_ids": identity_ids,
                "history": list(self.history),
            }
            path.write_text(json.dumps(_without_nan(diagnostic), indent=2) + "\n", encoding="utf-8")
        self.accelerator.wait_for_everyone()
        raise NonFiniteLossError(
            f"step {step}: {', '.join(named)} not finite ({', '.join(f'{k} {v:.4g}' for k, v in terms.items())}); the "
            f"batch and the steps before it are saved in {path}; resume from the last checkpoint, written before them, "
            f"{_REMEDY}"
        )

    def _check_weights(self) -> None:
        """Refuse weights that a gradient made non-finite in a step whose losses were finite, before they are saved.

        Each process checks what it holds: under FSDP its shard, under ZeRO-3 nothing.
        """
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        held = [weight.to_local() if isinstance(weight, DTensor) else weight for weight in trained.values()]
        flags = torch.stack([(~weight.detach().isfinite()).any() for weight in held]).float()
        counts = cast(torch.Tensor, self.accelerator.reduce(flags, reduction="mean")).tolist()
        broken = [name for name, count in zip(trained, counts, strict=True) if count]
        if broken:
            more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise NonFiniteLossError(
                f"step {self.steps[-1]}: the weights {', '.join(broken[:3])}{more} are not finite, though every loss was: a "
                f"gradient overflowed; resume from the last checkpoint, written before it, {_REMEDY}"
            )


class MetricsLog:
    """Log of records in `metrics.jsonl` and the trackers.

    Args:
        accelerator: the run's accelerator with its trackers; only the main process writes.
        output_dir: folder of the run.
        state: the `TrainingState`; its `log_lines` counts the records.
    """

    def __init__(self, accelerator: Accelerator, output_dir: str | Path, state: "TrainingState") -> None:
        self.accelerator = accelerator
        self.path = Path(output_dir) / METRICS_FILE
        self.state = state

    def cut_back(self, checkpoint: Path | None) -> None:
        """Atomically drop the records written after the checkpoint that `state` was loaded from.

        A checkpoint contains the records before it, from which a damaged file is restored. Checkpoints of earlier versions
        do not; then the readable lines of the file are kept.
        """
        if not self.accelerator.is_main_process or (checkpoint is None and not self.path.is_file()):
            return
        present = self.path.read_bytes().decode(errors="replace") if self.path.is_file() else ""
        saved = checkpoint / METRICS_FILE if checkpoint is not None else None
        if saved is not None and saved.is_file():
            text = saved.read_text(encoding="utf-8")
            if present and not present.startswith(text):
                logger.warning(f"{self.path} is damaged before the checkpoint; restored from {saved}")
        else:
            lines = present.splitlines(keepends=True)[: self.state.log_lines]
            whole = next((place for place, line in enumerate(lines) if not _is_record(line)), len(lines))
            text = "".join(lines[:whole])
            if whole < self.state.log_lines:
                logger.warning(
                    f"{self.path} holds {whole} of the {self.state.log_lines} records before the checkpoint"
                )
                self.state.log_lines = whole
        write_whole(self.path, text)

    def write(self, **record: Any) -> dict[str, Any]:
        """Write one record with its position in the run and return it; trackers get nested mappings flattened."""
        state = self.state
        record = {"step": state.step, "epoch": state.epoch, "samples": state.samples_seen, **record}
        state.log_lines += 1
        if self.accelerator.is_main_process:
            with writing_to(self.path), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self.accelerator.log(_flatten(record), step=state.step)
        return record


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Read the records of a `metrics.jsonl`, or none if there is no file.

    Raises:
        ValueError: if a line is not a record; the message names it.
    """
    path = Path(path)
    lines = path.read_bytes().decode(errors="replace").splitlines(keepends=True) if path.is_file() else []
    for number, line in enumerate(lines, start=1):
        if not _is_record(line):
            raise ValueError(
                f"{path}: line {number} is not a complete record; remove it and all following lines, or run the training again"
            )
    return [json.loads(line) for line in lines]


def _is_record(line: str) -> bool:
    try:
        return line.endswith("\n") and isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _flatten(record: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in record.items():
        flat |= _flatten(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _without_nan(value: Any) -> Any:
    """Replace numbers that JSON cannot represent by text."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
