"""Print the results of several evaluations as one table: `mra compare`."""

import json
from pathlib import Path
from typing import Any

from mra.retrieval.arguments import ComparisonArguments
from mra.retrieval.evaluation import below_similarity, describe_ranking, format_table


def read_report(folder: str) -> dict[str, Any]:
    """Read the report of an evaluation.

    Args:
        folder: the `--output_dir` of `mra evaluate`.

    Returns:
        Content of `metrics.json`; for files of older versions, fusion, weight and flip come from its `arguments`.

    Raises:
        ValueError: if there is no readable `metrics.json`.
    """
    path = Path(folder) / "metrics.json"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if "similarity" not in report:
            raise ValueError("it has no similarity metrics")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): expected a folder written by `mra evaluate`") from error
    arguments = report.get("arguments", {})
    return {name: arguments[name] for name in ("score_fusion", "match_weight", "flip") if name in arguments} | report


def read_result(folder: str) -> dict[str, dict[str, float]]:
    """Read the metrics of an evaluation; for arguments and errors see `read_report`.

    Returns:
        `similarity` and, after re-ranking, `reranked`: each a dict of percentages.
    """
    report = read_report(folder)
    return {name: report[name] for name in ("similarity", "reranked") if name in report}


def name_ranking(report: dict[str, Any]) -> str:
    """Describe fusion, weight and number of re-ranked images of a report."""
    if report.get("score_fusion") is None:
        return f"unknown fusion, k {report.get('rerank_k', 'unknown')}"
    return describe_ranking(report["rerank_k"], report["score_fusion"], report["match_weight"])


def describe_differences(reports: dict[str, dict[str, Any]]) -> list[str]:
    """Describe which rows were ranked differently, because the models alone do not explain their differences."""
    reranked = {name: report for name, report in reports.items() if "reranked" in report}
    rankings = {name: name_ranking(report) for name, report in reranked.items()}
    lines = []
    if len(set(rankings.values())) > 1:
        listing = "; ".join(f"{name}: {ranking}" for name, ranking in rankings.items())
        lines.append(
            f"note: the re-ranked rows differ in fusion, weight or k ({listing}): the models alone do not explain their "
            "differences; evaluate with one --score_fusion, --match_weight and --rerank_k to compare the models"
        )
    flips = {name: report.get("flip") for name, report in reports.items()}
    if len(set(flips.values())) > 1:
        words = {True: "with", False: "without", None: "unknown whether with"}
        listing = "; ".join(f"{name}: {words[flip]} mirror images" for name, flip in flips.items())
        lines.append(f"note: the rows differ in the use of mirror images ({listing})")
    for name, report in reranked.items():
        if lower := below_similarity(report):
            lines.append(f"warning: {name}: {lower} ({rankings[name]})")
    return lines


def compare(arguments: ComparisonArguments) -> None:
    """Print the results of several evaluations as one table."""
    reports = {name: read_report(folder) for name, folder in arguments.folders.items()}
    rows = {}
    for name, report in reports.items():
        rows[f"{name}, similarity"] = report["similarity"]
        if "reranked" in report:
            rows[f"{name}, reranked ({name_ranking(report)})"] = report["reranked"]
    print("\n".join([format_table(rows), *describe_differences(reports)]))
