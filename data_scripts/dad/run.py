"""
Runs the data factory: a target set with captions in, SDA-like annotations and images out.

    python -m data_scripts.dad.run --config recipes/dad/sample.yaml
    accelerate launch --multi_gpu --num_processes 8 -m data_scripts.dad.run --config recipes/dad/cuhk.yaml

The same command goes on after it was stopped; finished stages are passed over.
"""

import importlib

from data_scripts.dad.command import with_plain_errors
from data_scripts.dad.config import load_config, make_parser
from data_scripts.dad.stage_folders import STAGES, process_state


MODULES = {"train": "train_dad", "augment": "augment_captions"}  # the others are called like their stage


def run_stages(config, stages) -> None:
    """Runs stages in the order of the factory, whatever order they are named in."""
    for stage in STAGES:
        if stage in stages:
            importlib.import_module(f"data_scripts.dad.{MODULES.get(stage, stage)}").run(config)


def main(argv: list[str] | None = None) -> None:
    """Runs what the command line names."""
    parser = make_parser("data_scripts.dad.run", __doc__)
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="those to run, with commas (default: all, in order)"
    )
    options = parser.parse_args(argv)
    stages = options.stages.split(",")
    unknown = [stage for stage in stages if stage not in STAGES]
    if unknown:
        parser.error(f"--stages: unknown {', '.join(map(repr, unknown))}; expected some of {', '.join(STAGES)}")
    try:
        config = load_config(options.config, options.overrides)
    except ValueError as error:
        parser.error(str(error))
    process_state()  # before training makes one that waits less
    with_plain_errors("data_scripts.dad.run", lambda: run_stages(config, stages))


if __name__ == "__main__":
    main()
