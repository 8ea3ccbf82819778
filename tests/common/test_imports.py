"""mra/common/imports.py: an import out of the garbage collector's sight leaves the collector as it was."""

import gc
import json
import subprocess
import sys

import pytest

from mra.common.imports import import_quickly


@pytest.fixture
def thawed():
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("thawed")
def test_the_collector_is_as_before():
    gc.unfreeze()
    assert import_quickly("json") is json and gc.isenabled() and gc.get_freeze_count()
    with pytest.raises(ModuleNotFoundError):
        import_quickly("mra.nothing")
    assert gc.isenabled()
    gc.disable()
    try:
        import_quickly("json")
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_search_imports_no_data_sets():
    """Nor anything else that takes long and that it does not need."""
    unneeded = ("datasets", "evaluate", "gradio", "onnxruntime", "diffusers", "nltk")
    code = f"import sys, mra.gallery.search_verb; print([name for name in {unneeded} if name in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
