"""Train the arms of a comparison with the same seeds and tabulate the validation metrics and their paired differences.

    python benchmarks/paired_runs.py --script train_pretrain.py --recipe recipes/sample/pretrain.yaml \
        --arm "paper: --region_features paper" --arm "published_code: --region_features published_code" \
        --seeds 0 1 2 3 4 --common "--num_train_epochs 1" --output_dir outputs/region_features

Every run is `accelerate launch` of the script with the recipe, the common options and those of its arm; in both, `{arm}` and
`{seed}` are replaced. Runs of one seed have the same initialisation and data order, so arms are compared seed by seed.
The sample set comes from the first three commands of recipes/sample/demo.sh. The last line is one JSON object.
"""

import importlib
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mra.common.arguments import option, parse_arguments, resolved_recipe
from mra.training.checkpointing import changed_keys
from mra.training.metrics_log import METRICS_FILE, read_records


ROOT = Path(__file__).resolve().parent.parent
METRICS = ("R1", "R5", "R10", "mAP")
# Validate once, at the end, and keep only the last model.
OF_EVERY_RUN = ("--eval_every_epochs", "1000000", "--save_minutes", "0", "--overwrite_output_dir")


@dataclass
class PairedRunsArguments:
    """Arms, seeds and shared settings; all others come from the recipe."""

    arm: list[str] = option(
        help="name and script options of an arm; the first arm is compared with the others",
        repeated=True,
        metavar="'NAME: OPTIONS'",
    )
    script: Literal["train_pretrain.py", "train_finetune.py"] = option("train_pretrain.py", "script to run")
    recipe: str = option("recipes/sample/pretrain.yaml", "recipe of the script")
    common: str = option("", "script options of all runs")
    seeds: list[int] = option([0, 1, 2, 3, 4], "seeds of each arm")
    accelerate_config: str = option("accelerate_configs/cpu.yaml", "configuration of accelerate launch")
    output_dir: str = option("outputs/paired_runs", "folder with one folder per run")
    reuse: bool = option(False, "reuse finished runs with the same settings")

    def __post_init__(self) -> None:
        names = [arm.partition(":")[0] for arm in self.arm]
        for arm, name in zip(self.arm, names, strict=True):
            if ":" not in arm or not name.replace("-", "_").isidentifier():
                raise ValueError(f"--arm: expected 'NAME: OPTIONS' with a name of letters, digits and _, got {arm!r}")
        if len(set(names)) < len(names):
            raise ValueError(f"--arm: names must differ, got {', '.join(names)}")

    def named_arms(self) -> dict[str, str]:
        """Return the options of each arm by its name."""
        return {name: options.strip() for name, _, options in (arm.partition(":") for arm in self.arm)}


def main(argv: list[str] | None = None) -> None:
    """Run each arm with each seed and print mean, standard deviation and paired differences."""
    (args,) = parse_arguments([PairedRunsArguments], description=__doc__, argv=argv, config=False)
    arms = args.named_arms()
    runs = {name: [] for name in arms}
    for seed in args.seeds:
        for name, options in arms.items():
            start = time.perf_counter()
            runs[name].append(validate_run(args, name, options, seed))
            shown = "  ".join(f"{ranking} {values['R1']:.2f}" for ranking, values in runs[name][-1].items())
            print(f"{name} seed {seed}: R@1 {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
    results = {name: summarize(found) for name, found in runs.items()}
    first = next(iter(arms))
    differences = {
        f"{first} - {name}": summarize([subtract(*pair) for pair in zip(runs[first], runs[name], strict=True)])
        for name in arms
        if name != first
    }
    print()
    print_table(results | differences)
    settings = {name: getattr(args, name) for name in ("script", "recipe", "seeds", "common")} | {"arms": arms}
    print(json.dumps({"benchmark": "paired_runs"} | settings | {"results": results, "differences": differences}))


def validate_run(args: PairedRunsArguments, name: str, options: str, seed: int) -> dict[str, dict[str, float]]:
    """Train once, or find the finished run, and return its last validation: rankings by name, metrics in percent.

    Raises:
        SystemExit: if the run fails (with the end of its output) or has no validation.
    """
    folder = ROOT / args.output_dir / f"{name}_seed{seed}"
    words = shlex.split(f"{args.common} {options}".replace("{arm}", name).replace("{seed}", str(seed)))
    script_args = ["--config", args.recipe, *words, "--seed", str(seed), "--output_dir", str(folder), *OF_EVERY_RUN]
    if not (args.reuse and is_finished(folder, args.script, script_args)):
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", args.accelerate_config]
        # accelerate would use one thread
        environment = {
            "OMP_NUM_THREADS": str(os.cpu_count()),
            "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads starve each other on busy cores
            "TOKENIZERS_PARALLELISM": "false",
        } | os.environ
        command = [*launch, args.script, *script_args]
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{shlex.join(command)}\nfailed:\n{run.stderr[-3000:]}")
    found = last_validation(folder)
    if found is None:
        sys.exit(f"{folder} has no validation: set a dataset with a validation split in the recipe or --common")
    return found


def is_finished(folder: Path, script: str, script_args: list[str]) -> bool:
    """Return whether the folder holds a finished run of exactly these settings."""
    if not (folder / "final").is_dir() or last_validation(folder) is None:
        return False
    themes = importlib.import_module(script.removesuffix(".py")).THEMES
    return not changed_keys(resolved_recipe(*parse_arguments(themes, argv=script_args)), folder)


def last_validation(folder: Path) -> dict[str, dict[str, float]] | None:
    """Read the last validation of metrics.jsonl, cut to the metrics of the table; None if there is none."""
    records = read_records(folder / METRICS_FILE)
    found = [record["validation"] for record in records if "validation" in record]
    if not found:
        return None
    return {ranking: {name: values[name] for name in METRICS} for ranking, values in found[-1].items()}


def subtract(ours: dict, theirs: dict) -> dict:
    """Subtract one run's metrics from another's, ranking by ranking."""
    return {ranking: {name: ours[ranking][name] - theirs[ranking][name] for name in METRICS} for ranking in ours}


def summarize(runs: list[dict]) -> dict:
    """Return mean and standard deviation over seeds (None for one seed) and the values, by ranking and metric."""
    return {
        ranking: {
            name: {
                "mean": statistics.fmean(values),
                "deviation": statistics.stdev(values) if len(values) > 1 else None,
                "values": [round(value, 4) for value in values],
            }
            for name in METRICS
            for values in [[run[ranking][name] for run in runs]]
        }
        for ranking in runs[0]
    }


def print_table(rows: dict[str, dict]) -> None:
    """Print one line for each row and ranking: mean and standard deviation of every metric."""
    width = max(len(f"{row}, {ranking}") for row, rankings in rows.items() for ranking in rankings)
    print(" " * width + "".join(f"{name:>16}" for name in ("R@1", "R@5", "R@10", "mAP")))
    for row, rankings in rows.items():
        for ranking, metrics in rankings.items():
            cells = [
                f"{m['mean']:.2f} ± {math.nan if m['deviation'] is None else m['deviation']:.2f}"
                for m in metrics.values()
            ]
            print(f"{f'{row}, {ranking}':<{width}}" + "".join(f"{cell:>16}" for cell in cells))


if __name__ == "__main__":
    main()
