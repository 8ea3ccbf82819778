"""Small changes of a module's source, each of which a good test notices."""

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field


_SWAPPED = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Break: ast.Continue,
    ast.Continue: ast.Break,
}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sorted": "list"}
_WITHOUT_RESULT = ("strict", "non_blocking")  # an assertion of `zip`, and the timing of copies to a device
_LOGGED = ("debug", "info", "warning", "warning_once", "error")


@dataclass(frozen=True)
class Mutant:
    """One changed module.

    Attributes:
        line: of the change.
        function: qualified name of the function or class around it; empty at module level.
        change: source of the changed node, before and after.
    """

    line: int
    function: str
    change: str
    _write: Callable[[], str] = field(compare=False, repr=False)

    @property
    def source(self) -> str:
        """Source of the whole changed module, written when it is asked for."""
        return self._write()


def make_mutants(source: str) -> list[Mutant]:
    """Return every mutant of a module, in the order of its lines.

    Docstrings, annotations, overloads, texts of errors and of log lines, what `TYPE_CHECKING` guards, and arguments that
    change no result (`_WITHOUT_RESULT`) are left alone.
    """
    tree = ast.parse(source)
    mutants = []
    for node, function, replace in _places(tree):
        for changed in _changes(node):

            def write(
                node: ast.AST = node, changed: ast.AST = changed, replace: Callable[[ast.AST], None] = replace
            ) -> str:
                replace(changed)
                source = ast.unparse(ast.fix_missing_locations(tree))
                replace(node)
                return source

            before, after = (" ".join(ast.unparse(part).split()) for part in (node, changed))
            mutants.append(Mutant(node.lineno, function, f"{before} -> {after}", write))
    return sorted(mutants, key=lambda mutant: mutant.line)


def _places(node: ast.AST, function: str = "") -> Iterator[tuple[ast.stmt | ast.expr, str, Callable[[ast.AST], None]]]:
    """Yield the nodes that may be changed, the function around each, and what puts another node in its place."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params") or _is_text(node, name):
            continue
        children = enumerate(value) if isinstance(value, list) else [(None, value)]
        for index, child in children:
            if not isinstance(child, ast.AST) or _is_left_alone(child):
                continue

            def replace(new: ast.AST, index: int | None = index, name: str = name) -> None:
                if index is None:
                    setattr(node, name, new)
                else:
                    getattr(node, name)[index] = new

            inner = function
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{function}.{child.name}".lstrip(".")
            if isinstance(child, ast.stmt | ast.expr):
                yield child, inner, replace
            yield from _places(child, inner)


def _is_text(node: ast.AST, field: str) -> bool:
    """Return whether a field holds the text of an error or what makes an f-string."""
    return isinstance(node, ast.JoinedStr | ast.Raise) or (isinstance(node, ast.Assert) and field == "msg")


def _is_left_alone(node: ast.AST) -> bool:
    if isinstance(node, ast.Import | ast.ImportFrom | ast.Global | ast.Nonlocal):
        return True
    if isinstance(node, ast.keyword):
        return node.arg in _WITHOUT_RESULT
    if isinstance(node, ast.FunctionDef):
        return any(isinstance(decorator, ast.Name) and decorator.id == "overload" for decorator in node.decorator_list)
    if isinstance(node, ast.If):
        return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    if isinstance(node, ast.Expr):
        call = node.value
        if isinstance(call, ast.Constant):
            return True  # a docstring
        return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr in _LOGGED
    return False


def _changes(node: ast.stmt | ast.expr) -> Iterator[ast.AST]:
    """Yield what may stand in the place of a node."""
    if isinstance(node, ast.Compare):
        for index, operator in enumerate(node.ops):
            if type(operator) in _SWAPPED:
                changed = copy.deepcopy(node)
                changed.ops[index] = _SWAPPED[type(operator)]()
                yield changed
    elif isinstance(node, ast.BinOp | ast.BoolOp | ast.AugAssign) and type(node.op) in _SWAPPED:
        changed = copy.deepcopy(node)
        changed.op = _SWAPPED[type(node.op)]()
        yield changed
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        value = not node.value if isinstance(node.value, bool) else node.value * 2 + 1
        yield ast.copy_location(ast.Constant(value), node)
    elif isinstance(node, ast.If | ast.IfExp | ast.While):
        changed = copy.deepcopy(node)
        changed.test = ast.UnaryOp(ast.Not(), changed.test)
        if isinstance(node, ast.IfExp):
            yield changed
        else:
            yield ast.copy_location(changed, node)
    elif isinstance(node, ast.Return) and node.value is not None and not _is_none_or_bool(node.value):
        yield ast.copy_location(ast.Return(None), node)
    elif isinstance(node, ast.Name) and node.id in _NAMES and isinstance(node.ctx, ast.Load):
        yield ast.copy_location(ast.Name(_NAMES[node.id], node.ctx), node)
    elif isinstance(node, ast.Break | ast.Continue):
        yield ast.copy_location(_SWAPPED[type(node)](), node)
    if _can_go(node):
        yield ast.copy_location(ast.Pass(), node)


def _can_go(node: ast.AST) -> bool:
    """Return whether a statement can be left out without making a later name undefined."""
    if isinstance(node, ast.Raise | ast.AugAssign | ast.Delete):
        return True
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Call)
    return isinstance(node, ast.Assign) and all(isinstance(t, ast.Attribute | ast.Subscript) for t in node.targets)


def _is_none_or_bool(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, bool))
