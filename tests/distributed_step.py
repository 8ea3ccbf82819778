"""One step of a tiny model on a batch that processes share, run by test_distributed_step.py."""

from types import SimpleNamespace

import torch

from mra_training.runtime import configure_deepspeed
from tests.fsdp_on_cpu import pretend_to_have_accelerators
from tests.tiny import tiny_batch, tiny_config, tiny_model


ROWS = 8
OBJECTIVE = {"itm_negatives": "all", "label_smoothing": 0.1, "itc_chunk_size": 3}


def take_step(accelerator, rows: slice) -> dict[str, torch.Tensor]:
    """Loss of the rows of this process, averaged over the processes, and how plain SGD with rate 1 moved the weights."""
    config = tiny_config(**OBJECTIVE)
    model = tiny_model(config)  # in eval mode: no dropout, and BatchNorm does not see how the batch is cut
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {name: value[rows] for name, value in tiny_batch(config, ROWS).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    size = len(batch["pixel_values"])
    loader = torch.utils.data.DataLoader(list(range(size)), batch_size=size)  # tells DeepSpeed the size of a batch
    model, optimizer, _ = accelerator.prepare(model, optimizer, loader)
    outputs = model(**batch, generator=torch.Generator().manual_seed(0))
    accelerator.backward(outputs.loss)
    optimizer.step()
    after = accelerator.get_state_dict(model)
    names = [name for name in outputs if name.endswith("loss")]
    losses = accelerator.gather(torch.stack([outputs[name].detach().float() for name in names])[None]).mean(dim=0)
    result = {name: loss.cpu() for name, loss in zip(names, losses, strict=True)}
    if accelerator.is_main_process:
        result |= {f"step.{name}": (after[name].float().cpu() - before[name]) for name in before if name in after}
    return result


def main(rank: int, kind: str, distributed_type: str, output: str) -> None:
    """Sets up the processes in one way (`ddp`, `zero2`, `zero3` or `fsdp2`) and saves what the main one got."""
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.utils import InitProcessGroupKwargs
    from safetensors.torch import save_file

    plugins = {}
    if kind.startswith("zero"):
        plugins["deepspeed_plugin"] = DeepSpeedPlugin(
            zero_stage=int(kind[-1]), zero3_init_flag=False, zero3_save_16bit_model=True
        )
    if kind == "fsdp2":
        pretend_to_have_accelerators()
        plugins["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["SwinTransformerBlock", "MRATextLayer"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(**plugins, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    configure_deepspeed(accelerator, SimpleNamespace(max_grad_norm=None))
    assert (accelerator.distributed_type.value, accelerator.num_processes) == (distributed_type, 2)
    share = ROWS // 2
    result = take_step(accelerator, slice(rank * share, (rank + 1) * share))
    if accelerator.is_main_process:
        save_file({name: tensor.contiguous() for name, tensor in result.items()}, output)
    accelerator.end_training()
