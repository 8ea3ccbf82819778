"""Command line of a stage; user errors exit with a one-line message."""

import logging
import sys
from collections.abc import Callable, Sequence

from data_scripts.dad.config import SECTIONS, FactoryConfig
from mra.common.arguments import parse_arguments
from mra.common.command_line import plain_errors, try_folder


_MORE = "\nOptions of other stages are accepted too: python -m data_scripts.dad.run --help lists all."


def run_stage(
    name: str,
    run: Callable[[FactoryConfig], None],
    description: str | None,
    sections: Sequence[str],
    argv: list[str] | None = None,
) -> None:
    """Run one stage as `python -m data_scripts.dad.<module>`.

    Args:
        name: name of the module.
        run: function that does the stage's work.
        description: text shown by `--help`.
        sections: sections of the configuration that the stage reads besides `common`.
        argv: arguments; None for those of the process.
    """
    config = FactoryConfig(
        *parse_arguments(
            SECTIONS, prog=name, description=f"{description}{_MORE}", argv=argv, shown=("common", *sections)
        )
    )
    with_plain_errors(name, lambda: run(config), config.common.work_dir)


def with_plain_errors(name: str, work: Callable[[], None], output: str) -> None:
    """Run `work`; wrong input or a full disk under `output` exits with a message instead of a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        with plain_errors(name, output):
            try_folder(output, "output")
            work()
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the same command continues where it stopped", file=sys.stderr)
        raise SystemExit(130) from None
