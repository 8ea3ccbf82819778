"""Work folder of the factory: names, atomic files, rows in parts, and the manifests of stages.

    WORK/controlnet/manifest.json, checkpoints/, final/, validation/, metrics.jsonl
    WORK/prompts/manifest.json, prompts.jsonl    {prompt_id, prompt, source_caption, source_image_id, source_row, edits}
    WORK/images/manifest.json, generated.jsonl   {file_path, prompt_id, prompt, seed}
    WORK/images/c_<start>_<stop>/<prompt_id>.jpg of 5,000 prompts each; file_path is relative to WORK/images
    WORK/filter/manifest.json, scores.jsonl, thresholds.json, kept.jsonl, report
    WORK/captions/manifest.json, captions.jsonl  {file_path, caption, raw_caption, prompt_id}
    WORK/grounding/manifest.json, regions.jsonl  rows as in SDA, with their prompt_id
    WORK/sda/sda_<start>_<stop>.json of 5,000 prompts each, and nothing else, for `mra prepare sda`
    WORK/report/manifest.json, index.md

`source_row` is the row of the train split, `source_image_id` the person in it. While a stage runs, every process appends its
rows to its own part (`generated-00000-of-00002.jsonl`); at the end the parts are merged into one file, sorted by prompt. A
killed run continues from the existing rows, with any number of processes, and ends with the same file.

`manifest.json` holds the settings that affect a stage's result and a digest of the manifests of its source stages. A stage
with results cannot be continued with other settings or after its source stages have changed; `finished` is null until the
stage is complete.
"""

import hashlib
import json
import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import PartialState

from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.json_files import read_json, write_json
from data_scripts.dad.row_parts import RowParts
from data_scripts.json_rows import UnreadableJson, read_rows
from mra.common.environment import ENVIRONMENT_FILE, describe_environment
from mra.common.files import is_unfinished
from mra.common.sharding import Shard, check_processes
from mra.common.tables import files_digest
from mra.training.checkpointing import RECIPE_FILE


SHARD_PROMPTS = 5000
MANIFEST = "manifest.json"
_SETTINGS = (MANIFEST, RECIPE_FILE, ENVIRONMENT_FILE)
FOLDERS = {
    "train": "controlnet",
    "augment": "prompts",
    "generate": "images",
    "filter": "filter",
    "caption": "captions",
    "ground": "grounding",
    "report": "report",
}
MADE_FROM = {
    "train": (),
    "augment": (),
    "generate": ("train", "augment"),
    "filter": ("generate",),
    "caption": ("filter",),
    "ground": ("caption",),
    "report": (),
}
_DIFFUSION = ("base_model", "base_revision", "image_size", "condition", "condition_dir")
_COMMON = {  # arguments of the common section that affect a stage's result
    "train": ("dataset", "seed", *_DIFFUSION),
    "augment": ("dataset", "seed"),
    "generate": ("seed", *_DIFFUSION),
    "filter": ("dataset", "seed"),
    "caption": (),
    "ground": (),
    "report": ("dataset", "seed"),
}
_CONTENT = "files of common.dataset"  # they may change under the same name
_FIELDS = {  # needed by later stages
    "prompts": ("prompt_id", "prompt", "source_row"),
    "generated": ("file_path", "prompt_id", "prompt"),
    "scores": ("prompt_id", "decodes"),
    "kept": ("file_path", "prompt_id", "prompt"),
    "captions": ("file_path", "prompt_id", "caption"),
    "regions": ("image", "caption", "boxes", "logits", "phrases", "prompt_id"),
}
_PATIENCE = timedelta(days=7)  # finished processes wait for the slowest


# ---------------------------------------------------------------- files


@dataclass(frozen=True)
class WorkFolder:
    """Paths of the work folder."""

    root: Path

    def folder(self, stage: str) -> Path:
        """Return the folder of a stage."""
        return self.root / FOLDERS[stage]

    @property
    def controlnet(self) -> Path:
        """Path of the trained ControlNet."""
        return self.folder("train") / "final"

    @property
    def prompts(self) -> Path:
        """Path of the prompts."""
        return self.folder("augment") / "prompts.jsonl"

    @property
    def images(self) -> Path:
        """Path of the generated images."""
        return self.folder("generate")

    @property
    def generated(self) -> Path:
        """Path of the rows of the generated images."""
        return self.images / "generated.jsonl"

    @property
    def scores(self) -> Path:
        """Path of the scores of the images."""
        return self.folder("filter") / "scores.jsonl"

    @property
    def thresholds(self) -> Path:
        """Path of the thresholds of the filter."""
        return self.folder("filter") / "thresholds.json"

    @property
    def kept(self) -> Path:
        """Path of the rows that passed the filter."""
        return self.folder("filter") / "kept.jsonl"

    @property
    def captions(self) -> Path:
        """Path of the captions."""
        return self.folder("caption") / "captions.jsonl"

    @property
    def regions(self) -> Path:
        """Path of the grounded regions."""
        return self.folder("ground") / "regions.jsonl"

    @property
    def annotations(self) -> Path:
        """Path of the annotations in the format of SDA."""
        return self.root / "sda"


