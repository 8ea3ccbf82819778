"""Table of several evaluations: rows in the given order, differences with intervals, notes, and errors that name the file."""

import csv
import io
import json
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from mra.cli import main
from mra.retrieval.compare import read_result
from mra.retrieval.evaluation_files import file_digests, query_table
from mra.retrieval.metrics import query_metrics


POSTERIOR = {"score_fusion": "posterior", "match_weight": 0.4, "flip": True}


def write(folder, report=POSTERIOR, rerank_k=8, **metrics):
    folder.mkdir()
    values = {"R5": 2.0, "R10": 3.0, "mAP": 4.0, "mINP": 5.0}
    (folder / "metrics.json").write_text(
        json.dumps({k: {"R1": v, **values} for k, v in metrics.items()} | {"rerank_k": rerank_k} | report)
    )


def compare(tmp_path, capsys, *names):
    main(["compare", *(f"{name}={tmp_path / name}" for name in names)])
    return capsys.readouterr().out.splitlines()


def write_evaluation(folder, seed, skill=1.0, captions=None, images="x", rerank_k=0):
    """What an evaluation of 12 people with 2 images and 4 captions each writes, from scores drawn with a seed."""
    generator = torch.Generator().manual_seed(seed)
    gallery_ids = torch.arange(24) // 2
    query_rows = torch.arange(48) // 2
    query_ids = gallery_ids[query_rows]
    scores = torch.randn(48, 24, generator=generator) + skill * (query_ids[:, None] == gallery_ids)
    captions = [f"caption {number}" for number in range(48)] if captions is None else captions
    queries = {"similarity": query_metrics(scores, query_ids, gallery_ids)}
    if rerank_k:
        queries["reranked"] = query_metrics(scores + 0.1, query_ids, gallery_ids)
    result = SimpleNamespace(captions=captions, query_rows=query_rows, query_ids=query_ids, queries=queries)
    folder.mkdir()
    pq.write_table(query_table(result), folder / "queries.parquet")
    report = {name: values.mean() for name, values in queries.items()} | {"rerank_k": rerank_k} | POSTERIOR
    report |= {"counts": {"images": 24, "captions": 48}, "inputs": {"images": images, "captions": "".join(captions)}}
    report["files"] = file_digests([folder / "queries.parquet"])
    (folder / "metrics.json").write_text(json.dumps(report))
    return report


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_rows_follow_the_command_line(tmp_path, capsys):
    write(tmp_path / "a", similarity=11.25, reranked=12.5)
    write(tmp_path / "b", similarity=99.0)
    main(["compare", f"second={tmp_path / 'b'}", f"first={tmp_path / 'a'}"])
    header, _, *rows = map(cells, capsys.readouterr().out.splitlines()[:5])
    assert header == ["", "ranking", "R@1", "R@5", "R@10", "mAP", "mINP"]
    assert [row[:3] for row in rows] == [
        ["second", "similarity", "99.00"],
        ["first", "similarity", "11.25"],
        ["first", "reranked (posterior 0.4, k 8)", "12.50"],
    ]


def test_differences_to_the_first_have_intervals(tmp_path, capsys):
    reports = {name: write_evaluation(tmp_path / name, *of) for name, of in (("a", (0, 0.5)), ("b", (1, 2.0)))}
    out = compare(tmp_path, capsys, "a", "b")
    header, _, row = map(cells, out[5:8])
    assert header == ["", "ranking", "R@1", "mAP", "mINP"] and row[:2] == ["b - a", "similarity"]
    for cell, metric in zip(row[2:], ("R1", "mAP", "mINP"), strict=True):
        value, low, high = (float(part.strip("[],")) for part in cell.split())
        difference = reports["b"]["similarity"][metric] - reports["a"]["similarity"][metric]
        assert value == pytest.approx(difference, abs=0.005) and cell.startswith("+") and 0 < low < value < high
    assert "paired bootstrap over the people, each with all of their queries (one seed" in out[-1]
    assert compare(tmp_path, capsys, "a", "b") == out


