"""
Compares region features: pretrains several seeds with each choice and tabulates what the validation split then gives.

    python benchmarks/region_features.py --seeds 0 1 2 --output_dir outputs/region_features

Every run is `accelerate launch train_pretrain.py` with the recipe and the settings below, on the sample set (the first
three commands of recipes/sample/demo.sh make it). Runs of one seed start alike and see the data in the same order, so
the choices are compared seed by seed.
The last line is one JSON object.
"""

import argparse
import json
import math
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parent.parent
CHOICES = {
    "paper": ["--region_features", "paper"],
    "published_code": ["--region_features", "published_code"],
    "none": ["--region_weight", "0"],
}
METRICS = ("R1", "R5", "R10", "mAP")


def main(command_line: list[str] | None = None) -> None:
    """Runs each choice with each seed and prints mean, standard deviation and differences."""
    args = make_parser().parse_args(command_line)
    runs = {choice: [] for choice in args.choices}
    for seed in args.seeds:
        for choice in args.choices:
            start = time.perf_counter()
            runs[choice].append(validate_run(args, choice, seed))
            shown = "  ".join(f"{name} {values['R1']:.2f}" for name, values in runs[choice][-1].items())
            print(f"{choice} seed {seed}: R@1 {shown} ({time.perf_counter() - start:.0f} s)", flush=True)
    results = {choice: summarize(found) for choice, found in runs.items()}
    first = args.choices[0]
    differences = {
        f"{first} - {choice}": summarize(
            [subtract(ours, theirs) for ours, theirs in zip(runs[first], runs[choice], strict=True)]
        )
        for choice in args.choices[1:]
    }
    print()
    print_table(results | differences)
    record = {"benchmark": "region_features", "recipe": args.recipe, "seeds": args.seeds, "settings": settings(args)}
    print(json.dumps(record | {"results": results, "differences": differences}))


def make_parser() -> argparse.ArgumentParser:
    """The options; a setting that is left out is the recipe's."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0], allow_abbrev=False)
    parser.add_argument("--recipe", default="recipes/sample/pretrain.yaml", help="of train_pretrain.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--choices", nargs="+", choices=CHOICES, default=["paper", "published_code"], help="none: no region terms"
    )
    parser.add_argument("--epochs", type=int, help="num_train_epochs of the runs")
    parser.add_argument("--dataset", help="prepared set to pretrain on")
    parser.add_argument("--validation_dataset", help="prepared set whose validation split is measured")
    parser.add_argument("--data_fraction", type=float, help="share of the training set, chosen by the seed")
    parser.add_argument("--rerank_k", type=int, default=32, help="images re-ranked for each query; 0 for none")
    parser.add_argument("--score_fusion", default="auto", help="eval_score_fusion of the runs")
    parser.add_argument("--accelerate_config", default="accelerate_configs/cpu.yaml")
    parser.add_argument("--output_dir", default="outputs/region_features", help="one folder a run")
    parser.add_argument("--reuse", action="store_true", help="take finished runs of the same settings from there")
    return parser


def settings(args: argparse.Namespace) -> dict:
    """The recipe's keys that all runs have in common, those left out of the command line excepted."""
    chosen = {
        "num_train_epochs": args.epochs,
        "dataset": args.dataset,
        "validation_dataset": args.validation_dataset,
        "data_fraction": args.data_fraction,
        "eval_rerank_k": args.rerank_k,
        "eval_score_fusion": args.score_fusion,
    }
    return {name: value for name, value in chosen.items() if value is not None}


def validate_run(args: argparse.Namespace, choice: str, seed: int) -> dict[str, dict[str, float]]:
    """
    Pretrains once, or finds the run, and returns its last validation: rankings by name, metrics in percent.

    Raises:
        SystemExit: if the run fails, with the end of what it printed, or validates on nothing.
    """
    folder = ROOT / args.output_dir / f"{choice}_seed{seed}"
    wanted = settings(args) | {"seed": seed}
    if not (args.reuse and is_finished(folder, wanted, choice)):
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", args.accelerate_config]
        command += ["train_pretrain.py", "--config", args.recipe, *CHOICES[choice], "--output_dir", str(folder)]
        command += [word for name, value in wanted.items() for word in (f"--{name}", str(value))]
        command += ["--eval_every_epochs", "1000000", "--save_minutes", "0", "--overwrite_output_dir"]
        # accelerate would take one thread
        environment = {"OMP_NUM_THREADS": str(os.cpu_count()), "TOKENIZERS_PARALLELISM": "false"} | os.environ
        run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if run.returncode:
            sys.exit(f"{shlex.join(command)}\nfailed:\n{run.stderr[-3000:]}")
    found = last_validation(folder)
    if found is None:
        sys.exit(f"{folder} validated on nothing: name a set with a validation split by --validation_dataset.")
    return found


def is_finished(folder: Path, wanted: dict, choice: str) -> bool:
    """Whether the folder holds a finished run of these settings."""
    if not (folder / "final").is_dir() or last_validation(folder) is None:
        return False
    name, value = CHOICES[choice]
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    wanted = wanted | {name.removeprefix("--"): value if name == "--region_features" else float(value)}
    return all(recipe[name] == value for name, value in wanted.items())


def last_validation(folder: Path) -> dict | None:
    """The metrics of the last validation in metrics.jsonl, cut to those of the table."""
    path = folder / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    found = [record["validation"] for record in records if "validation" in record]
    if not found:
        return None
    return {ranking: {name: values[name] for name in METRICS} for ranking, values in found[-1].items()}


def subtract(ours: dict, theirs: dict) -> dict:
    """Difference of two runs, metric by metric."""
    return {ranking: {name: ours[ranking][name] - theirs[ranking][name] for name in METRICS} for ranking in ours}


def summarize(runs: list[dict]) -> dict:
    """Mean and standard deviation over seeds (none of one seed) and the values themselves, by ranking and metric."""
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
    """Prints one line for each row and ranking: mean and standard deviation of every metric."""
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
