"""mra/cli.py: every verb is found, its help is quick, its example is read, and wrong words end in one sentence."""

import configparser
import importlib
import shlex
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from data_scripts.arguments import PedesArguments
from data_scripts.pedes_layouts import CSV, DATASETS
from mra.cli import VERBS, Verb, main
from mra.common.arguments import parse_arguments
from mra.gallery.arguments import NewGalleryArguments
from mra.gallery.milvus import INDEXES
from mra.gallery.types import TOKEN_DTYPES


ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("train_pretrain.py", "train_finetune.py", "eval_retrieval.py", "convert_checkpoint.py", "app.py")
MODULES = ("data_scripts.prepare_sda", "data_scripts.prepare_pedes", "mra")

# What takes seconds to import; all of it is imported by one verb or another.
HEAVY = ("torch", "transformers", "datasets", "timm", "numpy", "PIL", "pymilvus", "gradio")

SHOW_ALL_HELP = f"""
import contextlib, io, runpy, sys
from mra.cli import VERBS, main

def check(name, run, *arguments):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        run(*arguments)
    assert shown.getvalue().startswith("usage: "), (name, shown.getvalue())
    assert not (found := set({HEAVY}) & set(sys.modules)), (name, found)

for name in ["", "index", "prepare", *VERBS]:
    check(f"mra {{name}}", main, [*name.split(), "--help"])
for name in {SCRIPTS}:
    sys.argv = [name, "--help"]
    check(name, lambda: runpy.run_path(name, run_name="__main__"))
for name in {MODULES}:
    sys.argv = [name, "--help"]
    check(name, lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))
"""


def test_no_help_imports_what_takes_seconds():
    run = subprocess.run([sys.executable, "-c", SHOW_ALL_HELP], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize("name", VERBS)
def test_verbs_do_something(name):
    verb = VERBS[name]
    module, _, function = verb.run.partition(":") if isinstance(verb, Verb) else (verb.module, ":", "main")
    assert callable(getattr(importlib.import_module(module), function))
    if isinstance(verb, Verb):
        assert parse_arguments(verb.themes, argv=shlex.split(verb.example), config=False)


def test_help_lists_the_verbs(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    shown = capsys.readouterr().out
    assert stopped.value.code == 0 and all(f"\n  {name} " in shown for name in VERBS)
    with pytest.raises(SystemExit):
        main(["index", "-h"])
    assert "usage: mra index VERB" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        main([])
    assert stopped.value.code == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["serch", "x"], "mra: error: unknown verb 'serch'; did you mean 'search'?\n"),
        (["index", "bild"], "mra index: error: unknown verb 'bild'; did you mean 'build'?\n"),
        (["prepare", "7"], "mra prepare: error: unknown verb '7'; expected one of sda, pedes\n"),
        (["search", "x"], "mra search: error: --gallery: required, but not given\n"),
        (["search", "x", "--galery", "y"], "unknown argument '--galery'; did you mean '--gallery'?\n"),
        (
            ["index", "remove", "--gallery", "g.db"],
            "mra index remove: error: exactly one of --where and --keys must be given",
        ),
        (
            ["index", "add", "--gallery", "g.db", "--images", "x", "--index", "tree"],
            "one of flat, hnsw, ivf, got 'tree'",
        ),
        (["evaluate", "--model", "m"], "mra evaluate: error: --dataset, --output_dir: required, but not given\n"),
        (["prepare", "sda", "--annotations", "a"], "mra prepare sda: error: --images, --output: required"),
    ],
)
def test_wrong_words_end_in_one_sentence(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and error.count("\n") == 1


def test_choices_are_those_of_the_work():
    hints = get_type_hints(NewGalleryArguments)
    assert get_args(get_args(hints["index"])[0]) == tuple(INDEXES)
    assert get_args(get_args(hints["token_dtype"])[0]) == TOKEN_DTYPES
    assert get_args(get_type_hints(PedesArguments)["dataset"]) == (*DATASETS, CSV)


def test_the_console_script_is_installed_as_mra():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert "mra = mra.cli:main" in setup["options.entry_points"]["console_scripts"]
    assert "app" not in setup["options"]["py_modules"].split()
