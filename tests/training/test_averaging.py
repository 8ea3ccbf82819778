"""The moving average of the weights: its arithmetic, what cannot have one, and what is saved."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType, PartialState

from modeling_mra import MRAForPreTraining
from mra.training.averaging import AVERAGE_FILE, check_average, check_averaging, create_average, models_of_run
from mra.training.checkpointing import save_model
from mra.training.model_setup import compile_layers, set_gradient_checkpointing
from tests.helpers.tiny import tiny_model, tiny_processor


CPU = torch.device("cpu")


def change(model, seed: int) -> dict[str, torch.Tensor]:
    """Give a model the weights and statistics of a step and return a copy of its state."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.normal_(generator=generator)
    for module in model.modules():
        if hasattr(module, "num_batches_tracked"):
            module.num_batches_tracked.fill_(seed)
    return copy.deepcopy(model.state_dict())


def test_average_of_weights_and_statistics_equals_the_recursion():
    model = tiny_model()
    average = create_average(model, 0.75, CPU)
    expected, tables = (
        None,
        {name: table.clone() for name, table in model.named_buffers() if table.dtype == torch.long},
    )
    for step in range(1, 6):
        weights = change(model, step)
        average.update_parameters(model)
        before = weights if expected is None else expected
        expected = {
            name: 0.75 * before[name] + 0.25 * tensor if tensor.is_floating_point() else tensor
            for name, tensor in weights.items()
        }
    found = average.module.state_dict()
    assert found.keys() == expected.keys() and any("running_var" in name for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
    assert all(tensor.equal(model.state_dict()[name]) for name, tensor in weights.items())  # untouched
    counters = {name for name in tables if name.endswith("num_batches_tracked")}
    assert counters and all(average.module.get_buffer(name) == 5 for name in counters)
    assert len(tables) > len(counters)


@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_whole_numbers_are_copied_not_rounded_down(decay):
    """0.9 x 3 + 0.1 x 3 can be below 3 in float32, and the index tables of Swin would drift."""
    model = torch.nn.Module()
    model.register_buffer("table", torch.arange(5000))
    average = create_average(model, decay, CPU)
    for _ in range(10):
        average.update_parameters(model)
    assert average.module.table.equal(torch.arange(5000))
    assert create_average(model, None, CPU) is None


def test_averaged_model_is_saved_with_tied_weights(tmp_path):
    model = tiny_model()
    set_gradient_checkpointing(model, "selective")
    compile_layers(model)
    average = create_average(model, 0.9, CPU)
    for step in range(2):
        change(model, step)
        average.update_parameters(model)
    assert list(models_of_run(model, None).items()) == [("", model)]
    models = models_of_run(model, average)
    assert list(models) == ["", "_ema"] and models["_ema"] is average.module
    averaged = models["_ema"]
    assert averaged.mlm_head.decoder.weight is averaged.mra.text_model.embeddings.word_embeddings.weight
    PartialState(cpu=True)
    save_model(Accelerator(cpu=True), averaged, tiny_processor(), tmp_path / "best_ema")
    loaded, info = MRAForPreTraining.from_pretrained(tmp_path / "best_ema", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.mlm_head.decoder.weight is loaded.mra.text_model.embeddings.word_embeddings.weight
    assert all(tensor.equal(averaged.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def sharing(kind: str, stage: int | None = None):
    plugin = SimpleNamespace(zero_stage=stage)
    return SimpleNamespace(
        distributed_type=getattr(DistributedType, kind), state=SimpleNamespace(deepspeed_plugin=plugin)
    )


@pytest.mark.parametrize(
    ("accelerator", "is_refused"),
    [
        (sharing("NO"), False),
        (sharing("MULTI_GPU"), False),
        (sharing("DEEPSPEED", 1), False),
        (sharing("DEEPSPEED", 2), False),
        (sharing("DEEPSPEED", 3), True),
        (sharing("FSDP"), True),
    ],
)
def test_sharded_weights_are_not_averaged(accelerator, is_refused):
    check_averaging(accelerator, None)
    if is_refused:
        with pytest.raises(ValueError, match=r"`ema_decay` is 0.9, but FSDP and ZeRO-3 shard .* ZeRO-2"):
            check_averaging(accelerator, 0.9)
    else:
        check_averaging(accelerator, 0.9)


def test_a_checkpoint_has_the_average_that_the_run_needs(tmp_path):
    check_average(tmp_path, {})  # a training without this argument
    check_average(tmp_path, {"ema_decay": None})
    with pytest.raises(ValueError, match=r"`ema_decay` is 0.9, but .* holds no averaged weights.*start a new run"):
        check_average(tmp_path, {"ema_decay": 0.9})
    (tmp_path / AVERAGE_FILE).write_bytes(b"")
    check_average(tmp_path, {"ema_decay": 0.9})
    with pytest.raises(ValueError, match=r"`ema_decay` is left out, but .* holds averaged weights: set it"):
        check_average(tmp_path, {"ema_decay": None})
