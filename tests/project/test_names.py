"""Names are unique in the project, so that each says where to look."""

import ast
from collections import defaultdict
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
SHARED = {"__init__", "__main__", "arguments"}  # each room keeps the options of its commands in `arguments`


def sources() -> list[Path]:
    return sorted(
        [*ROOT.glob("*.py"), *(path for room in ("mra", "data_scripts") for path in (ROOT / room).rglob("*.py"))]
    )


def repeated(names: dict[str, list[str]]) -> dict[str, list[str]]:
    return {name: places for name, places in names.items() if len(places) > 1}


def test_no_two_modules_have_one_name():
    names = defaultdict(list)
    for path in sources():
        if path.stem not in SHARED:
            names[path.stem].append(str(path.relative_to(ROOT)))
    assert not repeated(names)


def test_no_two_classes_have_one_name():
    names = defaultdict(list)
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                names[node.name].append(str(path.relative_to(ROOT)))
    assert not repeated(names)
