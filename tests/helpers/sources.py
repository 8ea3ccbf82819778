"""Tiny sources in the layouts of the real sets, for the tests of the preparation scripts."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

from PIL import Image


ROOT = Path(__file__).resolve().parents[2]


def draw(path: Path, seed: int) -> None:
    """Writes an image of 12 x 24 pixels whose look depends on the seed; the suffix says how."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.effect_noise((12, 24), 20).convert("RGB")
    image.paste((seed * 37 % 256, seed * 91 % 256, seed * 53 % 256), (2, 4, 10, 20))
    image.save(path)


def truncate(path: Path) -> None:
    """Cuts a file to two thirds."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])


def write_json(path: Path, value) -> Path:
    """Writes a JSON file; gives its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def sda_row(index: int, folder: str = "c_0_5000") -> dict:
    """A row of SDA with as many boxes as its number leaves over by 3."""
    boxes = [[0.5, 0.4 + 0.1 * number, 0.25, 0.5] for number in range(index % 3)]
    return {
        "image": f"{folder}/{index}_0.{('jpg', 'png', 'bmp')[index % 3]}",
        "boxes": boxes,
        "logits": [0.5 + 0.125 * number for number in range(len(boxes))],
        "phrases": [f"part {number}" for number in range(len(boxes))],
        "caption": f"a person number {index}",
        "image_id": index,
    }


def write_sda(root: Path) -> dict[str, list[dict]]:
    """Two annotation files of 5 and 4 rows under `sda/`, whose numbers sort otherwise than their letters."""
    files = {"sda_5000_10000.json": range(5), "sda_10000_15000.json": range(5, 9)}
    rows = {name: [sda_row(index) for index in numbers] for name, numbers in files.items()}
    for name, values in rows.items():
        write_json(root / "sda" / name, values)
        for row in values:
            draw(root / "images" / "SDA" / row["image"], row["image_id"])
    return rows


def run_client(code: str, folder: Path, env: dict[str, str] | None = None) -> str:
    """Runs code in a process that starts elsewhere and has no path to the project; gives what it prints."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=env or environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def read_set(folder: Path) -> dict[str, list[dict]]:
    """All rows of a prepared set, images as bytes, read without `load_dataset`."""
    import pyarrow.parquet as pq

    splits: dict[str, list[dict]] = {}
    for path in sorted((folder / "data").glob("*.parquet")):
        splits.setdefault(path.name.split("-")[0], []).extend(pq.read_table(path).to_pylist())
    return splits


def image_size(row: dict) -> tuple[int, int]:
    """Decodes a row's image; gives width and height."""
    return Image.open(io.BytesIO(row["image"]["bytes"])).size


def leftovers(output: Path) -> list[str]:
    """Names beside an output folder that belong to a run."""
    return sorted(path.name for path in output.parent.glob(f".{output.name}*"))
