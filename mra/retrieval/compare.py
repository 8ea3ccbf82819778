"""Compare evaluations: a table of their results, and intervals of their differences. `mra compare`."""

import csv
import io
import logging
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mra.common.table_formats import format_latex, format_markdown
from mra.retrieval.arguments import ComparisonArguments
from mra.retrieval.evaluation import METRIC_TITLES, below_similarity, describe_ranking
from mra.retrieval.evaluation_files import RANKINGS, read_queries, read_report, why_no_queries
from mra.retrieval.paired_bootstrap import PairedDifference, paired_difference


logger = logging.getLogger("mra_retrieval")

# Metrics that differences are shown of, with the values of a query in percent.
COMPARED = {
    "R1": lambda queries, ranking: 100.0 * (queries[f"{ranking}_first_rank"].to_numpy() <= 1),
    "mAP": lambda queries, ranking: 100.0 * queries[f"{ranking}_average_precision"].to_numpy(),
    "mINP": lambda queries, ranking: 100.0 * queries[f"{ranking}_inverse_negative_penalty"].to_numpy(),
}


@dataclass(frozen=True)
class Arm:
    """One row of a comparison: an evaluation, or one for each seed.

    Attributes:
        name: name of the row.
        folders: folders of the evaluations.
        reports: content of their `metrics.json`.
    """

    name: str
    folders: list[str]
    reports: list[dict[str, Any]]

    @property
    def rankings(self) -> list[str]:
        """Return the rankings that all of its evaluations have."""
        return [ranking for ranking in RANKINGS if all(ranking in report for report in self.reports)]

    def describe(self, ranking: str) -> str:
        """Return the ranking with its fusion, weight and number of re-ranked images."""
        if ranking == "similarity":
            return ranking
        names = {name_ranking(report) for report in self.reports}
        return f"reranked ({names.pop() if len(names) == 1 else 'several rankings'})"

    def values(self, ranking: str, metric: str) -> list[float]:
        """Return a metric of each evaluation in percent."""
        return [report[ranking][metric] for report in self.reports]


def read_result(folder: str) -> dict[str, dict[str, float]]:
    """Read the metrics of an evaluation; for arguments and errors see `read_report`.

    Returns:
        `similarity` and, after re-ranking, `reranked`: each a dict of percentages.
    """
    report = read_report(folder)
    return {name: report[name] for name in RANKINGS if name in report}


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


# ---------------------------------------------------------------- differences


def check_same_data(arms: list[Arm]) -> None:
    """Check that all evaluations ranked the same images for the same captions, as far as they recorded both.

    Raises:
        ValueError: if two did not; the message names them and what differs.
    """
    (first, known), *others = [pair for arm in arms for pair in zip(arm.folders, arm.reports, strict=True)]
    for folder, report in others:
        for name in ("images", "captions"):
            sizes = [found.get("counts", {}).get(name) for found in (known, report)]
            digests = [found.get("inputs", {}).get(name) for found in (known, report)]
            if None not in sizes and sizes[0] != sizes[1]:
                difference = f"{sizes[0]:,} and {sizes[1]:,}"
            elif None not in digests and digests[0] != digests[1]:
                difference = "equally many, with other files, people or another order"
                if name == "captions":
                    difference = find_other_query(read_queries(first, known), read_queries(folder, report))
            else:
                continue
            raise ValueError(
                f"{first} and {folder} cannot be compared, because they were evaluated on other {name} ({difference}): "
                "evaluate the models on the same --dataset and --split"
            )


def find_other_query(queries: pa.Table, others: pa.Table) -> str:
    """Describe the first query in which two evaluations of equally many differ."""
    names = ("query", "row", "caption")
    rows = zip(*(table.select(names).to_pylist() for table in (queries, others)), strict=True)
    ours, theirs = next((ours, theirs) for ours, theirs in rows if ours != theirs)
    return (
        f"query {ours['query']} is {ours['caption']!r} of row {ours['row']}, and {theirs['caption']!r} of row "
        f"{theirs['row']}"
    )


def compare_arms(ours: Arm, theirs: Arm, ranking: str, resamples: int, seed: int) -> PairedDifference:
    """Compute the differences of `COMPARED` between two arms, `ours - theirs`.

    Raises:
        ValueError: if the results of each query of an evaluation cannot be read, or are those of a single person.
    """
    values = []
    for arm in (ours, theirs):
        tables = [read_queries(*evaluation) for evaluation in zip(arm.folders, arm.reports, strict=True)]
        values.append(np.stack([[value(queries, ranking) for queries in tables] for value in COMPARED.values()]))
        identities = tables[0]["identity"].to_numpy()  # the same in all, see `check_same_data`
    return paired_difference(values[0], values[1], identities, resamples=resamples, seed=seed)


