"""Two processes that share a batch give the losses and the gradient of one: data parallelism, ZeRO-2, ZeRO-3, FSDP2."""

import functools
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


WAYS = {  # what accelerate calls it, and the environment
    "ddp": ("MULTI_CPU", {"ACCELERATE_USE_CPU": "true"}),
    "zero2": ("DEEPSPEED", DEEPSPEED_ON_CPU),
    "zero3": ("DEEPSPEED", DEEPSPEED_ON_CPU),
    "fsdp2": ("FSDP", FSDP_ON_CPU),
}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What two processes get together in one of the ways."""

    @functools.cache
    def run(kind, checkpointing="none", chunk_size=None):
        distributed_type, environment = WAYS[kind]
        output = tmp_path_factory.mktemp(kind) / "step.safetensors"
        arguments = (kind, distributed_type, checkpointing, chunk_size, str(output))
        processes = start_forked(main, *arguments, num_processes=2, environment=environment)
        for process in processes:
            process.join(TIMEOUT)
        assert [process.exitcode for process in processes] == [0, 0]
        return load_file(output)

    return run


@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [
        *((kind, "none") for kind in WAYS),
        ("ddp", "selective"),
        *(pytest.param(kind, "selective", marks=pytest.mark.slow) for kind in ("zero3", "fsdp2")),
    ],
)
def test_two_processes_equal_one(one_process, two_processes, kind, checkpointing):
    result = two_processes(kind, checkpointing)
    assert result.keys() == one_process.keys()
    assert {"itc_loss", "region_itc_loss", "augmented_itm_loss", "mlm_loss", "step.temperature"} <= result.keys()
    for name, expected in one_process.items():
        torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(float(tensor.abs().sum()) for name, tensor in result.items() if name.startswith("step.")) > 1


@pytest.mark.parametrize(
    "kind", ["ddp", *(pytest.param(kind, marks=pytest.mark.slow) for kind in WAYS if kind != "ddp")]
)
def test_two_processes_take_the_step_of_the_whole_batch_in_chunks(two_processes, kind):
    """Chunks of 3 do not divide the 4 rows of a process. The length of the difference is compared with that of the step."""
    whole, in_chunks = two_processes(kind), two_processes(kind, chunk_size=3)
    assert in_chunks.keys() == whole.keys()
    steps = [name for name in whole if name.startswith("step.")]
    for name in whole.keys() - set(steps):
        torch.testing.assert_close(in_chunks[name], whole[name], rtol=1e-6, atol=0, msg=lambda m, n=name: f"{n}: {m}")
    difference = torch.cat([(in_chunks[name] - whole[name]).flatten() for name in steps]).norm()
    assert difference < 1e-6 * torch.cat([whole[name].flatten() for name in steps]).norm()
