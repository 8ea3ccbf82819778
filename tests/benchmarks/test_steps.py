"""The benchmark scripts at a tiny size: what they print, and that both implementations agree; no time is judged."""

import json

import pytest

from benchmarks import chunked_step, cpu, rerank, train_step
from mra.common.private_interfaces import has_int8_products
from mra.retrieval import precision


def last_line(capsys) -> dict:
    """The JSON object that ends what a script printed."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_rerank(capsys):
    rerank.main(["--json", "--queries", "4", "--gallery", "5", "--k", "3"])
    result = last_line(capsys)
    assert result["pairs"] == 12 and 0 < result["max_abs_difference"] < 1e-4 < result["score_deviation"]
    assert result["cpu_ratio"] == pytest.approx(result["plain_cpu_ms_per_pair"] / result["cpu_ms_per_pair"])
    for name in ("pairs_per_second", "plain_pairs_per_second", "share_of_matmul_rate", "multiply_adds_ratio"):
        assert result[name] > 0, name


def test_multiply_adds_at_full_size_are_those_of_the_plan():
    """By count 3.77 G for a padded pair, of 97 image tokens and 56 text tokens, and 1.14 G for one of 28."""
    config = rerank.make_config(full_size=True)
    plain, ours = rerank.multiply_adds(config, rerank.torch.full((64,), 28), gallery=64, k=64)
    assert plain == pytest.approx(3.77e9, rel=0.02)
    assert ours == pytest.approx(1.14e9, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["selective", "none"])
def test_train_step_and_its_memory(capsys, checkpointing):
    check_train_step(capsys, "--checkpointing", checkpointing)


def test_train_step(capsys, monkeypatch):
    peaks = {
        "plain": 60,
        "ours": 30,
        "ours_vision": 20,
        "ours_without_checkpointing": 50,
    }  # each takes a process and seconds
    monkeypatch.setattr(train_step, "memory_in_another_process", lambda variant, args: peaks[variant] << 20)
    check_train_step(capsys)


def check_train_step(capsys, *arguments):
    train_step.main(["--json", "--batch_size", "4", "--steps", "1", *arguments])
    result = last_line(capsys)
    assert result["max_abs_difference"] < 1e-4
    for end in ("", "_vision", "_without_checkpointing"):
        for kind in ("", "fusion_"):
            ratio = result[f"plain_{kind}cpu_seconds"] / result[f"ours{end}_{kind}cpu_seconds"]
            assert result[f"{kind}cpu_ratio{end}"] == pytest.approx(ratio)
        memory = result["plain_peak_memory_mib"] / result[f"ours{end}_peak_memory_mib"]
        assert result[f"peak_memory_ratio{end}"] == pytest.approx(memory)


def test_chunked_step(capsys):
    chunked_step.main(["--json", "--batch_size", "10", "--chunk_size", "4"])
    result = last_line(capsys)
    assert result["cpu_ratio"] == pytest.approx(result["chunks_cpu_seconds"] / result["recomputed_cpu_seconds"])
    assert result["chunks_itc_loss"] == pytest.approx(result["itc_loss"], rel=1e-6)
    assert result["chunks_gradient_difference"] < 1e-6
    assert abs(result["accumulated_itc_loss"] - result["itc_loss"]) > 0.05 * result["itc_loss"]
    assert result["accumulated_gradient_difference"] > 0.1


def test_cpu(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "CACHE", tmp_path / "precision.json")
    monkeypatch.setattr(precision, "PROBE_SECONDS", 0.0)
    cpu.main(["--json", "--images", "2", "--pairs", "3", "--repeats", "1"])
    result = last_line(capsys)
    assert result["encoder_ratio"] == pytest.approx(result["image_seconds_plain"] / result["image_seconds"])
    assert result["matcher_ratio"] == pytest.approx(result["pair_seconds_plain"] / result["pair_seconds"])
    assert result["pair_seconds"] == pytest.approx(result["query_seconds_128_without_early_stopping"] / 128)
    assert result["query_seconds_128"] > 0 and result["cpu"] and result["dtype"] in ("float32", "bfloat16")
    assert 0.99 < result["embedding_cosine_min"] < 1.00001
    if has_int8_products():
        assert result["encoder_ratio_int8"] == pytest.approx(
            result["image_seconds_plain"] / result["image_seconds_int8"]
        )
        assert 0.99 < result["embedding_cosine_min_int8"] < 1.00001
    assert result["largest_difference_of_logits"] < 0.2
