"""Direction of imports: each room knows the rooms below it, the [Hub] files know none."""

import ast
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[2]
# From the bottom to the top; a room imports from itself and from the rooms before it. Rooms of one rank are strangers.
RANKS = [
    {"hub"},
    {"mra.common"},
    {"mra.retrieval"},
    {"mra.gallery", "mra.training"},
    {"mra.web", "data_scripts"},
    {"scripts", "benchmarks"},
    {"mra.cli"},
    {"mra.__main__"},
]


def room_of(module: str) -> str | None:
    """Return the room of a module of the project, None of another one."""
    parts = module.split(".")
    if parts[0] == "mra":
        return ".".join(parts[:2]) if len(parts) > 1 else None
    if parts[0] in ("data_scripts", "benchmarks", "tests"):
        return parts[0]
    if not (ROOT / f"{parts[0]}.py").is_file():
        return None
    return "hub" if parts[0].endswith("_mra") else "scripts"


def rank_of(room: str) -> int:
    return next(rank for rank, rooms in enumerate(RANKS) if room in rooms)


def imported_modules(path: Path) -> set[str]:
    """Return the absolute names of all modules that a file imports, at its top or inside a function."""
    modules = set()
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            name = ".".join([*base, *filter(None, [node.module])])
            modules |= {name, *(f"{name}.{alias.name}" for alias in node.names if name in ("", "mra"))}
    return modules - {""}


def sources() -> list[Path]:
    folders = [path for name in ("mra", "data_scripts", "benchmarks") for path in (ROOT / name).rglob("*.py")]
    return sorted([*ROOT.glob("*.py"), *folders])


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    room = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
    if room is None:  # mra/__init__.py
        return
    for module in imported_modules(path):
        other = room_of(module)
        if other is None or other == room:
            continue
        if other == "tests":
            assert room == "benchmarks" and module.startswith("tests.oracle"), f"imports {module}"
        else:
            assert rank_of(other) < rank_of(room), f"imports {module}"


def test_rooms_are_recognised():
    assert room_of("mra.gallery.store") == "mra.gallery"
    assert room_of("modeling_mra") == "hub"
    assert room_of("train_pretrain") == "scripts"
    assert room_of("torch.nn") is None
