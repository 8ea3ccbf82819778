"""Evaluate text-to-image person retrieval: encode, rank, re-rank, measure.

    python eval_retrieval.py --model outputs/finetune/best --dataset data/arrow/cuhk --split test \
        --output_dir outputs/eval --rerank_k 512

or with several processes and the same result, `accelerate launch --num_processes 4 eval_retrieval.py ...`. Prints the metrics
and writes `metrics.json`, `queries.parquet` (the results of each query), `ranking.png` and, if asked for, `failures.png` and
`scores.safetensors` to `--output_dir`.

With `--matrix`, several models are evaluated on several datasets, each pair in the folder MODEL/DATASET of `--output_dir`:

    python eval_retrieval.py --matrix --model cuhk=models/mra-cuhk icfg=models/mra-icfg \
        --dataset data/arrow/cuhk data/arrow/icfg --output_dir outputs/matrix

The fusion of scores is read from the model's `retrieval.json`, or else chosen on the validation split and saved there;
`--score_fusion` overrides it.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mra.common.arguments import parse_arguments
from mra.retrieval.arguments import EVALUATION, EvaluatedArguments, RankingArguments, RetrievalArguments


if __name__ == "__main__":
    # Answer --help and report typos before the imports below, which take seconds.
    parse_arguments(EVALUATION, description=__doc__)

import pyarrow.parquet as pq
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file

from mra.common.command_line import plain_errors, try_folder
from mra.common.files import whole_file
from mra.common.loading import load_model, load_processor
from mra.common.sharding import check_processes
from mra.common.tables import load_split
from mra.common.weight_files import model_digest
from mra.retrieval import (
    RankedQuery,
    RetrievalResult,
    draw_rankings,
    evaluate_retrieval,
    format_table,
)
from mra.retrieval.encode import read_row, undecoded
from mra.retrieval.evaluation import below_similarity
from mra.retrieval.evaluation_files import (
    QUERIES_FILE,
    REPORT_FILE,
    file_digests,
    library_versions,
    query_table,
    split_digests,
)
from mra.retrieval.matrix import find_unfinished, list_cells, save_matrix
from mra.retrieval.precision import resolve_dtype
from mra.retrieval.ranking import Ranking, find_ranking
from mra.retrieval.retrieval_choice import AUTO
from mra.retrieval.score_fusion import fusion_name


RANKED_IN_PICTURE = 10
PASSED_ON = ("flip", "batch_size", "rerank_batch_size", "num_workers")

logger = logging.getLogger("mra_retrieval")


def main(argv: list[str] | None = None, program: str = "eval_retrieval.py") -> None:
    """Evaluate a model on a split, or with `--matrix` every model on every dataset, and save and print the metrics."""
    evaluation, ranking = parse_arguments(EVALUATION, prog=program, description=__doc__, argv=argv)
    with plain_errors(program):
        state = start_processes()
    if state.is_main_process:
        logging.basicConfig(format="%(message)s")
        logger.setLevel(logging.INFO)
    if evaluation.matrix:
        evaluate_matrix(evaluation, ranking, state, program)
    else:
        of_one = {"model": evaluation.model[0], "dataset": evaluation.dataset[0], "output_dir": evaluation.output_dir}
        evaluate(RetrievalArguments(**of_one, **asdict(ranking)), state, program)
    state.destroy_process_group()


def evaluate_matrix(
    evaluation: EvaluatedArguments, ranking: RankingArguments, state: PartialState, program: str
) -> None:
    """Evaluate each pair of a model and a dataset that is not finished, and print and save the table of all."""
    cells = list_cells(evaluation, ranking)
    with plain_errors(program, evaluation.output_dir):
        unfinished = []
        if state.is_main_process:
            try_folder(evaluation.output_dir, "--output_dir")
            unfinished = find_unfinished(cells)
        (unfinished,) = broadcast_object_list([unfinished])
    for cell in unfinished:
        if state.is_main_process:
            print(f"\n{cell.model} on {cell.dataset}")
        evaluate(cell.args, state, program)
    if state.is_main_process:
        with plain_errors(program, evaluation.output_dir):
            text, path = save_matrix(cells, evaluation.output_dir)
        print(f"\n{text}\nwrote {path}")


def evaluate(args: RetrievalArguments, state: PartialState, program: str) -> None:
    """Evaluate a model on a split, print the metrics and save them."""
    options: dict[str, Any] = {name: getattr(args, name) for name in PASSED_ON} | {"progress": True}
    with plain_errors(program, args.output_dir):
        if state.is_main_process:
            try_folder(args.output_dir, "--output_dir")
        with state.main_process_first():
            dataset = load_split(args.dataset, args.split, argument="--dataset")
        model = load_model(args.model, args.attn_implementation).to(state.device)  # pyright: ignore[reportArgumentType]  # a decorator hides `self`
        (options["dtype"],) = broadcast_object_list([resolve_dtype(model.eval(), args.dtype)])
        processor = load_processor(args.model)
        also: dict[str, Any] = {}
        if state.is_main_process:
            also["inputs"] = {"model": model_digest(args.model), **split_digests(dataset)}
        ranking = find_ranking(model, processor, args, options)
        weight = 1.0 if ranking.match_weight is None else ranking.match_weight
        options |= {"rerank_k": ranking.rerank_k, "score_fusion": ranking.score_fusion, "match_weight": weight}
        result = evaluate_retrieval(model, processor, dataset, **options)

    if state.is_main_process:
        if lower := below_similarity(result.metrics):
            on = f"on {args.dataset} {args.split}"
            ranking = replace(ranking, warnings=(*ranking.warnings, f"{lower} {on}, {result.ranking}"))
        counts = ", ".join(f"{count:,} {name}" for name, count in result.counts.items())
        fusion = fusion_name(result.score_fusion, result.match_weight)
        reranked = f"top {result.rerank_k} re-ranked, {fusion} fusion" if result.rerank_k else "no re-ranking"
        print(f"{args.dataset} {args.split}: {counts}; {reranked}; {state.num_processes} process(es)")
        if ranking.choice is not None:
            print(ranking.choice.describe())
            if args.rerank_k == AUTO:
                print(ranking.choice.describe_depth())
        print(format_table({label_row(name, result): values for name, values in result.metrics.items()}))
        if args.image_to_text:
            also["image_to_text"], num_images = result.image_to_text()
            print(f"image to text: {num_images:,} images as queries to {len(result.captions):,} captions")
            print(format_table({"similarity": also["image_to_text"]}))
        for kind, lines in (("note", ranking.notes), ("warning", ranking.warnings)):
            for line in lines:
                print(f"{kind}: {line}")
        with plain_errors(program, args.output_dir, (ValueError,)):
            for path in save_result(result, ranking, dataset, args, also, state.num_processes):
                print(f"wrote {path}")


def label_row(name: str, result: RetrievalResult) -> str:
    """Return the label of a row of metrics, with the ranking of the re-ranked one."""
    return f"{name} ({result.ranking})" if name == "reranked" else name


def start_processes() -> PartialState:
    """Connect the processes of `accelerate launch`, on the CPU if ACCELERATE_USE_CPU is set.

    Raises:
        ValueError: if several were launched but not connected, so that each would do all the work.
    """
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"))
    check_processes(state.num_processes)
    return state


def save_result(
    result: RetrievalResult,
    ranking: Ranking,
    dataset: Dataset,
    args: RetrievalArguments,
    also: dict[str, Any],
    num_processes: int,
) -> list[Path]:
    """Write metrics, results of each query, picture and scores, each file atomically.

    Args:
        result: result of the evaluation.
        ranking: its ranking.
        dataset: the split.
        args: arguments of the evaluation.
        also: further entries of `metrics.json`.
        num_processes: processes that shared the work.

    Returns:
        The written paths.
    """
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        **result.metrics,
        "counts": result.counts,
        "rerank_k": result.rerank_k,
        "score_fusion": result.score_fusion if result.rerank_k else None,
        "match_weight": result.match_weight,
        "flip": result.flip,
        "dtype": result.dtype,
        "choice": None if ranking.choice is None else asdict(ranking.choice),
        "notes": ranking.notes,
        "warnings": ranking.warnings,
        "num_processes": num_processes,
        "timings": result.timings,
        "arguments": asdict(args),
        **also,
        "versions": library_versions(),
    }
    written = []

    def write(name: str, save: Callable[[Path], object]) -> None:
        path = folder / name
        with whole_file(path) as unfinished:
            save(unfinished)
        written.append(path)

    def write_report(path: Path) -> None:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    # Metrics first: a full disk or a failure to draw the picture must not lose them.
    write(REPORT_FILE, write_report)
    write(QUERIES_FILE, lambda path: pq.write_table(query_table(result), path, compression="zstd"))
    if args.save_scores:
        names = ("similarity", "reranked", "top_indices", "match_scores", "match_logits")
        names += ("query_ids", "query_rows", "gallery_ids")
        scores = {name: getattr(result, name).contiguous() for name in names if getattr(result, name) is not None}
        write("scores.safetensors", lambda path: save_file(scores, path))
    for name, queries, note in (
        ("ranking.png", spaced_queries(result, args.num_queries_in_picture), ""),
        ("failures.png", worst_queries(result, args.num_failures_in_picture), "; queries of lowest average precision"),
    ):
        if queries:
            write(name, draw_result(result, dataset, args, queries, note).save)
    # The digests come last: a report without them is that of a stopped evaluation.
    report["files"] = file_digests(written[1:])
    with whole_file(written[0]) as unfinished:
        write_report(unfinished)
    return written


def spaced_queries(result: RetrievalResult, most: int) -> list[int]:
    """Return queries evenly spaced over all, so that the selection does not depend on results."""
    num_queries = len(result.captions)
    return [number * num_queries // min(most, num_queries) for number in range(min(most, num_queries))]


def worst_queries(result: RetrievalResult, most: int) -> list[int]:
    """Return the queries of lowest average precision in the final ranking, the lowest of each person, lowest first."""
    lowest: dict[int, int] = {}
    final = list(result.queries.values())[-1]
    for query in final.average_precision.argsort(stable=True).tolist():
        lowest.setdefault(int(result.query_ids[query]), query)
    return list(lowest.values())[:most]


def draw_result(
    result: RetrievalResult, dataset: Dataset, args: RetrievalArguments, queries: list[int], note: str
) -> Image.Image:
    """Draw the final ranking of some queries; the note ends the title."""
    dataset = undecoded(dataset)
    first_rank = list(result.queries.values())[-1].first_rank
    rows = []
    for query in queries:
        order = result.scores[query].argsort(descending=True, stable=True)[:RANKED_IN_PICTURE]
        identity = int(result.query_ids[query])
        rows.append(
            RankedQuery(
                text=result.captions[query],
                images=[read_row(dataset, int(image)) for image in order],
                scores=result.scores[query, order].tolist(),
                is_match=(result.gallery_ids[order] == identity).tolist(),
                own_image=read_row(dataset, int(result.query_rows[query])),
                caption=f"query {query}, identity {identity}, first match at rank {first_rank[query]:,}",
            )
        )
    kind = list(result.metrics)[-1]
    title = (
        f"{Path(args.dataset).name} {args.split}: top {RANKED_IN_PICTURE} of {result.counts['images']:,} images, "
        f"{label_row(kind, result)}, R@1 {result.metrics[kind]['R1']:.2f}{note}"
    )
    return draw_rankings(rows, title)


if __name__ == "__main__":
    main()
