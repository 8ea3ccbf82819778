"""mra/common/pretrained.py: whatever is wrong with a model's files, one sentence names the argument and the model."""

import pytest
from transformers import AutoTokenizer, BertConfig, BertModel

from mra.common.pretrained import load_pretrained
from tests.helpers.tiny import tiny_processor


@pytest.fixture
def model(tmp_path):
    config = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tiny_processor().tokenizer.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_whole_model_loads(model):
    assert load_pretrained(BertModel, str(model), "`--text`").config.hidden_size == 8
    assert len(load_pretrained(AutoTokenizer, str(model), "`--text`")) > 5


@pytest.mark.parametrize("content", [b"", b"\x00" * 64, b"{", b"[]", None])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_files(model, name, content):
    if content is None:
        (model / name).write_bytes((model / name).read_bytes()[:-20])
    else:
        (model / name).write_bytes(content)
    cls = AutoTokenizer if name == "tokenizer.json" else BertModel
    with pytest.raises(
        ValueError, match=rf"`--text`: '{model}' cannot be loaded as {cls.__name__} \(.+\): give"
    ) as caught:
        load_pretrained(cls, str(model), "`--text`")
    assert caught.value.__cause__ is not None and "\n" not in str(caught.value)


def test_the_part_of_a_pipeline_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"`base`: '.*' \(unet\) cannot be loaded as BertModel"):
        load_pretrained(BertModel, str(tmp_path), "`base`", subfolder="unet", revision=None)
