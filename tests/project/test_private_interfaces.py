"""What the project uses of libraries without their promise to keep it: all of it is listed here, and all of it is there."""

import ast
import importlib
import inspect
import logging
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from mra.common import private_interfaces
from mra.common.private_interfaces import (
    has_int8_products,
    new_shared_float32,
    pack_int8_linear,
    pack_linear,
    raise_recompile_limit,
    release_milvus_lite,
)


ROOT = Path(__file__).resolve().parents[2]
MODEL = "transformers:PreTrainedModel"

# Where it is: what breaks without it. Those of `mra/common/private_interfaces.py` have a way around.
INTERFACES = {
    "torch:UntypedStorage._new_shared": "new_shared_float32",
    "torch:ops.mkldnn._reorder_linear_weight": "pack_linear",
    "torch:ops.mkldnn._linear_pointwise": "pack_linear",
    "torch:ops.mkldnn._is_mkldnn_bf16_supported": "pack_linear",
    "torch:ops.onednn.qlinear_prepack": "pack_int8_linear",
    "torch:ops.onednn.qlinear_pointwise": "pack_int8_linear",
    "torch:cpu._is_vnni_supported": "has_int8_products",
    "torch._dynamo:config.recompile_limit": "raise_recompile_limit",
    "milvus_lite.server_manager:server_manager_instance.release_server": "release_milvus_lite",
    "torch._subclasses.fake_tensor:FakeTensorMode": "benchmarks/memory.py counts nothing",
    "torch.utils._python_dispatch:TorchDispatchMode": "benchmarks/memory.py counts nothing",
    "torch.utils._pytree:tree_leaves": "benchmarks/memory.py counts nothing",
    "torch.nn:Module._parameters": "benchmarks/memory.py counts nothing",
    "torch.nn:Module._buffers": "benchmarks/memory.py counts nothing",
}

# Methods and attributes that a library reads off its subclasses or its configurations: how they are extended.
HOOKS = {
    f"{MODEL}._init_weights": "weights start elsewhere",
    f"{MODEL}._no_split_modules": "FSDP and `compile_layers` find no layers",
    f"{MODEL}._tied_weights_keys": "the decoder is not tied to the word embeddings",
    f"{MODEL}._supports_sdpa": "attention is `eager`",
    f"{MODEL}._supports_attention_backend": "attention is `eager`",
    f"{MODEL}._keys_to_ignore_on_load_missing": "loading warns of the temperature",
    f"{MODEL}._keys_to_ignore_on_load_unexpected": "loading warns of the masked-language head",
    "transformers:PreTrainedConfig._attn_implementation": "the attention implementation cannot be read",
    "datasets:GeneratorBasedBuilder._prepare_split_single": "a failed worker does not say which row it was",
    "datasets:GeneratorBasedBuilder._generate_examples": "data sets cannot be prepared",
    "datasets:GeneratorBasedBuilder._split_generators": "data sets cannot be prepared",
    "datasets:GeneratorBasedBuilder._info": "data sets cannot be prepared",
    "evaluate:Metric._info": "the metric cannot be loaded",
    "evaluate:Metric._compute": "the metric cannot be loaded",
    "argparse:HelpFormatter._format_action_invocation": "`--help` is laid out as argparse does",
    "argparse:HelpFormatter._get_help_string": "`--help` shows defaults of nothing",
    "argparse:ArgumentParser._actions": "options cannot be listed",
}


def resolve(place: str):
    module, _, path = place.partition(":")
    value = importlib.import_module(module)
    for name in path.split("."):
        # operators and instance attributes appear only when they are asked for
        value = vars(value()).get(name) if name in ("_parameters", "_buffers", "_actions") else getattr(value, name)
    return value


@pytest.mark.parametrize("place", [*INTERFACES, *HOOKS])
def test_it_is_there(place):
    try:
        resolve(place)
    except ImportError as error:
        if "torch" not in place and "transformers" not in place:
            pytest.skip(f"not installed: {error}")
        pytest.fail(f"{place}: {(INTERFACES | HOOKS)[place]} ({error})")
    except AttributeError as error:
        pytest.fail(f"{place}: {(INTERFACES | HOOKS)[place]} ({error})")


@cache
def trees() -> dict[str, ast.Module]:
    folders = [
        path for name in ("mra", "data_scripts", "benchmarks", "metrics") for path in (ROOT / name).rglob("*.py")
    ]
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in [*ROOT.glob("*.py"), *folders]}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def own_names() -> set[str]:
    """Return every name that the project defines: functions, classes, module variables, attributes of `self`."""
    names = set()
    for tree in trees().values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    names.add(node.attr)
            elif isinstance(node, (ast.Name, ast.alias)):
                names.add(node.id if isinstance(node, ast.Name) else node.asname or node.name)
    return names


