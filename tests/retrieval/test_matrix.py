"""mra/retrieval/matrix.py: names and folders of its pairs, and the table. Evaluations are tested with eval_retrieval.py."""

import json
from pathlib import Path

from mra.common.arguments import parse_arguments
from mra.retrieval.arguments import EVALUATION
from mra.retrieval.matrix import list_cells, save_matrix


def cells_of(folder, models, datasets):
    words = ["--matrix", "--model", *models, "--dataset", *datasets, "--output_dir", str(folder), "--rerank_k", "4"]
    return list_cells(*parse_arguments(EVALUATION, argv=words))


def test_names_come_from_the_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    models = ["outputs/cuhk/best", "outputs/lr=1e-4/final", "x=outputs/y=z/best", "user/mra-icfg", "models/rstp/", "."]
    cells = cells_of("out", models, ["data/arrow/cuhk", "ours=data/arrow/cuhk/../own"])
    names = ["cuhk", "lr=1e-4", "x", "mra-icfg", "rstp", tmp_path.name]
    assert [cell.model for cell in cells] == [name for name in names for _ in range(2)]
    assert [cell.dataset for cell in cells] == ["cuhk", "ours"] * 6
    assert [cell.args.model for cell in cells[:6:2]] == [
        "outputs/cuhk/best",
        "outputs/lr=1e-4/final",
        "outputs/y=z/best",
    ]
    assert [cell.args.dataset for cell in cells[:2]] == ["data/arrow/cuhk", "data/arrow/cuhk/../own"]
    assert {cell.args.output_dir for cell in cells} == {f"out/{cell.model}/{cell.dataset}" for cell in cells}
    assert {cell.args.rerank_k for cell in cells} == {4}


def test_table_holds_every_ranking_and_warning(tmp_path):
    cells = cells_of(tmp_path, ["a|b=x", "c=y"], ["z"])
    values = {"R1": 12.345, "R5": 20.0, "R10": 30.0, "mAP": 4.0, "mINP": 1.0}
    ranking = {"rerank_k": 4, "score_fusion": "posterior", "match_weight": 0.5}
    for cell, reports in zip(cells, ({"reranked": values}, {}), strict=True):
        Path(cell.args.output_dir).mkdir(parents=True)
        report = {"similarity": values, **reports, **ranking, "warnings": ["too low"] if reports else []}
        (Path(cell.args.output_dir) / "metrics.json").write_text(json.dumps(report))
    text, path = save_matrix(cells, str(tmp_path))
    assert path == tmp_path / "matrix.md" and path.read_text() == f"{text}\n"
    assert text.splitlines() == [
        "| model | evaluated on | ranking                       |   R@1 |   R@5 |  R@10 |  mAP | mINP |",
        "| ----- | ------------ | ----------------------------- | ----: | ----: | ----: | ---: | ---: |",
        "| a\\|b  | z            | similarity                    | 12.35 | 20.00 | 30.00 | 4.00 | 1.00 |",
        "| a\\|b  | z            | reranked (posterior 0.5, k 4) | 12.35 | 20.00 | 30.00 | 4.00 | 1.00 |",
        "| c     | z            | similarity                    | 12.35 | 20.00 | 30.00 | 4.00 | 1.00 |",
        "",
        "Warnings:",
        "",
        "- a|b on z: too low",
    ]
