"""Private interfaces of libraries, each behind one function with a fallback for versions that lack it.

tests/project/test_private_interfaces.py lists them, together with the library hooks that this project overrides, and reports
those that a new library version broke.
"""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast


if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)


@functools.cache
def _warn(name: str, consequence: str) -> None:
    """Log once that an interface is missing."""
    logger.warning(f"{name} is missing in the installed version: {consequence}")


def new_shared_float32(shape: Sequence[int]) -> "torch.Tensor":
    """Return an uninitialised float32 tensor in shared memory, which another process can use without a copy.

    `torch.UntypedStorage._new_shared` (used by `default_collate`) allocates it there directly; the public way copies.
    """
    import torch

    if not hasattr(torch.UntypedStorage, "_new_shared"):
        _warn("torch.UntypedStorage._new_shared", "batches are copied to shared memory")
        return torch.empty(tuple(shape)).share_memory_()
    storage = torch.UntypedStorage._new_shared(4 * math.prod(shape))
    return cast(Any, torch.empty(0)).set_(storage, 0, tuple(shape))  # its annotations lack storages


def pack_linear(
    weight: "torch.Tensor", bias: "torch.Tensor | None", rows: int, gelu: bool = False
) -> "Callable[..., torch.Tensor] | None":
    """Return a linear layer with its weight in oneDNN's own layout, as TorchInductor does for frozen weights.

    Args:
        weight: `(out, in)` float32 or bfloat16 on the CPU.
        bias: `(out,)`.
        rows: approximate number of tokens per product.
        gelu: whether to apply an exact GELU to the result.

    Returns:
        A function of `(..., in)` and, without GELU, of `(..., out)` to add to the result; or None if oneDNN or its operators
        are missing, or lack the dtype on this CPU.
    """
    import torch

    operators = torch.ops.mkldnn
    if not torch.backends.mkldnn.is_available() or weight.dtype not in (torch.float32, torch.bfloat16):
        return None
    needed = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    if not all(hasattr(operators, name) for name in needed):
        _warn("torch.ops.mkldnn", "encoding and matching on the CPU take a fifth longer")
        return None
    if weight.dtype == torch.bfloat16 and not operators._is_mkldnn_bf16_supported():
        return None
    packed = operators._reorder_linear_weight(weight, rows)
    activation = ("gelu", [], "none") if gelu else ("none", [], "")

    def product(states: torch.Tensor, added: torch.Tensor | None = None) -> torch.Tensor:
        if added is None:
            return operators._linear_pointwise(states, packed, bias, *activation)
        return operators._linear_pointwise.binary(states, added, packed, bias, "add")

    return product


def pack_int8_linear(
    weight: "torch.Tensor",
    bias: "torch.Tensor | None",
    rows: int,
    input_scale: float,
    input_zero: int,
    gelu: bool = False,
) -> "Callable[..., torch.Tensor]":
    """Return a linear layer in int8 in oneDNN's own layout, as TorchInductor does for quantised models.

    Weights become int8 with a scale for each output, symmetric around zero. Only where [`has_int8_products`] is true.

    Args:
        weight: `(out, in)` float32 on the CPU.
        bias: `(out,)`.
        rows: approximate number of tokens per product.
        input_scale: step of the inputs, which are `scale * (uint8 - zero)`.
        input_zero: the uint8 that means zero.
        gelu: whether to apply an exact GELU to the result.

    Returns:
        A function of uint8 `(..., in)`. Its second argument is `(..., out)` float32 to add to the result. Its third are scale
        and zero of a uint8 result; without them the result is float32.
    """
    import torch

    operators = torch.ops.onednn
    steps = (weight.abs().amax(dim=1) / 127).clamp(min=torch.finfo(torch.float32).tiny)
    quantized = (weight / steps[:, None]).round().to(torch.int8)
    packed = operators.qlinear_prepack(quantized, [rows, weight.shape[1]])
    scaled = (input_scale, input_zero, packed, steps, torch.zeros(len(weight), dtype=torch.int8))
    activation = ("gelu", [], "none") if gelu else ("none", [], "")

    def product(
        states: torch.Tensor, added: torch.Tensor | None = None, output: tuple[float, int] | None = None
    ) -> torch.Tensor:
        if added is not None:
            no_scale = (1.0, 0, torch.float32, 1.0, 0)
            return operators.qlinear_pointwise.binary(states, *scaled, added, bias, *no_scale, "add", 1.0, *activation)
        scale, zero, dtype = (1.0, 0, torch.float32) if output is None else (*output, torch.uint8)
        return operators.qlinear_pointwise(states, *scaled, bias, scale, zero, dtype, *activation)

    return product


def has_int8_products() -> bool:
    """Return whether [`pack_int8_linear`] works, and this CPU has the instructions (VNNI, AMX) that make it exact and fast."""
    import torch

    needed = ("qlinear_prepack", "qlinear_pointwise")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.onednn, name) for name in needed):
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("avx512_vnni", "avx_vnni", "amx_int8"))
    if hasattr(torch.cpu, "_is_vnni_supported"):
        return torch.cpu._is_vnni_supported()
    _warn("torch.cpu._is_vnni_supported", "int8 cannot be used")
    return False


def raise_recompile_limit(limit: int) -> None:
    """Let TorchDynamo compile a function for at least `limit` shapes."""
    import torch._dynamo

    config = torch._dynamo.config
    if not hasattr(config, "recompile_limit"):
        return _warn("torch._dynamo.config.recompile_limit", "layers of more than 8 shapes are not compiled")
    config.recompile_limit = max(config.recompile_limit, limit)


def release_milvus_lite(path: str) -> None:
    """Release a milvus-lite folder opened by this process, so that another process can open it."""
    try:
        from milvus_lite.server_manager import server_manager_instance

        release = server_manager_instance.release_server
    except (ImportError, AttributeError):
        return _warn("milvus_lite.server_manager", f"{path} stays locked until this process ends")
    release(path)
