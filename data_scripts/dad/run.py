"""Run the data factory, from a target dataset with captions to SDA-like annotations and images.

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


MODULES = {"train": "train_dad", "augment": "augment_captions"}  # other modules are named after their stage


@dataclass
class RunSection:
    """Stages to run."""

    stages: str = option(",".join(STAGES), "comma-separated stages to run, always in the factory's order")

    def __post_init__(self) -> None:
        unknown = [stage for stage in self.stages.split(",") if stage not in STAGES]
        if unknown:
            raise ValueError(
                f"--stages: unknown {', '.join(map(repr, unknown))}; expected some of {', '.join(STAGES)}"
            )


def run_stages(config: FactoryConfig, stages: Collection[str]) -> None:
    """Run stages in the order of the factory."""
    for stage in STAGES:
        if stage in stages:
            importlib.import_module(f"data_scripts.dad.{MODULES.get(stage, stage)}").run(config)


def main(argv: list[str] | None = None) -> None:
    """Run the stages that the command line names."""
    chosen, *sections = parse_arguments(
        {"": RunSection} | SECTIONS, prog="data_scripts.dad.run", description=__doc__, argv=argv
    )
    # A slow import, not needed for --help.
    from data_scripts.dad.stage_folders import process_state

    process_state()  # before training creates one with a shorter timeout
    config = FactoryConfig(*sections)
    with_plain_errors(
        "data_scripts.dad.run", lambda: run_stages(config, chosen.stages.split(",")), config.common.work_dir
    )


if __name__ == "__main__":
    main()
