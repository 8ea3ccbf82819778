"""Run the data factory: a target set with captions in, SDA-like annotations and images out.

    python -m data_scripts.dad.run --config recipes/dad/sample.yaml
    accelerate launch --multi_gpu --num_processes 8 -m data_scripts.dad.run --config recipes/dad/cuhk.yaml

The same command continues after an interruption; finished stages are skipped.
"""

import importlib
from collections.abc import Collection
from dataclasses import dataclass

from data_scripts.dad.command import with_plain_errors
from data_scripts.dad.config import SECTIONS, STAGES, FactoryConfig
from mra.common.arguments import option, parse_arguments


MODULES = {"train": "train_dad", "augment": "augment_captions"}  # the others are named after their stage


@dataclass
class RunSection:
    """What is run."""

    stages: str = option(",".join(STAGES), "Stages to run, with commas; they run in the order of the factory.")

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages.split(",") if stage not in STAGES]
        if unknown:
            raise ValueError(
                f"--stages: unknown {', '.join(map(repr, unknown))}; expected some of {', '.join(STAGES)}"
            )


def run_stages(config: FactoryConfig, stages: Collection[str]) -> None:
    """Run stages in the order of the factory, whatever order they are named in."""
    for stage in STAGES:
        if stage in stages:
            importlib.import_module(f"data_scripts.dad.{MODULES.get(stage, stage)}").run(config)


def main(argv: list[str] | None = None) -> None:
    """Run what the command line names."""
    chosen, *sections = parse_arguments(
        {"": RunSection} | SECTIONS, prog="data_scripts.dad.run", description=__doc__, argv=argv
    )
    # Imported now, since it takes seconds that --help does not need.
    from data_scripts.dad.stage_folders import process_state

    process_state()  # before training makes one that waits less
    config = FactoryConfig(*sections)
    with_plain_errors(
        "data_scripts.dad.run", lambda: run_stages(config, chosen.stages.split(",")), config.common.work_dir
    )


if __name__ == "__main__":
    main()
