"""mra/common/loading.py: any MRA folder loads, and what is wrong with others is said."""

import pytest
import torch
from transformers import BertConfig

from modeling_mra import MRAForPreTraining, MRAModel
from mra.common.loading import VOCABULARY_PADDING, check_vocabulary, load_model, load_processor
from processing_mra import MRAProcessor
from tests.helpers.retrieval import tiny_model, tiny_processor


@pytest.mark.parametrize("cls", [MRAForPreTraining, None])
def test_models_of_each_head_load(cls, tmp_path):
    saved = tiny_model(cls) if cls else tiny_model()
    saved.save_pretrained(tmp_path)
    model = load_model(str(tmp_path), attn_implementation="eager")
    assert not model.training and model.config.text_config._attn_implementation == "eager"
    for name, tensor in saved.mra.state_dict().items():
        assert torch.equal(model.mra.state_dict()[name], tensor), name


def test_base_model_loads(tmp_path):
    saved = tiny_model(MRAModel)
    saved.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    for name, tensor in saved.state_dict().items():
        assert torch.equal(model.mra.state_dict()[name], tensor), name


def test_processor_loads_without_running_code_of_the_folder(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    for file in tmp_path.glob("*.py"):
        file.write_text("raise SystemExit('code of the folder was run')")
    processor = load_processor(str(tmp_path))
    expected = tiny_processor()(text=["a red coat"])
    assert torch.equal(processor(text=["a red coat"])["input_ids"], expected["input_ids"])
    assert type(processor.image_processor).__module__ == "processing_mra"
    load_model(str(tmp_path))


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"absent is neither a folder with a config\.json nor a model on the Hub"):
        load_model(str(tmp_path / "absent"))
    BertConfig().save_pretrained(tmp_path / "bert")
    with pytest.raises(
        ValueError, match="model_type 'bert', expected 'mra_retrieval': convert a published checkpoint"
    ):
        load_model(str(tmp_path / "bert"))
    model = tiny_model()
    model.config.save_pretrained(tmp_path / "config")
    with pytest.raises(ValueError, match="has no readable weights"):
        load_model(str(tmp_path / "config"))
    state = {name: tensor for name, tensor in model.state_dict().items() if "match_head" not in name}
    model.save_pretrained(tmp_path / "part", state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 6 weights, including mra\.match_head\.0\.bias"):
        load_model(str(tmp_path / "part"))
    with pytest.raises(ValueError, match="part has no MRA processor that can be loaded"):
        load_processor(str(tmp_path / "part"))


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_processor().save_pretrained(tmp_path)
    load_processor(str(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(
        ValueError, match=r"has no MRA processor that can be loaded \(`tokenizer` holds 5 special tokens"
    ):
        load_processor(str(tmp_path))
    with pytest.raises(ValueError, match="5 special tokens and no words"):
        MRAProcessor.from_pretrained(tmp_path)


def test_another_models_tokenizer_is_refused(tmp_path):
    processor, model = tiny_processor(), tiny_model()
    model.save_pretrained(tmp_path)
    words = len(processor.tokenizer)
    model.config.text_config.vocab_size = words + VOCABULARY_PADDING - 1  # as padded embeddings have
    check_vocabulary(processor.tokenizer, model.config, "model padded")
    for vocab_size in (words - 1, words + VOCABULARY_PADDING):
        model.config.text_config.vocab_size = vocab_size
        model.config.save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"the tokenizer has {words} tokens, but the model has {vocab_size} "):
            load_processor(str(tmp_path))
