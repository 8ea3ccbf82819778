"""A work folder with drawn images, so that filter, captioner and grounding can be run without the stages before them."""

import functools
import os
import signal
from pathlib import Path

import numpy as np
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw

from data_scripts.dad.config import FactoryConfig
from data_scripts.dad.json_files import to_lines
from data_scripts.dad.row_parts import RowParts
from data_scripts.dad.run import run_stages
from data_scripts.dad.stage_folders import begin_stage, image_path
from data_scripts.dad.tiny.make_readers import make_readers
from mra.common.files import write_whole
from tests.helpers.dad import fork, load_config


COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 60, 200), "yellow": (220, 200, 60)}
READERS = ("blip", "chat", "florence", "grounding", "detector", "clip")


def draw_person(seed: int, size=(32, 64)) -> PILImage.Image:
    """A grainy backdrop with a figure whose place and colours depend on the seed."""
    rng = np.random.default_rng(seed)
    image = PILImage.fromarray(rng.integers(90, 190, (size[1], size[0], 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    left, top = rng.integers(4, 10), rng.integers(6, 14)
    shirt, trousers = (tuple(int(v) for v in rng.integers(0, 255, 3)) for _ in range(2))
    draw.ellipse((left + 4, top - 6, left + 10, top), fill=(220, 180, 150))
    draw.rectangle((left, top, left + 14, top + 22), fill=shirt)
    draw.rectangle((left + 2, top + 22, left + 12, top + 44), fill=trousers)
    return image


def make_target(folder: Path, number: int = 24) -> Path:
    """A prepared target set with a train split."""
    rows = {"image": [draw_person(1000 + row) for row in range(number)]}
    names = list(COLOURS)
    rows["captions"] = [[f"a man in a {names[row % 4]} shirt"] for row in range(number)]
    rows |= {"image_id": list(range(number)), "camera": ["c1"] * number}
    kinds = {
        "image": Image(),
        "captions": List(Value("string")),
        "image_id": Value("int64"),
        "camera": Value("string"),
    }
    dataset = Dataset.from_dict(rows, features=Features(kinds))
    folder.mkdir(parents=True)
    dataset.to_parquet(folder / "train-00000-of-00001.parquet")
    return folder


def write_config(root: Path, work: str = "work", **sections) -> Path:
    """A configuration of the stages that read images, on tiny models below `root/readers`."""
    readers = root / "readers"
    values = {
        "common": {"work_dir": str(root / work), "dataset": str(root / "target"), "image_size": [64, 32]},
        "filter": {"min_width": 16, "min_height": 32, "quantile": 0.0, "batch_size": 4},
        "caption": {"model": str(readers / "blip"), "prompt": None, "max_new_tokens": 6, "batch_size": 4},
        "ground": {"model": str(readers / "grounding"), "batch_size": 4, "box_threshold": 0.0, "text_threshold": 0.0},
    }
    for name, section in sections.items():
        values[name] = values.get(name, {}) | section
    path = root / f"{work}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def make_sources(root: Path, readers=READERS) -> Path:
    """Target set and tiny models."""
    make_target(root / "target")
    make_readers(root / "readers", readers)
    return root


def finish_earlier(config: FactoryConfig, *names: str) -> None:
    """Marks stages as done."""
    for name in names:
        begin_stage(config, name).finish()


def write_generated(config: FactoryConfig, images: dict[int, PILImage.Image | bytes]) -> list[dict]:
    """A finished generate stage: images (or bytes of a file) by prompt."""
    finish_earlier(config, "train", "augment")
    stage = begin_stage(config, "generate")
    rows = []
    for prompt_id, image in images.items():
        path = stage.work.images / image_path(prompt_id)
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            image.save(path, quality=95)
        prompt = f"a man in a {list(COLOURS)[prompt_id % 4]} shirt"
        rows.append({"file_path": image_path(prompt_id), "prompt_id": prompt_id, "prompt": prompt, "seed": prompt_id})
    write_whole(stage.work.generated, to_lines(rows))
    stage.finish(images=len(rows))
    return rows


def write_stage(config: FactoryConfig, name: str, path: Path, rows: list[dict]) -> None:
    """A finished stage with the rows of its file."""
    stage = begin_stage(config, name)
    write_whole(path, to_lines(rows))
    stage.finish(rows=len(rows))


def run(path: Path, *stages: str) -> FactoryConfig:
    """Runs stages of a configuration in this process."""
    config = load_config(str(path))
    run_stages(config, stages)
    return config


def run_jobs(path: Path, stage: str) -> None:
    """Runs a stage as two jobs apart, the second first."""
    for shard in ("1/2", "0/2"):
        run_stages(load_config(str(path), [f"--common.shard={shard}"]), [stage])


def run_forked(path: Path, stage: str, num_processes: int = 1, kill_after: int | None = None) -> list[int]:
    """
    Runs a stage in forked processes.

    Args:
        path: of the configuration.
        stage: to run.
        num_processes: as `accelerate launch --multi_gpu` would start them, on the CPU.
        kill_after: the first process kills itself while it writes its batch after this many.

    Returns:
        Exit codes.
    """
    work = functools.partial(_run_process, path, stage, kill_after)
    return fork(work, num_processes, killed=kill_after is not None)


def _run_process(path, stage, kill_after, index):
    if kill_after is not None and index == 0:
        append, batches = RowParts.append, []

        def append_or_die(parts, rows):
            if len(batches) == kill_after:
                append(parts, rows[:1])
                parts._file.write(b'{"prompt_id": 7, "fi')  # a line that the kill cuts
                parts._file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            batches.append(len(rows))
            append(parts, rows)

        RowParts.append = append_or_die
    run_stages(load_config(str(path)), [stage])


def files_of(folder: Path) -> dict[str, bytes]:
    """Content of a folder's files but its manifest, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "manifest.json"}
