"""mra/common/lazy.py: packages give their names without importing anything heavy first."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest


PACKAGES = ("mra.gallery", "mra.retrieval")
HEAVY = ("torch", "transformers", "datasets", "timm", "pymilvus", "numpy")


def test_packages_import_nothing_heavy():
    rooms = "mra, mra.common, mra.gallery, mra.retrieval, mra.training, mra.web, data_scripts"
    code = f"import sys, {rooms}; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize("name", PACKAGES)
def test_names_are_those_that_an_editor_sees(name):
    package = importlib.import_module(name)
    tree = ast.parse(Path(package.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert sorted(seen) == package.__all__
    modules = {path.stem for path in Path(package.__file__).parent.glob("*.py")}
    for attribute, module in seen.items():
        assert attribute not in modules  # else the module would stand for it once it is imported
        assert getattr(package, attribute) is getattr(importlib.import_module(module), attribute)
        assert attribute in dir(package)


def test_unknown_names_are_refused():
    with pytest.raises(ImportError, match=r"cannot import name 'Galery' from 'mra\.gallery'"):
        from mra.gallery import Galery  # noqa: F401
    with pytest.raises(AttributeError, match=r"module 'mra\.gallery' has no attribute 'Galery'"):
        _ = importlib.import_module("mra.gallery").Galery
