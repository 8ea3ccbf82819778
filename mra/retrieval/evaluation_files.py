"""Files of an evaluation: metrics.json, and queries.parquet with the results of each query."""

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from mra.common.weight_files import file_digest
from mra.retrieval.encode import undecoded
from mra.retrieval.evaluation import RetrievalResult, read_captions
from mra.retrieval.metrics import QueryMetrics


REPORT_FILE = "metrics.json"
QUERIES_FILE = "queries.parquet"
RANKINGS = ("similarity", "reranked")
_VERSIONS_OF = ("torch", "torchvision", "timm", "transformers", "accelerate", "datasets")


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that results depend on."""
    versions = {"python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in _VERSIONS_OF}


# ---------------------------------------------------------------- what was evaluated


def split_digests(split: datasets.Dataset) -> dict[str, str]:
    """Hash what an evaluation reads of a split, by content and not by path.

    Args:
        split: the loaded split, with columns image, captions and image_id.

    Returns:
        64 hexadecimal digits for each of `images` (image files and identities, row by row) and `captions` (with the rows that
        they belong to).
    """
    captions, rows, identities = read_captions(split)
    images = hashlib.sha256()
    for row, identity in zip(undecoded(split.select_columns("image")), identities.tolist(), strict=True):
        source = row["image"]
        if isinstance(source, dict):
            source = source["path"] if source["bytes"] is None else source["bytes"]
        content = Path(source).read_bytes() if isinstance(source, str) else source or b""  # encoding refuses no image
        images.update(f"{identity}:{hashlib.sha256(content).hexdigest()}\n".encode())
    queries = json.dumps([captions, rows.tolist()]).encode()
    return {"images": images.hexdigest(), "captions": hashlib.sha256(queries).hexdigest()}


# ---------------------------------------------------------------- results of each query


def query_table(result: RetrievalResult) -> pa.Table:
    """Tabulate the results of each query.

    Returns:
        One row a query, in the order of the evaluation: `query` (its number, which is its row in scores.safetensors), `row`
        (its image in the split), `caption`, `identity`, and of each ranking `RANKING_first_rank` (from 1),
        `RANKING_average_precision` and `RANKING_inverse_negative_penalty` (0 to 1).
    """
    columns: dict[str, Any] = {
        "query": range(len(result.captions)),
        "row": result.query_rows.numpy(),
        "caption": result.captions,
        "identity": result.query_ids.numpy(),
    }
    for ranking, values in result.queries.items():
        columns |= {f"{ranking}_{name}": tensor.numpy() for name, tensor in vars(values).items()}
    return pa.table(columns)


def why_no_queries(report: dict[str, Any]) -> str | None:
    """Return why an evaluation has no results of each query, by its report; None if it has."""
    if "inputs" not in report:
        return "was written by a version that saved no results of each query"
    return None if QUERIES_FILE in report.get("files", {}) else "was stopped before all files were written"


def read_queries(folder: str | Path, report: dict[str, Any]) -> pa.Table:
    """Read the results of each query of an evaluation.

    Args:
        folder: output folder of the evaluation.
        report: its `read_report`.

    Returns:
        The table of [`query_table`].

    Raises:
        ValueError: if there are none, or the file is not the one that the evaluation wrote.
    """
    reason = why_no_queries(report)
    if reason is None:
        changed = changed_files(folder, report, (QUERIES_FILE,))
        reason = f"has another {' and '.join(changed)} than it wrote, or none" if changed else None
    if reason is not None:
        raise ValueError(f"the evaluation in {folder} {reason}: evaluate again")
    return pq.read_table(Path(folder) / QUERIES_FILE)


# ---------------------------------------------------------------- reports


def read_report(folder: str | Path) -> dict[str, Any]:
    """Read the report of an evaluation.

    Args:
        folder: the `--output_dir` of `mra evaluate`.

    Returns:
        Content of `metrics.json`; for files of older versions, fusion, weight and flip come from its `arguments`.

    Raises:
        ValueError: if there is no readable `metrics.json`.
    """
    path = Path(folder) / REPORT_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if "similarity" not in report:
            raise ValueError("it has no similarity metrics")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): expected a folder written by `mra evaluate`") from error
    arguments = report.get("arguments", {})
    return {name: arguments[name] for name in ("score_fusion", "match_weight", "flip") if name in arguments} | report


def file_digests(paths: list[Path]) -> dict[str, str]:
    """Return the digest of each file by its name, for the report's `files`."""
    return {path.name: file_digest(path) for path in paths}


def changed_files(folder: str | Path, report: dict[str, Any], names: Sequence[str] | None = None) -> list[str]:
    """Return the names of files of an evaluation that are missing, or are not those that it wrote.

    `metrics.json` is one if its metrics are not the means over the queries.

    Args:
        folder: output folder of the evaluation.
        report: its `read_report`, with `files`.
        names: files to read, among them `queries.parquet`; None for all.
    """
    paths = [Path(folder) / name for name in names or report["files"]]
    changed = [path.name for path in paths if not path.is_file() or file_digest(path) != report["files"][path.name]]
    if QUERIES_FILE not in changed:
        table = pq.read_table(Path(folder) / QUERIES_FILE)
        for ranking in (name for name in RANKINGS if name in report):
            columns = {item.name: table[f"{ranking}_{item.name}"].to_numpy() for item in fields(QueryMetrics)}
            queries = QueryMetrics(**{name: torch.tensor(column) for name, column in columns.items()})
            if queries.mean() != report[ranking]:
                return [REPORT_FILE, *changed]
    return changed
