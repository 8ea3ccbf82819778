"""
Turns the annotations and images of a person-search set, or of one's own, into a folder that `datasets.load_dataset` reads.

    python -m data_scripts.prepare_pedes --dataset cuhk --annotations data/finetune --images images --output data/arrow/cuhk
    python -m data_scripts.prepare_pedes --dataset csv --annotations people.csv --images crops --output data/arrow/people
"""

import argparse
import sys
from pathlib import Path


if __name__ == "__main__" and not __package__:  # run as `python data_scripts/prepare_pedes.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_scripts.builders import PedesBuilder
from data_scripts.pedes_layouts import CSV, DATASETS
from data_scripts.preparation import parse_arguments, prepare, run


def main(arguments: list[str] | None = None) -> None:
    """Prepares what the command line names."""
    parser = argparse.ArgumentParser(prog="prepare_pedes", description=__doc__.strip().splitlines()[0])
    parser.add_argument("--dataset", required=True, choices=(*DATASETS, CSV), help="which of the three sets, or csv")
    annotations = (
        "official JSON file, processed JSON file, or a folder of them (files of other sets are left alone); for csv a file "
        "with the columns path, caption, identity and, if you like, split and camera"
    )
    options = parse_arguments(parser, arguments, annotations)

    def make_builder(rejected, scratch):
        paths = (options.annotations, options.images)
        return PedesBuilder(options.dataset, *paths, rejected, scratch, options.follow_symlinks)

    run("prepare_pedes", lambda: prepare(options.dataset, options, make_builder), options.output)


if __name__ == "__main__":
    main()