# ---------------------------------------------------------------- tables


@dataclass(frozen=True)
class Entry:
    """A cell of a comparison: a metric of an arm, or the difference of two.

    Attributes:
        value: mean over the seeds.
        deviation: standard deviation over the seeds, or None.
        interval: ends of the 95% interval of a difference, or None.
    """

    value: float
    deviation: float | None = None
    interval: tuple[float, float] | None = None

    def __str__(self) -> str:
        text = f"{self.value:.2f}" if self.interval is None else f"{self.value:+.2f}"
        text += "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return text if self.interval is None else f"{text} [{self.interval[0]:.2f}, {self.interval[1]:.2f}]"


Table = dict[tuple[str, str], dict[str, Entry]]  # by name of the row and ranking, then metric


def tabulate_results(arms: list[Arm]) -> Table:
    """Tabulate every metric of every arm: mean and standard deviation over seeds."""

    def summarize(values: list[float]) -> Entry:
        return Entry(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)

    return {
        (arm.name, arm.describe(ranking)): {name: summarize(arm.values(ranking, name)) for name in METRIC_TITLES}
        for arm in arms
        for ranking in arm.rankings
    }


def tabulate_differences(arms: list[Arm], resamples: int, seed: int) -> tuple[Table, list[str]]:
    """Tabulate the differences of all arms to the first one.

    Returns:
        The table, and a note on each arm without results of each query, which is left out.
    """
    table: Table = {}
    notes = []
    reference = arms[0]
    for arm in arms[1:]:
        name = f"{arm.name} - {reference.name}"
        evaluations = [pair for each in (reference, arm) for pair in zip(each.folders, each.reports, strict=True)]
        reasons = [f"{folder} {reason}" for folder, report in evaluations if (reason := why_no_queries(report))]
        if reasons:
            notes.append(f"note: no interval of {name}: {'; '.join(reasons)}; evaluate again to get one")
            continue
        for ranking in (ranking for ranking in arm.rankings if ranking in reference.rankings):
            found = compare_arms(arm, reference, ranking, resamples, seed)
            deviations = [None] * len(COMPARED) if found.deviation is None else found.deviation
            cells = zip(found.mean, deviations, zip(found.low, found.high, strict=True), strict=True)
            table[name, ranking] = {metric: Entry(*cell) for metric, cell in zip(COMPARED, cells, strict=True)}
    return table, notes


def format_csv(tables: list[Table]) -> str:
    """Format tables as CSV with one line per cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "ranking", "metric", "mean", "deviation", "low", "high"])
    for (name, ranking), entries in (item for table in tables for item in table.items()):
        for metric, entry in entries.items():
            writer.writerow([name, ranking, metric, entry.value, entry.deviation, *(entry.interval or (None, None))])
    return text.getvalue().rstrip("\n")


def compare(arguments: ComparisonArguments) -> None:
    """Print the results of several evaluations as one table, and the differences to the first as another."""
    arms = [
        Arm(name, folders, [read_report(folder) for folder in folders]) for name, folders in arguments.folders.items()
    ]
    check_same_data(arms)
    differences, notes = tabulate_differences(arms, arguments.resamples, arguments.seed)
    tables = [table for table in (tabulate_results(arms), differences) if table]
    labels = {
        arm.name if len(arm.reports) == 1 else f"{arm.name} {number}": report
        for arm in arms
        for number, report in enumerate(arm.reports, start=1)
    }
    notes = [*describe_differences(labels), *notes]
    if differences:
        notes.insert(0, describe_intervals(len(arms[0].folders), arguments))
    if arguments.format == "csv":
        print(format_csv(tables))
    else:
        write = format_markdown if arguments.format == "markdown" else format_latex
        parts = []
        for table in tables:
            columns = ["", "ranking", *(METRIC_TITLES[name] for name in next(iter(table.values())))]
            rows = [[*label, *map(str, entries.values())] for label, entries in table.items()]
            parts.append(write(columns, rows, num_texts=2))
        print("\n\n".join(parts))
    if arguments.format == "markdown":
        print("".join(f"\n{line}" for line in notes))
    else:  # the tables alone are to be read by another program
        for line in notes:
            logger.warning(line)


def describe_intervals(seeds: int, arguments: ComparisonArguments) -> str:
    """Describe in one line how the intervals of the differences were computed."""
    how = f"{seeds} seeds compared in the given order" if seeds > 1 else "one seed, so nothing about others"
    return (
        "note: differences with 95% intervals of a paired bootstrap over the people, each with all of their queries "
        f"({how}; {arguments.resamples:,} resamples, seed {arguments.seed})"
    )