def test_seeds_of_one_name(tmp_path, capsys, caplog):
    runs = {name: write_evaluation(tmp_path / name, number) for number, name in enumerate(("a0", "a1", "b0", "b1"))}
    words = [f"{name[0]}={tmp_path / name}" for name in runs]
    main(["compare", *words, "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert "2 seeds compared in the given order" in caplog.text
    values = {name: report["similarity"]["mAP"] for name, report in runs.items()}
    (row,) = [row for row in rows if (row["row"], row["metric"]) == ("a", "mAP")]
    assert float(row["mean"]) == pytest.approx((values["a0"] + values["a1"]) / 2) and row["low"] == ""
    assert float(row["deviation"]) == pytest.approx(np.std([values["a0"], values["a1"]], ddof=1))
    (row,) = [row for row in rows if (row["row"], row["metric"]) == ("b - a", "mAP")]
    by_seed = [values["b0"] - values["a0"], values["b1"] - values["a1"]]
    assert float(row["mean"]) == pytest.approx(np.mean(by_seed))
    assert float(row["deviation"]) == pytest.approx(np.std(by_seed, ddof=1))
    assert float(row["low"]) < float(row["mean"]) < float(row["high"])
    main(["compare", *words])
    out = capsys.readouterr().out.splitlines()
    assert f"{(values['a0'] + values['a1']) / 2:.2f} ± {np.std([values['a0'], values['a1']], ddof=1):.2f}" in out[2]
    assert cells(out[7])[0] == "b - a"
    with pytest.raises(SystemExit):
        main(["compare", *words[:3]])
    assert "same number of evaluations, which are compared seed by seed, got a: 2, b: 1" in capsys.readouterr().err


def test_latex(tmp_path, capsys):
    for seed, name in enumerate("ab"):
        write_evaluation(tmp_path / name, seed, rerank_k=8)
    main(["compare", *(f"{name}_1={tmp_path / name}" for name in "ab"), "--format", "latex"])
    out = capsys.readouterr().out
    assert out.count("\\begin{tabular}") == out.count("\\end{tabular}") == 2
    assert (
        "a\\_1 & reranked (posterior 0.4, k 8) & " in out
        and "b\\_1 - a\\_1 & reranked & " in out
        and "note" not in out
    )


def test_captions_with_some_words(tmp_path, capsys):
    """Figures of the captions that have a word, in any case and as a plural, but not as a part of another."""
    captions = [("a Coat", "two coats, red", "a raincoat", "shoes")[number % 4] for number in range(48)]
    captions[0] = "a hat"
    for seed, name in enumerate("ab"):
        write_evaluation(tmp_path / name, seed, captions=captions)
    groups = ["outer=coat,jacket", "hat=hat", "bag=bag"]
    words = [f"{name}={tmp_path / name}" for name in "ab"]
    main(["compare", *words, "--words", *groups, "--format", "csv"])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    chosen = np.array([number % 4 < 2 and number > 0 for number in range(48)])
    shown = [(row["row"], row["captions with"]) for row in rows if row["metric"] == "mAP" and row["captions with"]]
    assert shown == [(name, "outer, 23 of 48") for name in ("a", "b", "b - a")]
    means = {}
    for name in "ab":
        table = pq.read_table(tmp_path / name / "queries.parquet")
        means[name] = 100 * table["similarity_average_precision"].to_numpy()[chosen].mean()
    means["b - a"] = means["b"] - means["a"]
    for row in rows:
        if row["metric"] == "mAP" and row["captions with"]:
            assert float(row["mean"]) == pytest.approx(means[row["row"]])
    assert float(rows[-2]["low"]) < means["b - a"] < float(rows[-2]["high"])
    main(["compare", words[0], "--words", *groups])
    out = capsys.readouterr().out
    assert "|     | ranking    | captions with   |" in out and "intervals" not in out
    assert "note: hat is left out: 1 captions, of fewer than 2 people, have its words" in out
    assert "note: bag is left out: 0 captions" in out
    for wrong in (["bag"], ["bag=a,,b"], ["=a"], ["bag=a", "bag=b"]):
        with pytest.raises(SystemExit):
            main(["compare", words[0], "--words", *wrong])
        assert "`words` must be groups" in capsys.readouterr().err


def test_other_images_or_captions_are_an_error(tmp_path):
    write_evaluation(tmp_path / "a", 0)
    write_evaluation(tmp_path / "images", 0, images="y")
    changed = [f"caption {number}" for number in range(48)]
    changed[5] = "another"
    write_evaluation(tmp_path / "captions", 0, captions=changed)
    write(tmp_path / "fewer", {"counts": {"images": 24, "captions": 40}}, similarity=1.0)
    for name, message in (
        ("images", "on other images (equally many, with other files, people or another order)"),
        ("captions", "on other captions (query 5 is 'caption 5' of row 2, and 'another' of row 2)"),
        ("fewer", "on other captions (48 and 40)"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["compare", f"a={tmp_path / 'a'}", f"b={tmp_path / name}"])
        assert message in str(stopped.value) and f"{tmp_path / 'a'} and {tmp_path / name} cannot" in str(stopped.value)


def test_evaluations_without_results_of_each_query_have_no_interval(tmp_path, capsys):
    report = write_evaluation(tmp_path / "a", 0)
    write_evaluation(tmp_path / "b", 1)
    write(tmp_path / "old", similarity=11.25)
    out = compare(tmp_path, capsys, "a", "old", "b")
    assert [cells(line)[0] for line in out[2:9]] == ["a", "old", "b", "", "", "-----", "b - a"]
    assert f"no intervals with old: {tmp_path / 'old'} was written by a version that saved no results" in out[-1]
    del report["files"]
    (tmp_path / "a" / "metrics.json").write_text(json.dumps(report))
    *_, last = compare(tmp_path, capsys, "a", "b")
    assert f"no intervals with a: {tmp_path / 'a'} was stopped before all files were written; evaluate again" in last


def test_changed_results_of_queries_are_an_error(tmp_path):
    for seed, name in enumerate("ab"):
        write_evaluation(tmp_path / name, seed)
    (tmp_path / "b" / "queries.parquet").write_bytes((tmp_path / "a" / "queries.parquet").read_bytes())
    with pytest.raises(SystemExit, match=r"b has another queries\.parquet than it wrote, or none: evaluate again"):
        main(["compare", f"a={tmp_path / 'a'}", f"b={tmp_path / 'b'}"])


@pytest.mark.parametrize(
    ("other", "label"),
    [
        ({"score_fusion": "published", "match_weight": None}, "published, k 8"),
        ({"match_weight": 0.2}, "posterior 0.2, k 8"),
        ({"rerank_k": 4}, "posterior 0.4, k 4"),
    ],
)
def test_rows_that_were_not_ranked_alike_are_named(tmp_path, capsys, other, label):
    write(tmp_path / "a", similarity=11.25, reranked=12.5)
    write(tmp_path / "b", POSTERIOR | other, similarity=11.25, reranked=12.5)
    assert not [line for line in compare(tmp_path, capsys, "a") if line.startswith("note")]
    out = "\n".join(compare(tmp_path, capsys, "a", "b"))
    assert f"note: the re-ranked rows differ in fusion, weight or k (a: posterior 0.4, k 8; b: {label})" in out


def test_mirror_images_and_reranking_below_similarity_are_named(tmp_path, capsys):
    write(tmp_path / "a", similarity=11.25, reranked=12.5)
    write(tmp_path / "b", POSTERIOR | {"flip": False}, similarity=11.25, reranked=10.0)
    out = compare(tmp_path, capsys, "a", "b")
    assert "note: the rows differ in the use of mirror images (a: with mirror images; b: without mirror images)" in out
    assert "warning: b: re-ranking is below similarity alone: R@1 10.00 against 11.25 (posterior 0.4, k 8)" in out


def test_results_of_older_versions(tmp_path, capsys):
    """They name the fusion in their arguments, or nowhere."""
    arguments = {"score_fusion": "single", "match_weight": 1.0, "flip": True, "rerank_k": "auto"}
    write(tmp_path / "old", {"arguments": arguments}, similarity=11.25, reranked=12.5)
    write(tmp_path / "oldest", {}, similarity=11.25, reranked=12.5)
    assert cells(compare(tmp_path, capsys, "old")[3])[:2] == ["old", "reranked (single, k 8)"]
    assert cells(compare(tmp_path, capsys, "oldest")[3])[:2] == ["oldest", "reranked (unknown fusion, k 8)"]


def test_errors_name_the_file(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"metrics\.json cannot be read"):
        read_result(tmp_path)
    for text in ("[]", "{}", "{"):
        (tmp_path / "metrics.json").write_text(text)
        with pytest.raises(ValueError, match=r"metrics\.json cannot be read"):
            read_result(tmp_path)
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path)])
    assert "NAME=DIR" in capsys.readouterr().err
    write(tmp_path / "a", similarity=11.25)
    with pytest.raises(SystemExit):
        main(["compare", f"a={tmp_path / 'a'}", f"a={tmp_path / 'a'}"])
    assert f"a={tmp_path / 'a'} is given twice: each evaluation counts once" in capsys.readouterr().err
