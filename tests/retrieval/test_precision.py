"""The choice of the faster precision: measured once for a processor and remembered."""

import json
import logging

import pytest
import torch

from mra.retrieval import precision
from mra.retrieval.encoders import TorchEncoder
from mra.retrieval.precision import bfloat16_gain, resolve_dtype
from tests.helpers.tiny import tiny_config, tiny_model, tiny_processor


@pytest.fixture(autouse=True)
def quick_probe(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "CACHE", tmp_path / "cache" / "precision.json")
    monkeypatch.setattr(precision, "PROBE_SECONDS", 0.0)


def with_gain(monkeypatch, gain):
    seconds = {torch.float32: 1.0, torch.bfloat16: 1 / gain}
    monkeypatch.setattr(precision, "_measure", lambda model: seconds)


@pytest.mark.parametrize("gain, expected", [(3.9, torch.bfloat16), (1.05, torch.float32), (0.4, torch.float32)])
def test_auto_is_the_faster_one_and_says_so(monkeypatch, caplog, gain, expected):
    with_gain(monkeypatch, gain)
    with caplog.at_level(logging.INFO):
        assert resolve_dtype(tiny_model(), "auto") == expected
    assert f"bfloat16: {gain:.1f}x float32 on this CPU (" in caplog.text


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_a_slower_bfloat16_is_warned_of(monkeypatch, caplog, dtype):
    with_gain(monkeypatch, 0.5)
    assert resolve_dtype(tiny_model(), dtype) == torch.bfloat16
    assert "bfloat16 is 2.0 times slower than float32 on this CPU" in caplog.text


def test_what_needs_no_probe(monkeypatch, caplog):
    monkeypatch.setattr(precision, "_measure", lambda model: pytest.fail("measured"))
    model = tiny_model()
    assert resolve_dtype(model, None) is None
    assert resolve_dtype(model, "float32") == resolve_dtype(model, torch.float32) == torch.float32
    half = tiny_model().bfloat16()
    assert resolve_dtype(half, "auto") is None and resolve_dtype(half, "bfloat16") == torch.bfloat16
    assert not caplog.text


def test_a_probe_is_remembered_for_processor_threads_and_architecture(monkeypatch):
    model = tiny_model()
    gain = bfloat16_gain(model)
    assert 0.01 < gain < 100
    (key,) = json.loads(precision.CACHE.read_text())
    assert "1 threads" in key and torch.__version__ in key
    with_gain(monkeypatch, 7.0)
    assert bfloat16_gain(model) == gain
    assert bfloat16_gain(tiny_model(tiny_config(vision_config={"embed_dim": 16}))) == pytest.approx(7.0)
    assert len(json.loads(precision.CACHE.read_text())) == 2


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": -1.0}', "\x00"])
def test_a_damaged_cache_is_measured_anew(monkeypatch, content):
    with_gain(monkeypatch, 2.0)
    precision.CACHE.parent.mkdir()
    precision.CACHE.write_text(content)
    assert bfloat16_gain(tiny_model()) == 2.0
    assert list(json.loads(precision.CACHE.read_text()).values()) == [2.0]


def test_a_cache_that_cannot_be_written_costs_another_probe_only(monkeypatch, tmp_path):
    with_gain(monkeypatch, 2.0)
    (tmp_path / "cache").write_text("a file")
    assert bfloat16_gain(tiny_model()) == 2.0


def test_an_encoder_takes_auto(monkeypatch, tmp_path):
    with_gain(monkeypatch, 2.0)
    tiny_model().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    encoder = TorchEncoder(str(tmp_path / "model"), device="cpu", dtype="auto")
    assert encoder.dtype == torch.bfloat16
    plain = TorchEncoder(str(tmp_path / "model"), device="cpu")
    texts = ["a red coat"]
    difference = (encoder.encode_texts(texts).embeds - plain.encode_texts(texts).embeds).abs().max()
    assert 0 < difference < 0.05
