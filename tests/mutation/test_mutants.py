"""tests/mutation: the changes that are made, what is left alone, and lists that fit the code."""

import pytest
import yaml

from tests.mutation.mutants import HERE, ROOT, choose
from tests.mutation.operators import make_mutants


MODULES = yaml.safe_load((HERE / "modules.yaml").read_text())
EQUIVALENT = yaml.safe_load((HERE / "equivalent.yaml").read_text()) or {}

SOURCE = '''
"""Docstring 1."""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import one
LIMIT: int = 3
def cut(rows: list[int], strict=False):
    """Docstring 2."""
    if not rows:
        raise ValueError(f"rows: {len(rows) + 1}")
    logger.warning("3 rows")
    last.value = min(rows)
    return rows[:LIMIT] if strict else None
'''


def test_every_change_of_a_small_module():
    changes = [(mutant.line, mutant.function, mutant.change) for mutant in make_mutants(SOURCE)]
    assert changes == [
        (6, "", "3 -> 7"),
        (7, "cut", "False -> True"),
        (9, "cut", "if not rows: raise ValueError(f'rows: {len(rows) + 1}') -> if not not rows: "
         "raise ValueError(f'rows: {len(rows) + 1}')"),
        (9, "cut", "not rows -> rows"),
        (10, "cut", "raise ValueError(f'rows: {len(rows) + 1}') -> pass"),
        (12, "cut", "last.value = min(rows) -> pass"),
        (12, "cut", "min -> max"),
        (13, "cut", "return rows[:LIMIT] if strict else None -> return"),
        (13, "cut", "rows[:LIMIT] if strict else None -> rows[:LIMIT] if not strict else None"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "changed"),
    [
        ("a < b <= c", ["a <= b <= c", "a < b < c"]),
        ("a + b", ["a - b"]),
        ("a and b", ["a or b"]),
        ("-1", ["1", "-3"]),
        ("x += 0.5", ["x -= 0.5", "pass", "x += 2.0"]),
        ("x = y", []),
        ("call(x)", ["pass"]),
        ("def f():\n    return False", ["def f():\n    return True"]),
        ("x = zip(y, strict=True)", []),
        ("@overload\ndef f(x=False):\n    ...", []),
    ],
)
def test_operators(source, changed):
    assert sorted(mutant.source for mutant in make_mutants(source)) == sorted(changed)


def test_every_mutant_differs_and_the_source_stays():
    mutants = make_mutants(SOURCE)
    assert len({mutant.source for mutant in mutants}) == len(mutants)


def test_a_sample_is_the_same_each_time():
    first = choose("losses_mra", 5, 0, {})
    assert len(first) == 5 and first == choose("losses_mra", 5, 0, {}) != choose("losses_mra", 5, 1, {})


@pytest.mark.parametrize("module", MODULES)
def test_lists_fit_the_code(module):
    assert all((ROOT / test).is_file() for test in MODULES[module])
    known = {
        f"{mutant.function}: {mutant.change}"
        for mutant in make_mutants((ROOT / f"{module.replace('.', '/')}.py").read_text())
    }
    assert EQUIVALENT.get(module, {}).keys() <= known, "listed as equivalent, but not in the code any more"
