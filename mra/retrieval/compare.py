"""Compare evaluations: a table of their results, and intervals of their differences. `mra compare`."""

import csv
import io
import logging
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mra.common.table_formats import format_latex, format_markdown
from mra.retrieval.arguments import ComparisonArguments
from mra.retrieval.evaluation import METRIC_TITLES, below_similarity, describe_ranking
from mra.retrieval.evaluation_files import RANKINGS, read_queries, read_report, why_no_queries
from mra.retrieval.paired_bootstrap import paired_difference


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
    def evaluations(self) -> list[tuple[str, dict[str, Any]]]:
        """Return folder and report of each evaluation."""
        return list(zip(self.folders, self.reports, strict=True))

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
    (first, known), *others = [pair for arm in arms for pair in arm.evaluations]
    for folder, report in others:
        for name in ("images", "captions"):
            sizes = [found.get("counts", {}).get(name) for found in (known, report)]
            digests = [found.get("inputs", {}).get(name) for found in (known, report)]
            if None not in sizes and sizes[0] != sizes[1]:
                difference = f"{sizes[0]:,} and {sizes[1]:,}"
            elif None not in digests and digests[0] != digests[1]:
                difference = "equally many, with other files, people or another order"
                if name == "captions" and not (why_no_queries(known) or why_no_queries(report)):
                    difference = find_other_query(read_queries(first, known), read_queries(folder, report))
            else:
                continue
            raise ValueError(
                f"{first} and {folder} cannot be compared, because they were evaluated on other {name} ({difference}): "
                "evaluate the models on the same --dataset and --split, or tabulate several datasets with `mra evaluate "
                "--matrix`"
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


def find_queries(captions: list[str], words: list[str]) -> np.ndarray:
    """Find the captions that have one of some words, in any case and with or without a plural s: `(captions,)` bool."""
    pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, words))})s?\b", re.IGNORECASE)
    return np.array([pattern.search(caption) is not None for caption in captions])


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


Table = dict[tuple[str, ...], dict[str, Entry]]  # by name of the row and ranking (and words), then metric


