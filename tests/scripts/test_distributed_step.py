"""Two processes that share a batch give the losses and the gradient of one: data parallelism, ZeRO-2, ZeRO-3, FSDP2."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.distributed_step import ROWS, main, take_step
from tests.helpers.runs import DEEPSPEED_ON_CPU, FSDP_ON_CPU, TIMEOUT, start_forked


@pytest.fixture(scope="module")
def one_process():
    """What one process gets for the whole batch, without any library in between."""
    accelerator = SimpleNamespace(
        prepare=lambda *objects: objects,
        backward=lambda loss: loss.backward(),
        get_state_dict=lambda model: model.state_dict(),
        gather=lambda tensor: tensor,
        is_main_process=True,
    )
    return take_step(accelerator, slice(0, ROWS))


@pytest.mark.parametrize(
    ("kind", "distributed_type", "environment", "checkpointing"),
    [
        ("ddp", "MULTI_CPU", {"ACCELERATE_USE_CPU": "true"}, "none"),
        ("ddp", "MULTI_CPU", {"ACCELERATE_USE_CPU": "true"}, "selective"),
        ("zero2", "DEEPSPEED", DEEPSPEED_ON_CPU, "none"),
        ("zero3", "DEEPSPEED", DEEPSPEED_ON_CPU, "none"),
        pytest.param("zero3", "DEEPSPEED", DEEPSPEED_ON_CPU, "selective", marks=pytest.mark.slow),
        ("fsdp2", "FSDP", FSDP_ON_CPU, "none"),
        pytest.param("fsdp2", "FSDP", FSDP_ON_CPU, "selective", marks=pytest.mark.slow),
    ],
)
def test_two_processes_equal_one(one_process, tmp_path, kind, distributed_type, environment, checkpointing):
    output = tmp_path / "step.safetensors"
    arguments = (kind, distributed_type, checkpointing, str(output))
    processes = start_forked(main, *arguments, num_processes=2, environment=environment)
    for process in processes:
        process.join(TIMEOUT)
    assert [process.exitcode for process in processes] == [0, 0]
    result = load_file(output)
    assert result.keys() == one_process.keys()
    assert {"itc_loss", "region_itc_loss", "augmented_itm_loss", "mlm_loss", "step.temperature"} <= result.keys()
    for name, expected in one_process.items():
        torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(float(tensor.abs().sum()) for name, tensor in result.items() if name.startswith("step.")) > 1
