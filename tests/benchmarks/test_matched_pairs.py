"""What searches save and lose, at a tiny size: early stopping in the tables and in galleries loses no hit."""

import json

from benchmarks import matched_pairs
from tests.helpers.galleries import make_split, save_tiny_model


def test_no_first_hit_is_lost(tmp_path, capsys):
    model = save_tiny_model(tmp_path / "model")
    (tmp_path / "data").mkdir()
    for split, count in (("validation", 12), ("test", 20)):
        make_split(count).to_parquet(str(tmp_path / "data" / f"{split}-00000-of-00001.parquet"))
    arguments = ["--model", model, "--dataset", str(tmp_path), "--device", "cpu"]
    matched_pairs.main([*arguments, "--rerank", "18", "--tops", "3", "--searches", "2"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["benchmark"], found["captions"], found["images"], found["rerank"]) == ("matched_pairs", 20, 20, 18)
    assert set(found["largest_log_odds"]) == {"1", "2"}
    assert [(row["views"], row["tokens"]) for row in found["rankings"]] == [
        (views, dtype) for views in (1, 2) for dtype in ("float32", "float16", "bfloat16")
    ]
    exact, half, coarse = found["rankings"][:3]
    assert (
        exact["same_top_3"] == 1 and 0 == exact["max_difference"] < half["max_difference"] < coarse["max_difference"]
    )
    for row in (*found["early_stopping"], *found["searches"]):
        assert 8 <= row["matched_mean"] <= 18 and (row["top"], row["different"]) == (3, 0)
