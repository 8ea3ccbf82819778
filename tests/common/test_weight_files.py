"""Downloaded weights: what is cut, or another thing in their place, is refused in a sentence that names the file."""

import pytest
import torch

from modeling_mra import MRAForPreTraining
from mra.common.loading import load_model
from mra.common.weight_files import load_tensors
from mra.training.initialization import load_bert_weights, load_for_finetuning, load_swin_weights
from tests.helpers.retrieval import tiny_model


DAMAGED = {
    "empty": (lambda content: b"", "is empty"),
    "cut": (lambda content: content[: len(content) // 2], "truncated"),
    "web page": (lambda content: b"<!doctype html><html></html>", "web page"),
    "pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_files_of_tensors(tmp_path, damage):
    path = tmp_path / "swin.pth"
    torch.save({"model": {"weight": torch.zeros(100)}}, path)
    assert load_tensors(path, "vision_weights")["model"]["weight"].shape == (100,)
    change, message = DAMAGED[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=f"swin.pth.*{message}"):
        load_swin_weights(tiny_model(MRAForPreTraining), str(path))


@pytest.mark.parametrize("damage", ["empty", "cut", "web page"])
def test_damaged_models(tmp_path, damage):
    tiny_model(MRAForPreTraining).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(DAMAGED[damage][0](path.read_bytes()))
    with pytest.raises(ValueError, match="has no readable weights"):
        load_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"`model_name_or_path`: .* cannot be loaded as MRAForPreTraining"):
        load_for_finetuning(str(tmp_path))
    with pytest.raises(ValueError, match=r"`text_weights`: .* cannot be loaded as AutoModelForMaskedLM"):
        load_bert_weights(tiny_model(MRAForPreTraining), str(tmp_path))