def shard_name(prompt_id: int, prefix: str) -> str:
    """Return the name of a prompt's folder or file: `c_0_5000`, `sda_5000_10000`."""
    start = prompt_id // SHARD_PROMPTS * SHARD_PROMPTS
    return f"{prefix}_{start}_{start + SHARD_PROMPTS}"


def image_path(prompt_id: int) -> str:
    """Return the path of a prompt's image, relative to the folder of images."""
    return f"{shard_name(prompt_id, 'c')}/{prompt_id}.jpg"


# ---------------------------------------------------------------- stages


def process_state() -> PartialState:
    """Return this process's state in `accelerate launch`, on the CPU if there is no accelerator.

    Raises:
        ValueError: if several processes were started that do not form one group.
    """
    on_cpu = os.environ.get("ACCELERATE_TORCH_DEVICE") == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=_PATIENCE)
    check_processes(state.num_processes)
    return state


def device_of(state: PartialState) -> torch.device:
    """Return the device of a process."""
    return cast(torch.device, state.device)


@dataclass
class Stage:
    """A stage of a run, opened by [`begin_stage`].

    Attributes:
        name: name of the stage.
        work: the work folder.
        state: state of this process among the others.
        shard: share of this process in the work of all jobs.
        manifest: settings of the stage and digests of its sources.
    """

    name: str
    work: WorkFolder
    state: PartialState
    shard: Shard
    manifest: dict[str, Any] = field(repr=False)

    @property
    def folder(self) -> Path:
        """Path of the stage."""
        return self.work.folder(self.name)

    @property
    def is_finished(self) -> bool:
        """Whether an earlier run completed the stage."""
        return self.manifest["finished"] is not None

    def rows(self, path: Path, key: str = "prompt_id") -> RowParts:
        """Return the rows of one of the stage's files, with a part for this process."""
        return RowParts(path, self.shard, key)

    def finish(self, **counts: Any) -> None:
        """Mark the stage as complete and record counts; every process must call this."""
        self.state.wait_for_everyone()
        self.manifest["finished"] = counts
        if self.state.is_main_process:
            write_json(self.folder / MANIFEST, self.manifest)
        self.state.wait_for_everyone()

    def finish_rows(self, rows: RowParts, expected: int, name: str) -> bool:
        """Merge the parts and mark the stage as complete if all rows exist; every process must call this.

        Args:
            rows: result of [`Stage.rows`].
            expected: number of rows of all jobs.
            name: name of the counted things, for the manifest.

        Returns:
            Whether the stage is complete; it is not while other jobs (`common.shard`) are running.
        """
        complete = self.merge_rows(rows, expected)
        if complete:
            self.finish(**{name: expected})
        return complete

    def merge_rows(self, rows: RowParts, expected: int) -> bool:
        """Merge the parts into one file if all rows exist; every process must call this.

        Args:
            rows: result of [`Stage.rows`].
            expected: number of rows of all jobs.

        Returns:
            Whether all rows exist; they do not while other jobs (`common.shard`) are running.
        """
        rows.close()
        self.state.wait_for_everyone()
        complete = len(rows.read()) == expected
        self.state.wait_for_everyone()  # all have counted before the parts are removed
        if complete and self.state.is_main_process:
            rows.merge()
        self.state.wait_for_everyone()
        return complete


