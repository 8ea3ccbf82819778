"""Steps of small models on batches that processes share, run by test_distributed_step.py and test_accumulation.py."""

from types import SimpleNamespace

import torch

import layers_mra
from batching_mra import TextLengths
from mra.training.model_setup import set_gradient_checkpointing
from mra.training.runtime import configure_deepspeed, group_factor
from tests.helpers.fsdp_on_cpu import pretend_to_have_accelerators
from tests.helpers.tiny import tiny_batch, tiny_config, tiny_model


ROWS = 8
NO_PATH_DROPPED = {"drop_path_rate": 0.0}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OBJECTIVE = {"itm_negatives": "all", "label_smoothing": 0.1, "itc_chunk_size": 3}


def take_step(
    accelerator, rows: slice, checkpointing: str = "none", chunk_size: int | None = None
) -> dict[str, torch.Tensor]:
    """Loss of the rows of this process, averaged over the processes, and how plain SGD with rate 1 moved the weights."""
    config = tiny_config(**OBJECTIVE, vision_config=NO_PATH_DROPPED, text_config=NO_DROPOUT)
    model = tiny_model(config)  # in eval mode: BatchNorm does not see how the batch is cut
    for layers in (model.mra.vision_model, model.mra.text_model, model.mra.fusion_layers):
        layers.train()  # only layers in training recompute
    set_gradient_checkpointing(model, checkpointing)
    model.chunk_size = chunk_size
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = {name: value[rows] for name, value in tiny_batch(config, ROWS).items()}
    kinds = {"caption": "", "augmented": "augmented_", "phrase": "phrase_"}
    lengths = {kind: batch[f"{prefix}attention_mask"].sum(dim=1).tolist() for kind, prefix in kinds.items()}
    batch["lengths"] = TextLengths(**lengths, max_masked=10)  # on the host: every library has to pass it on as it is
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


def accumulate(accelerator, rows: int, batch_size: int) -> torch.Tensor | None:
    """Return the weights of a linear layer after an epoch of plain SGD over `rows` rows, batches dealt to the processes."""
    inputs, targets = linear_rows(rows)
    model = torch.nn.Linear(inputs.shape[1], 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(list(zip(inputs, targets, strict=True)), batch_size, drop_last=True)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for index, (features, expected) in enumerate(loader):
        with accelerator.accumulate(model):
            loss = (model(features)[:, 0] - expected).square().mean()
            accelerator.backward(loss * group_factor(accelerator, index, len(loader)))
            optimizer.step()
            optimizer.zero_grad()
    weights = accelerator.get_state_dict(model)  # ZeRO-3 gives them to the main process alone
    return weights["weight"].detach().float().cpu()[0] if weights else None


def linear_rows(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `(rows, 4)` and targets `(rows,)` of a regression."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 4, generator=generator), torch.randn(rows, generator=generator)


def main_accumulate(rank: int, kind: str, distributed_type: str, steps: int, arguments: tuple, output: str) -> None:
    """Accumulate in one way and save what the main process got."""
    accelerator = make_accelerator(kind, distributed_type, steps)
    weights = accumulate(accelerator, *arguments)
    if accelerator.is_main_process:
        torch.save(weights, output)
    accelerator.end_training()


def main(rank: int, kind: str, distributed_type: str, checkpointing: str, chunk_size: int | None, output: str) -> None:
    """Take a step in one way and save what the main process got."""
    from safetensors.torch import save_file

    accelerator = make_accelerator(kind, distributed_type)
    share = ROWS // 2
    layers_mra.LONG_PRODUCT = 16  # as a tiny model has them
    result = take_step(accelerator, slice(rank * share, (rank + 1) * share), checkpointing, chunk_size)
    if accelerator.is_main_process:
        save_file({name: tensor.contiguous() for name, tensor in result.items()}, output)
    accelerator.end_training()


def make_accelerator(kind: str, distributed_type: str, steps: int = 1):
    """Set up two processes in one way, `ddp`, `zero2`, `zero3` or `fsdp2`, that accumulate `steps` batches."""
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

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
            transformer_cls_names_to_wrap=["MRASwinBlock", "MRATextLayer"] if steps == 1 else ["Linear"],
            reshard_after_forward=True,
            cpu_ram_efficient_loading=False,
        )
    accelerator = Accelerator(
        **plugins,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=steps),
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")],
    )
    configure_deepspeed(accelerator, SimpleNamespace(max_grad_norm=None))
    assert (accelerator.distributed_type.value, accelerator.num_processes) == (distributed_type, 2)
    return accelerator