def private_uses(tree: ast.Module) -> set[str]:
    """Return private attributes that are read, private modules that are imported, and methods that call their `super()`."""
    uses = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", None) == "super"
            uses.add(f"super().{node.attr}" if is_super else node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            uses |= {part for module in modules for part in module.split(".") if is_private(part)}
            if isinstance(node, ast.ImportFrom) and not (node.module or "").startswith(("mra", "data_scripts")):
                uses |= {alias.name for alias in node.names if is_private(alias.name)}
    return uses


def test_the_lists_are_whole():
    listed = {part for place in (*INTERFACES, *HOOKS) for part in place.replace(":", ".").split(".")}
    own = own_names()
    unlisted = {
        f"{name}: {use}"
        for name, tree in trees().items()
        for use in private_uses(tree)
        if use.removeprefix("super().") not in listed and (use.startswith("super().") or use not in own)
    }
    assert not unlisted, "put it behind a function of mra/common/private_interfaces.py, and list it here"


def test_what_has_a_way_around_is_used_in_one_place():
    names = {
        place.rpartition(".")[2] for place, function in INTERFACES.items() if hasattr(private_interfaces, function)
    }
    for name, tree in trees().items():
        if name != "mra/common/private_interfaces.py":
            used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert not used & names, name


# ---------------------------------------------------------------- ways around


@pytest.fixture
def log(caplog):
    private_interfaces._warn.cache_clear()
    yield caplog
    private_interfaces._warn.cache_clear()


def test_shared_memory_without_new_shared(monkeypatch, log):
    for _ in range(2):
        tensor = new_shared_float32((2, 3))
        assert tensor.shape == (2, 3) and tensor.dtype == torch.float32 and tensor.is_shared()
        monkeypatch.setattr(torch, "UntypedStorage", object)
    assert len(log.records) == 1 and "_new_shared is missing" in log.text


@pytest.mark.parametrize("gelu", [False, True])
def test_packed_linear_equals_the_plain_one(gelu):
    linear, states = nn.Linear(8, 16), torch.randn(4, 8)
    expected = linear(states)
    packed = pack_linear(linear.weight.detach(), linear.bias.detach(), 4, gelu)
    if packed is None:
        pytest.skip("this PyTorch has no oneDNN")
    torch.testing.assert_close(packed(states), nn.functional.gelu(expected) if gelu else expected)


@pytest.mark.skipif(not has_int8_products(), reason="this CPU has no instructions for int8")
@pytest.mark.parametrize("gelu", [False, True])
def test_int8_linear_equals_the_product_of_what_it_rounds(gelu):
    torch.manual_seed(0)
    steps, rows = torch.rand(16) / 100 + 0.01, torch.randint(-126, 127, (16, 8)).float()
    rows[:, 0] = 127  # so that the scale of each output is its step
    linear, states = nn.Linear(8, 16), torch.randint(0, 256, (4, 8), dtype=torch.uint8)
    weight, bias = rows * steps[:, None], linear.bias.detach()
    packed = pack_int8_linear(weight, bias, 4, 0.03, 100, gelu)
    expected = nn.functional.linear(0.03 * (states.float() - 100), weight, bias)
    if gelu:
        expected = nn.functional.gelu(expected)
    else:
        torch.testing.assert_close(packed(states, expected), 2 * expected)
    torch.testing.assert_close(packed(states), expected)
    rounded = packed(states, None, (0.5, 20))
    assert rounded.dtype == torch.uint8
    difference = rounded.float() - (expected / 0.5 + 20).clamp(0, 255)
    assert difference.abs().max() < 0.51


def test_no_int8_without_its_operators(monkeypatch):
    monkeypatch.setattr(torch.ops, "onednn", object(), raising=False)
    assert not has_int8_products()


def test_no_packed_linear_without_its_operators(monkeypatch, log):
    monkeypatch.setattr(torch.ops, "mkldnn", object(), raising=False)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert pack_linear(torch.ones(2, 2), None, 4) is None and "a fifth longer" in log.text


def test_recompile_limit(monkeypatch, log):
    import torch._dynamo

    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    raise_recompile_limit(64)
    raise_recompile_limit(16)
    assert torch._dynamo.config.recompile_limit == 64
    monkeypatch.setattr(torch._dynamo, "config", object())
    raise_recompile_limit(128)
    assert "recompile_limit is missing" in log.text


def test_a_milvus_lite_folder_stays_locked_without_its_manager(monkeypatch, log):
    monkeypatch.setitem(sys.modules, "milvus_lite.server_manager", None)
    with log.at_level(logging.WARNING):
        release_milvus_lite("people.db")
    assert "people.db stays locked" in log.text


def test_every_function_says_what_it_does_without():
    functions = [
        f
        for _, f in inspect.getmembers(private_interfaces, inspect.isfunction)
        if f.__module__ == private_interfaces.__name__
    ]
    assert {f.__name__ for f in functions} == {name for name in INTERFACES.values() if name.isidentifier()}