def begin_stage(config: FactoryConfig, name: str, splits: bool = True) -> Stage:
    """Start or continue a stage; every process must call this.

    Args:
        config: the whole configuration.
        name: name of the stage.
        splits: whether separate jobs (`common.shard`) can share it.

    Raises:
        ValueError: if it was started with other settings, or a source stage is missing, unfinished or has changed.
    """
    state, work = process_state(), WorkFolder(Path(config.common.work_dir))
    manifest = _new_manifest(config, name, work)
    path = work.folder(name) / MANIFEST
    index, count = map(int, config.common.shard.split("/"))
    started = path.exists() and (count > 1 or _holds_work(path.parent))
    if started:
        before = read_json(path)
        _refuse_mixture(name, work, before, manifest)
        manifest = before
    if count > 1 and not splits and manifest["finished"] is None:
        raise ValueError(
            f"common.shard: stage {name!r} cannot be shared between jobs; run it first, without common.shard"
        )
    state.wait_for_everyone()  # all have read the existing files
    if state.is_main_process and not started:
        write_json(path, manifest)
    state.wait_for_everyone()
    share = Shard(index * state.num_processes + state.process_index, count * state.num_processes)
    return Stage(name, work, state, share, manifest)


def _holds_work(folder: Path) -> bool:
    """Return whether a run has left results, not only settings, which a restart may change."""
    manifest = read_json(folder / MANIFEST)
    files = (
        path for path in folder.rglob("*") if path.is_file() and path.name not in _SETTINGS and not is_unfinished(path)
    )
    return manifest["finished"] is not None or any(True for _ in files)


def read_finished(work: WorkFolder, name: str) -> dict[str, Any]:
    """Return the manifest of a finished stage.

    Raises:
        ValueError: if it is missing or unfinished.
    """
    path = work.folder(name) / MANIFEST
    manifest = read_json(path) if path.exists() else None
    if manifest is None or manifest["finished"] is None:
        state = "was not run" if manifest is None else "is unfinished"
        raise ValueError(f"{work.folder(name)}: stage {name!r} {state}; run it first: --stages {name}")
    return manifest


def read_stage_rows(path: str | Path) -> list[dict[str, Any]]:
    """Return all rows of a finished stage's JSONL file.

    Raises:
        ValueError: if a row cannot be read or lacks a field; the message names file and row.
    """
    path = Path(path)
    advice = f"remove {path.parent} and run its stage again"
    try:
        rows = list(read_rows(path)) if path.stat().st_size else []  # the file is empty if the stage kept nothing
    except UnreadableJson as error:
        raise ValueError(f"{path}: line {error.row + 1} is not a JSON object: {error.problem}; {advice}") from None
    for number, row in enumerate(rows, 1):
        missing = [key for key in _FIELDS[path.stem] if not isinstance(row, dict) or key not in row]
        if missing:
            raise ValueError(f"{path}: line {number} has no {', '.join(map(repr, missing))}; {advice}")
    return rows


def digest(manifest: dict[str, Any]) -> str:
    """Hash a stage's settings and, through its sources, those of all earlier stages."""
    text = json.dumps([manifest["stage"], manifest["settings"], manifest["made_from"]], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _new_manifest(config: FactoryConfig, name: str, work: WorkFolder) -> dict[str, Any]:
    common = config.deciding("common")
    settings = {f"common.{key}": common[key] for key in _COMMON[name]}
    if "dataset" in _COMMON[name] and (content := files_digest(common["dataset"])):
        settings[_CONTENT] = content
    settings |= {f"{name}.{key}": value for key, value in config.deciding(name).items()}
    sources = MADE_FROM[name]
    if name == "generate" and config.generate.controlnet is not None:
        sources = ("augment",)  # a given ControlNet instead of the trained one
    made_from = {source: digest(read_finished(work, source)) for source in sources}
    return {
        "stage": name,
        "settings": settings,
        "made_from": made_from,
        "environment": describe_environment(),
        "finished": None,
    }


def _refuse_mixture(name: str, work: WorkFolder, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Refuse to continue a stage that was started with other settings."""
    advice = f"choose another common.work_dir, or remove {work.folder(name)} and the stages made from it"
    old, new = before["settings"], now["settings"]
    if _CONTENT not in old or _CONTENT not in new:  # started by an older version, or with a dataset on the Hub
        old, new = ({key: value for key, value in both.items() if key != _CONTENT} for both in (old, new))
    changed = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if changed:
        listing = ", ".join(f"{key} ({old.get(key)!r} then, {new.get(key)!r} now)" for key in changed)
        raise ValueError(f"stage {name!r} was started with other settings: {listing}; use the old ones, {advice}")
    others = [source for source, value in now["made_from"].items() if before["made_from"].get(source) != value]
    if others:
        raise ValueError(
            f"stage {name!r} was made from results of {', '.join(others)} that have changed since: {advice}"
        )
