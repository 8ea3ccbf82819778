"""Convert annotations and images of a person-search dataset, or your own, to a folder for `datasets.load_dataset`.

mra prepare pedes --dataset cuhk --annotations data/finetune --images images --output data/arrow/cuhk
mra prepare pedes --dataset csv --annotations people.csv --images crops --output data/arrow/people
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING


if __name__ == "__main__" and not __package__:  # run as `python data_scripts/prepare_pedes.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_scripts.arguments import PedesArguments
from mra.common.arguments import parse_arguments


if TYPE_CHECKING:  # imports `datasets`, which would slow down --help
    from data_scripts.annotation_builder import RejectedRows


def main(argv: list[str] | None = None, program: str = "prepare_pedes") -> None:
    """Prepare the dataset that the command line names."""
    (options,) = parse_arguments([PedesArguments], prog=program, description=__doc__, argv=argv, config=False)

    from data_scripts.builders import PedesBuilder
    from data_scripts.preparation import prepare, run

    def make_builder(rejected: "RejectedRows", scratch: str | Path) -> PedesBuilder:
        paths = (options.annotations, options.images)
        return PedesBuilder(options.dataset, *paths, rejected, scratch, options.follow_symlinks)

    run(program, lambda: prepare(options.dataset, options, make_builder), options.output)


if __name__ == "__main__":
    main()
