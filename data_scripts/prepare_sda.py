"""
Turns the annotations and images of SDA into a folder that `datasets.load_dataset` reads.

    python -m data_scripts.prepare_sda --annotations data/sda --images images/SDA --output data/arrow/sda --num_proc 8
"""

import argparse
import sys
from pathlib import Path


if __name__ == "__main__" and not __package__:  # run as `python data_scripts/prepare_sda.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_scripts.builders import SdaBuilder
from data_scripts.preparation import parse_arguments, prepare, run


def main(arguments: list[str] | None = None) -> None:
    """Prepares what the command line names."""
    parser = argparse.ArgumentParser(prog="prepare_sda", description=__doc__.strip().splitlines()[0])
    options = parse_arguments(parser, arguments, "SDA JSON file, or a folder of them")

    def make_builder(rejected, scratch):
        return SdaBuilder(options.annotations, options.images, rejected, scratch, options.follow_symlinks)

    run("prepare_sda", lambda: prepare("sda", options, make_builder), options.output)


if __name__ == "__main__":
    main()
