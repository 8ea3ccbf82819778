"""
Prints the results of several evaluations as one table.

    python -m mra_retrieval.compare "fine-tuned=outputs/eval_cuhk" "converted=outputs/eval_released"
"""

import argparse
import json
from pathlib import Path

from mra_retrieval.evaluation import format_table


def read_result(folder: str) -> dict[str, dict[str, float]]:
    """
    Reads the metrics that `eval_retrieval.py` wrote.

    Args:
        folder: its `--output_dir`.

    Returns:
        `similarity` and, if there was re-ranking, `reranked`: each a dict of percentages.

    Raises:
        ValueError: if there is no readable `metrics.json`.
    """
    path = Path(folder) / "metrics.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        return {name: report[name] for name in ("similarity", "reranked") if name in report}
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}): expected a folder that eval_retrieval.py wrote."
        ) from error


def main(command_line: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="compare", description=__doc__.strip().splitlines()[0])
    parser.add_argument(
        "results", nargs="+", metavar="NAME=DIR", help="a row's name and an evaluation's output folder"
    )
    rows = {}
    for item in parser.parse_args(command_line).results:
        name, separator, folder = item.partition("=")
        if not separator:
            parser.error(f"expected NAME=DIR, got {item!r}")
        try:
            result = read_result(folder)
        except ValueError as error:
            parser.error(str(error))
        rows.update({f"{name}, {kind}": metrics for kind, metrics in result.items()})
    print(format_table(rows))


if __name__ == "__main__":
    main()
