"""Table of several evaluations: rows in the given order, what differs between them, and errors that name the file."""

import json

import pytest

from mra.cli import main
from mra.retrieval.compare import read_result


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


def test_rows_follow_the_command_line(tmp_path, capsys):
    write(tmp_path / "a", similarity=11.25, reranked=12.5)
    write(tmp_path / "b", similarity=99.0)
    main(["compare", f"second={tmp_path / 'b'}", f"first={tmp_path / 'a'}"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["R@1", "R@5", "R@10", "mAP", "mINP"]
    assert [row.split()[-5] for row in rows] == ["99.00", "11.25", "12.50"]
    assert [row.rsplit(maxsplit=5)[0] for row in rows] == [
        "second, similarity",
        "first, similarity",
        "first, reranked (posterior 0.4, k 8)",
    ]


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
    assert len(compare(tmp_path, capsys, "a")) == 3
    *_, note = compare(tmp_path, capsys, "a", "b")
    assert note.startswith("note: the re-ranked rows differ in fusion, weight or k")
    assert f"(a: posterior 0.4, k 8; b: {label})" in note


def test_mirror_images_and_reranking_below_similarity_are_named(tmp_path, capsys):
    write(tmp_path / "a", similarity=11.25, reranked=12.5)
    write(tmp_path / "b", POSTERIOR | {"flip": False}, similarity=11.25, reranked=10.0)
    *_, note, warning = compare(tmp_path, capsys, "a", "b")
    assert (
        note == "note: the rows differ in the use of mirror images (a: with mirror images; b: without mirror images)"
    )
    assert warning == (
        "warning: b: re-ranking is below similarity alone: R@1 10.00 against 11.25 (posterior 0.4, k 8)"
    )


def test_results_of_older_versions(tmp_path, capsys):
    """They name the fusion in their arguments, or nowhere."""
    arguments = {"score_fusion": "single", "match_weight": 1.0, "flip": True, "rerank_k": "auto"}
    write(tmp_path / "old", {"arguments": arguments}, similarity=11.25, reranked=12.5)
    write(tmp_path / "oldest", {}, similarity=11.25, reranked=12.5)
    assert "old, reranked (single, k 8)" in compare(tmp_path, capsys, "old")[-1]
    *_, last = compare(tmp_path, capsys, "oldest")
    assert "oldest, reranked (unknown fusion, k 8)" in last


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
    assert "the name 'a' is given twice" in capsys.readouterr().err
