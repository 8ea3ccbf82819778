"""The two training scripts hold the same loop word for word, and the same headings in the same order."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ("train_pretrain.py", "train_finetune.py")
HEADINGS = (
    "Parse",
    "Accelerator",
    "Data",
    "Model",
    "Optimizer and schedule",
    "Prepare",
    "Resume",
    "Loop",
    "Evaluate",
    "Save",
)


def stages(script: str) -> dict[str, str]:
    source = (ROOT / script).read_text()
    main = source[source.index("def main(") : source.rindex('if __name__ == "__main__":')]
    pieces = re.split(r"^ +# ([A-Z][a-z ]+)\n", main, flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


def test_headings_stand_in_the_same_order():
    for script in SCRIPTS:
        assert tuple(stages(script)) == HEADINGS, script


@pytest.mark.parametrize("heading", [name for name in HEADINGS if name not in ("Data", "Prepare")])
def test_stages_are_the_same_word_for_word(heading):
    first, second = (stages(script)[heading] for script in SCRIPTS)
    assert first == second


def test_what_differs_is_small():
    first, second = (stages(script) for script in SCRIPTS)
    differing = {
        name: [
            pair
            for pair in zip(first[name].splitlines(), second[name].splitlines(), strict=True)
            if len(set(pair)) > 1
        ]
        for name in ("Data", "Prepare")
    }
    assert {name: len(lines) for name, lines in differing.items()} == {"Data": 1, "Prepare": 1}


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_stay_short(script):
    source = (ROOT / script).read_text()
    assert len(source.splitlines()) <= 350
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            loops = sum(
                loop.end_lineno - loop.lineno + 1 for loop in node.body if isinstance(loop, (ast.For, ast.While))
            )
            assert node.end_lineno - node.lineno + 1 - loops <= 60, node.name
