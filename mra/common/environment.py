"""Environment of a run: library versions, git revision, device."""

import functools
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mra.common.files import write_whole


ENVIRONMENT_FILE = "environment.json"
_LIBRARIES = (
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "diffusers",
    "deepspeed",
)


def git_revision() -> str | None:
    """Return the commit of this project's checkout, with `-dirty` if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match", ""],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return commit.stdout.strip() or None


@functools.cache
def cpu_name() -> str:
    """Return the name of the processor, as Linux gives it or else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


@functools.cache
def describe_environment() -> dict[str, Any]:
    """Return the versions of Python and the installed libraries, the git revision and the device."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {
        "python": platform.python_version(),
        "libraries": versions,
        "git_revision": git_revision(),
        "platform": platform.platform(),
        "device": device,
    }


def write_environment(folder: str | Path) -> None:
    """Save [`describe_environment`] as `environment.json`."""
    write_whole(Path(folder) / ENVIRONMENT_FILE, json.dumps(describe_environment(), indent=2) + "\n")
