"""The [Hub] files take their siblings from their own folder, and a library's missing helper is named as such."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from modeling_mra import MRAForPreTraining
from tests.helpers.tiny import tiny_config


ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(ROOT.glob("*_mra.py"))
ALLOWED = {"PIL", "numpy", "huggingface_hub", "timm", "torch", "transformers"} | set(sys.stdlib_module_names)

LOAD = """
import sys
from transformers import AutoModel
import transformers.models.bert.modeling_bert as bert

if "missing" in sys.argv:
    del bert.eager_attention_forward
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
module = sys.modules[type(model).__module__]
print("module", module.__name__)
print("layers", module.MRAFusionLayer.__module__)
print("flat", sorted(name for name in sys.modules if name.endswith("_mra") and "." not in name))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hub") / "model"
    MRAForPreTraining(tiny_config()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def other_version(tmp_path_factory):
    """An installation of another version, whose every module may be imported but must not be."""
    path = tmp_path_factory.mktemp("site")
    for file in FILES:
        (path / file.name).write_text(file.read_text())
    return path


def load(folder, tmp_path, installed=None, *arguments):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    (tmp_path / "load.py").write_text(LOAD)
    # -S leaves out site-packages, and with them an editable installation of the project: add back the libraries alone
    paths = [path for path in sys.path if path.endswith("site-packages")] + ([str(installed)] if installed else [])
    start = f"import sys, runpy; sys.path += {paths!r}; sys.argv = ['load.py', {str(folder)!r}, *{arguments!r}]; "
    start += "runpy.run_path('load.py', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-S", "-c", start], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_fallbacks_raise_within_a_package(file):
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and getattr(node.type, "id", None) == "ImportError":
            assert ast.unparse(node.body[0]) == "if __package__:\n    raise"
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module]
        for name in names:
            assert name.split(".")[0] in ALLOWED or name.endswith("_mra"), name


@pytest.mark.parametrize("with_other_version", [False, True])
def test_a_missing_helper_of_a_library_is_named(with_other_version, folder, other_version, tmp_path):
    process = load(folder, tmp_path, other_version if with_other_version else None, "missing")
    assert process.returncode != 0
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: cannot import name 'eager_attention_forward'"), process.stderr


def test_another_installed_version_is_not_used(folder, other_version, tmp_path):
    process = load(folder, tmp_path, other_version)
    assert process.returncode == 0, process.stderr
    found = dict(
        line.split(" ", 1)
        for line in process.stdout.splitlines()
        if line.split(" ")[0] in ("module", "layers", "flat")
    )
    assert found["module"].startswith("transformers_modules.")
    assert found["layers"] == found["module"].replace("modeling_mra", "layers_mra")
    assert found["flat"] == "[]"


def test_a_missing_helper_is_named_from_the_root(tmp_path):
    command = (
        "import transformers.models.bert.modeling_bert as bert; del bert.eager_attention_forward; import modeling_mra"
    )
    process = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=600)
    last = process.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: cannot import name 'eager_attention_forward'"), process.stderr
