"""Time the start of every command, and of a search with each backend, in CPU-seconds of their own processes.

python benchmarks/startup.py --gallery outputs/sample/search/gallery.db --json

The gallery's model needs an ONNX export beside it (`mra export --model MODEL`). The repeats of all commands are interleaved,
and the median is printed.
"""

import sys
from dataclasses import dataclass
from pathlib import Path


if __name__ == "__main__" and not __package__:  # run as `python benchmarks/startup.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import re
import resource
import statistics
import subprocess

from benchmarks.measure import show
from mra.common.arguments import option, parse_arguments
from mra.common.environment import cpu_name


ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("train_pretrain.py", "train_finetune.py", "eval_retrieval.py", "convert_checkpoint.py", "app.py")

# What a search imports: for its query and tokens, for its index, and, without an export, for the model.
IMPORTS = {
    "import query": "numpy, PIL.Image, onnxruntime, tokenizers, safetensors.numpy",
    "import index": "pymilvus, milvus_lite.server_manager",
    "import pandas": "pandas",
    "import torch": "torch",
    "import model": "modeling_mra, processing_mra",
}


@dataclass
class StartupBenchmark:
    """Options of this benchmark."""

    gallery: str | None = option(None, "gallery to search; without it only imports and --help are timed")
    text: str = option("a woman in a red coat with a black backpack", "sentence to search for")
    repeats: int = option(5, "runs of each command")
    threads: int = option(1, "threads of each command, as OMP_NUM_THREADS")
    json: bool = option(False, "print the result as JSON in the last line")

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"--repeats must be at least 1, got {self.repeats}")


def main(argv: list[str] | None = None) -> None:
    """Print the median CPU-seconds of each command."""
    (args,) = parse_arguments([StartupBenchmark], description=__doc__, argv=argv, config=False)
    commands = {name: ["-c", f"import {modules}"] for name, modules in IMPORTS.items()}
    commands |= {
        f"mra {name} --help".replace("  ", " "): ["-m", "mra", *name.split(), "--help"] for name in ["", *verbs()]
    }
    commands |= {f"{name} --help": [name, "--help"] for name in SCRIPTS}
    if args.gallery:
        search = ["-m", "mra", "search", args.text, "--gallery", args.gallery, "--device", "cpu", "--backend"]
        commands |= {f"search with {backend}": [*search, backend] for backend in ("onnx", "torch")}
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(args.repeats):
        for name, command in commands.items():
            seconds[name].append(cpu_seconds(command, args.threads))
    results = {"cpu": cpu_name(), "repeats": args.repeats}
    show(results | {name: statistics.median(values) for name, values in seconds.items()}, args.json)


def verbs() -> list[str]:
    """Return the verbs that `mra --help` lists."""
    shown = subprocess.run(
        [sys.executable, "-m", "mra", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return re.findall(r"^  (\S+(?: \S+)?) {2,}", shown.stdout, re.MULTILINE)


def cpu_seconds(command: list[str], threads: int) -> float:
    """Run Python in a process of its own; return the CPU time of the process and of those that it waited for.

    Raises:
        ValueError: if it fails; the message is the last line that it printed.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    run = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        reason = (run.stderr.strip() or f"exit code {run.returncode}").splitlines()[-1]
        raise ValueError(f"`python {' '.join(command)}` failed: {reason}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
