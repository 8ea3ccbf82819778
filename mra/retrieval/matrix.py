"""Matrix of evaluations: every model on every dataset, which pairs are finished, and the table. `mra evaluate --matrix`."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from mra.common.files import write_whole
from mra.common.loading import load_processor
from mra.common.table_formats import format_markdown
from mra.common.tables import load_split
from mra.common.weight_files import model_digest
from mra.retrieval.arguments import EvaluatedArguments, RankingArguments, RetrievalArguments
from mra.retrieval.compare import name_ranking
from mra.retrieval.evaluation import METRIC_TITLES
from mra.retrieval.evaluation_files import (
    RANKINGS,
    REPORT_FILE,
    changed_files,
    library_versions,
    read_report,
    split_digests,
)
from mra.retrieval.ranking import would_apply_choice


logger = logging.getLogger("mra_retrieval")

TABLE_FILE = "matrix.md"
# Arguments that change no result: where it is written, and how many processes read images.
_WITHOUT_EFFECT = ("output_dir", "num_workers")


@dataclass(frozen=True)
class MatrixCell:
    """One model on one dataset.

    Attributes:
        model: name of the model in the table.
        dataset: name of the dataset.
        args: arguments of the evaluation, which writes to the folder MODEL/DATASET of the matrix.
    """

    model: str
    dataset: str
    args: RetrievalArguments


def list_cells(evaluation: EvaluatedArguments, ranking: RankingArguments) -> list[MatrixCell]:
    """List the evaluations of a matrix, model by model."""
    return [
        MatrixCell(
            model,
            dataset,
            RetrievalArguments(
                model=model_path,
                dataset=dataset_path,
                output_dir=str(Path(evaluation.output_dir) / model / dataset),
                **asdict(ranking),
            ),
        )
        for model, model_path in evaluation.named_models().items()
        for dataset, dataset_path in evaluation.named_datasets().items()
    ]


def find_unfinished(cells: list[MatrixCell]) -> list[MatrixCell]:
    """Find the cells to evaluate, after a check that every model and dataset can be read.

    Raises:
        ValueError: if a model or a split cannot be read.
    """
    models: dict[str, str] = {}
    splits: dict[str, dict[str, str]] = {}
    for args in (cell.args for cell in cells):
        if args.model not in models:
            load_processor(args.model)
            models[args.model] = model_digest(args.model)
        if args.dataset not in splits:
            splits[args.dataset] = split_digests(load_split(args.dataset, args.split, argument="--dataset"))
    unfinished = []
    for cell in cells:
        inputs = {"model": models[cell.args.model], **splits[cell.args.dataset]}
        reason = why_unfinished(cell.args, inputs)
        logger.info("%s on %s: %s", cell.model, cell.dataset, reason or f"finished already in {cell.args.output_dir}")
        if reason is not None:
            unfinished.append(cell)
    return unfinished


def why_unfinished(args: RetrievalArguments, inputs: dict[str, str]) -> str | None:
    """Return why an evaluation must be made; None if its folder holds exactly this one, with all files whole.

    It is the same if model, images and captions have the recorded digests, all arguments but `_WITHOUT_EFFECT`, the versions
    of the libraries and the applied choice of fusion are the recorded ones, and each file that was written is unchanged.

    Args:
        args: arguments of the evaluation.
        inputs: digests of what it reads: `model_digest` and `split_digests`.
    """
    if not (Path(args.output_dir) / REPORT_FILE).is_file():
        return "to be evaluated"
    report = read_report(args.output_dir)
    if not {"inputs", "files"} <= report.keys():
        return "to be evaluated again: it was stopped before all files were written, or by an older version"
    changes = [f"other {name}" for name, digest in inputs.items() if report["inputs"].get(name) != digest]
    arguments = {name: value for name, value in asdict(args).items() if name not in _WITHOUT_EFFECT}
    changes += [f"another --{name}" for name, value in arguments.items() if report["arguments"].get(name) != value]
    if report["versions"] != library_versions():
        changes.append("other versions of the libraries")
    changes += [f"another {name} than it wrote, or none" for name in changed_files(args.output_dir, report)]
    if not changes and not would_apply_choice(args, report["choice"]):
        changes.append("another choice of fusion or depth would be applied now")
    return f"to be evaluated again: {', '.join(changes)}" if changes else None


def save_matrix(cells: list[MatrixCell], folder: str) -> tuple[str, Path]:
    """Write the table of all cells, and the warnings of their evaluations, as Markdown.

    Returns:
        The text, and the path of the file.

    Raises:
        ValueError: if the report of a cell cannot be read.
    """
    rows, warnings = [], []
    for cell in cells:
        report = read_report(cell.args.output_dir)
        for ranking in (ranking for ranking in RANKINGS if ranking in report):
            label = ranking if ranking == "similarity" else f"{ranking} ({name_ranking(report)})"
            figures = [f"{report[ranking][metric]:.2f}" for metric in METRIC_TITLES]
            rows.append([cell.model, cell.dataset, label, *figures])
        warnings += [f"- {cell.model} on {cell.dataset}: {line}" for line in report["warnings"]]
    table = format_markdown(["model", "evaluated on", "ranking", *METRIC_TITLES.values()], rows, num_texts=3)
    text = "\n".join([table, *(["", "Warnings:", "", *warnings] if warnings else [])])
    path = Path(folder) / TABLE_FILE
    write_whole(path, f"{text}\n")
    return text, path
