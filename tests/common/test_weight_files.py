"""Downloaded weights: what is cut, or another thing in their place, is refused in a sentence that names the file."""

import shutil

import pytest
import torch

from modeling_mra import MRAForPreTraining
from mra.common.loading import load_model
from mra.common.weight_files import load_tensors, model_digest
from mra.training.initialization import load_bert_weights, load_for_finetuning, load_swin_weights
from tests.helpers.retrieval import tiny_model, tiny_processor


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


def test_a_models_digest_is_that_of_all_it_computes_with(tmp_path):
    model, copy = tmp_path / "model", tmp_path / "copy"
    tiny_model().save_pretrained(model)
    tiny_processor().save_pretrained(model)
    shutil.copytree(model, copy)
    (copy / "README.md").write_text("a card")
    (copy / "retrieval.json").write_text("{}")
    known = model_digest(model)
    assert model_digest(copy) == known
    for path in sorted(path for path in model.iterdir() if path.suffix != ".py"):  # code of a folder is not run
        content = (copy / path.name).read_bytes()
        (copy / path.name).write_bytes(content + b" ")
        assert model_digest(copy) != known, path.name
        (copy / path.name).unlink()
        assert model_digest(copy) != known, path.name
        (copy / path.name).write_bytes(content)
    assert model_digest(copy) == known
