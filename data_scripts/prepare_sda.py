"""Convert the annotations and images of SDA to a folder for `datasets.load_dataset`.

mra prepare sda --annotations data/sda --images images/SDA --output data/arrow/sda --num_proc 8
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING


if __name__ == "__main__" and not __package__:  # run as `python data_scripts/prepare_sda.py`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_scripts.arguments import SdaArguments
from mra.common.arguments import parse_arguments


if TYPE_CHECKING:  # imports `datasets`, which would slow down --help
    from data_scripts.annotation_builder import RejectedRows


def main(argv: list[str] | None = None, program: str = "prepare_sda") -> None:
    """Prepare the dataset that the command line names."""
    (options,) = parse_arguments([SdaArguments], prog=program, description=__doc__, argv=argv, config=False)

    from data_scripts.builders import SdaBuilder
    from data_scripts.preparation import prepare, run

    def make_builder(rejected: "RejectedRows", scratch: str | Path) -> SdaBuilder:
        return SdaBuilder(options.annotations, options.images, rejected, scratch, options.follow_symlinks)

    run(program, lambda: prepare("sda", options, make_builder), options.output)


if __name__ == "__main__":
    main()