def summarize(values: Sequence[float]) -> Entry:
    """Return mean and standard deviation over seeds."""
    return Entry(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def tabulate_results(arms: list[Arm]) -> Table:
    """Tabulate every metric of every arm."""
    return {
        (arm.name, arm.describe(ranking)): {name: summarize(arm.values(ranking, name)) for name in METRIC_TITLES}
        for arm in arms
        for ranking in arm.rankings
    }


@dataclass(frozen=True)
class QueryResults:
    """Results of each query of several arms.

    Attributes:
        arms: arms, of which the first is compared with the others.
        captions: text of each query.
        people: identity of each query, `(queries,)`.
        values: by name of the arm and ranking, the values of `COMPARED` in percent, `(metrics, seeds, queries)`.
        draws: settings of `paired_difference`.
    """

    arms: list[Arm]
    captions: list[str]
    people: np.ndarray
    values: dict[tuple[str, str], np.ndarray]
    draws: dict[str, int]

    @classmethod
    def read(cls, arms: list[Arm], draws: dict[str, int]) -> "QueryResults":
        """Read the results of each query of all evaluations.

        Raises:
            ValueError: if they cannot be read.
        """
        values = {}
        for arm in arms:
            tables = [read_queries(*evaluation) for evaluation in arm.evaluations]
            for ranking in arm.rankings:
                of_metrics = [[value(table, ranking) for table in tables] for value in COMPARED.values()]
                values[arm.name, ranking] = np.stack(of_metrics)
        queries = read_queries(*arms[0].evaluations[0])
        return cls(arms, queries["caption"].to_pylist(), queries["identity"].to_numpy(), values, draws)

    @property
    def rankings(self) -> list[str]:
        """Return the rankings that all arms have."""
        return [ranking for ranking in RANKINGS if all(ranking in arm.rankings for arm in self.arms)]

    def subtract(self, arm: Arm, ranking: str, chosen: np.ndarray | slice = slice(None)) -> dict[str, Entry]:
        """Return the differences of an arm to the first one, over all queries or the chosen ones."""
        ours, theirs = (self.values[each.name, ranking][..., chosen] for each in (arm, self.arms[0]))
        found = paired_difference(ours, theirs, self.people[chosen], **self.draws)
        deviations = [None] * len(COMPARED) if found.deviation is None else found.deviation
        cells = zip(found.mean, deviations, zip(found.low, found.high, strict=True), strict=True)
        return {metric: Entry(*cell) for metric, cell in zip(COMPARED, cells, strict=True)}

    def tabulate_differences(self) -> Table:
        """Tabulate the differences of all arms to the first one."""
        return {
            (f"{arm.name} - {self.arms[0].name}", ranking): self.subtract(arm, ranking)
            for arm in self.arms[1:]
            for ranking in arm.rankings
            if ranking in self.arms[0].rankings
        }

    def tabulate_words(self, groups: dict[str, list[str]]) -> tuple[Table, list[str]]:
        """Tabulate the last ranking that all arms have, and its differences, for captions with some words.

        Args:
            groups: groups of words by name.

        Returns:
            The table, and a note on each group that is left out.
        """
        table: Table = {}
        notes = []
        ranking = self.rankings[-1]
        for name, words in groups.items():
            chosen = find_queries(self.captions, words)
            if len(np.unique(self.people[chosen])) < 2:
                notes.append(
                    f"note: {name} is left out: {chosen.sum()} captions, of fewer than 2 people, have its words"
                )
                continue
            label = f"{name}, {chosen.sum():,} of {len(chosen):,}"
            for arm in self.arms:
                means = self.values[arm.name, ranking][..., chosen].mean(axis=2).tolist()
                table[arm.name, ranking, label] = dict(zip(COMPARED, map(summarize, means), strict=True))
            for arm in self.arms[1:]:
                difference = f"{arm.name} - {self.arms[0].name}"
                table[difference, ranking, label] = self.subtract(arm, ranking, chosen)
        return table, notes


def find_arms_with_queries(arms: list[Arm]) -> tuple[list[Arm], list[str]]:
    """Return the arms with results of each query, none if the first has none, and a note on each of the others."""
    found, notes = [], []
    for arm in arms:
        reasons = [f"{folder} {reason}" for folder, report in arm.evaluations if (reason := why_no_queries(report))]
        if reasons:
            notes.append(f"note: no intervals with {arm.name}: {'; '.join(reasons)}; evaluate again to get them")
        else:
            found.append(arm)
    return found if arms[0] in found else [], notes


def format_csv(tables: list[Table]) -> str:
    """Format tables as CSV with one line per cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["row", "ranking", "captions with", "metric", "mean", "deviation", "low", "high"])
    for (name, ranking, *words), entries in (item for table in tables for item in table.items()):
        for metric, entry in entries.items():
            cells = [entry.value, entry.deviation, *(entry.interval or (None, None))]
            writer.writerow([name, ranking, *(words or [None]), metric, *cells])
    return text.getvalue().rstrip("\n")


def compare(arguments: ComparisonArguments) -> None:
    """Print the results of several evaluations as one table, and the differences to the first as another."""
    arms = [
        Arm(name, folders, [read_report(folder) for folder in folders]) for name, folders in arguments.folders.items()
    ]
    check_same_data(arms)
    tables, notes = [tabulate_results(arms)], []
    if len(arms) > 1 or arguments.words:
        with_queries, notes = find_arms_with_queries(arms)
        if with_queries:
            draws = {"resamples": arguments.resamples, "seed": arguments.seed}
            results = QueryResults.read(with_queries, draws)
            by_words, left_out = results.tabulate_words(arguments.word_groups)
            tables += [table for table in (results.tabulate_differences(), by_words) if table]
            notes += left_out
            if len(with_queries) > 1:
                notes.insert(0, describe_intervals(len(arms[0].folders), arguments))
    labels = {
        arm.name if len(arm.reports) == 1 else f"{arm.name} {number}": report
        for arm in arms
        for number, report in enumerate(arm.reports, start=1)
    }
    notes += describe_differences(labels)
    if arguments.format == "csv":
        print(format_csv(tables))
    else:
        write = format_markdown if arguments.format == "markdown" else format_latex
        parts = []
        for table in tables:
            label, entries = next(iter(table.items()))
            texts = ["", "ranking", "captions with"][: len(label)]
            rows = [[*label, *map(str, entries.values())] for label, entries in table.items()]
            parts.append(write([*texts, *(METRIC_TITLES[name] for name in entries)], rows, num_texts=len(texts)))
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
