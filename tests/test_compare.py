"""Table of several evaluations: rows in the given order, and errors that name the file."""

import json

import pytest

from mra_retrieval.compare import main, read_result


def write(folder, **metrics):
    folder.mkdir()
    values = {"R5": 2.0, "R10": 3.0, "mAP": 4.0, "mINP": 5.0}
    (folder / "metrics.json").write_text(
        json.dumps({k: {"R1": v, **values} for k, v in metrics.items()} | {"rerank_k": 8})
    )


def test_rows_follow_the_command_line(tmp_path, capsys):
    write(tmp_path / "a", similarity=11.25, reranked=12.5)
    write(tmp_path / "b", similarity=99.0)
    main([f"second={tmp_path / 'b'}", f"first={tmp_path / 'a'}"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["R@1", "R@5", "R@10", "mAP", "mINP"]
    assert [row.split()[-5] for row in rows] == ["99.00", "11.25", "12.50"]
    assert [row.rsplit(maxsplit=5)[0] for row in rows] == [
        "second, similarity",
        "first, similarity",
        "first, reranked",
    ]


def test_errors_name_the_file(tmp_path, capsys):
    with pytest.raises(ValueError, match=r"metrics\.json cannot be read"):
        read_result(tmp_path)
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "NAME=DIR" in capsys.readouterr().err
