"""LoRA adapters of `peft` on the model: a training step, save, load, merge."""

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model

from modeling_mra import MRAForPreTraining
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_model


CASES = {
    "attention": {"target_modules": ["qkv", "query", "key", "value"], "modules_to_save": ["match_head"]},
    "all linear layers": {"target_modules": "all-linear"},
    "a task of peft": {"target_modules": ["qkv", "query"], "task_type": TaskType.FEATURE_EXTRACTION},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(tiny_config()).save_pretrained(folder)
    return folder


def loss_of(model, batch):
    return model(**batch, generator=torch.Generator().manual_seed(0)).loss


@pytest.mark.parametrize("case", CASES)
def test_lora(case, base, tmp_path):
    batch = tiny_batch(tiny_config())
    torch.manual_seed(0)
    model = get_peft_model(MRAForPreTraining.from_pretrained(base), LoraConfig(r=4, **CASES[case])).train()
    model.base_model.model.activation_checkpointing_enable()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    statistics = model.mra.vision_projection.norm.running_mean.clone()
    optimizer = torch.optim.AdamW(trained, lr=0.01)
    for _ in range(2):  # the first step moves one of the two factors alone
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        assert all(parameter.grad is not None for parameter in trained)
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad or torch.equal(parameter, before[name]), name
    assert torch.equal(model.mra.vision_projection.norm.running_mean, statistics)  # an adapter would not save them

    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(MRAForPreTraining.from_pretrained(base), tmp_path / "adapter").eval()
    with torch.no_grad():
        expected = loss_of(model, batch)
        assert expected != loss_of(MRAForPreTraining.from_pretrained(base), batch)
        assert torch.equal(loss_of(loaded, batch), expected)
        features = model.get_image_features(batch["pixel_values"])
        assert torch.equal(loaded.get_image_features(batch["pixel_values"]), features)
        loaded.merge_and_unload().save_pretrained(tmp_path / "merged")
        merged = MRAForPreTraining.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(loss_of(merged, batch), expected, rtol=1e-4, atol=1e-4)
