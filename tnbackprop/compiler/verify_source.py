"""Invariants of the emitted source: straight-line Python that reads what is there."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from functools import lru_cache

Flaws = Iterator[tuple[str, str]]
SourceCheck = Callable[[str, frozenset[str]], Flaws]

SYNCHRONISING = frozenset({"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique"})
"""Methods that wait for the device, or whose result has a shape that depends on the data."""

BRANCHING = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.BoolOp)
COMPREHENSIONS = (ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)
SLICE = "slice_"
"""How the functions that compute a slice of the batch are called; a loop over slices is the only loop there is."""


@lru_cache(maxsize=1)
def _parsed(source: str) -> ast.Module | SyntaxError:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        return error


def _functions(source: str) -> list[ast.FunctionDef]:
    module = _parsed(source)
    return [node for node in module.body if isinstance(node, ast.FunctionDef)] if isinstance(module, ast.Module) else []


def _compiles(source: str, tensors: frozenset[str]) -> Flaws:
    parsed = _parsed(source)
    if isinstance(parsed, SyntaxError):
        yield f"line {parsed.lineno}", f"{parsed.msg}: {(parsed.text or '').strip()}"
        return
    names = [function.name for function in _functions(source)]
    if names[-1:] != ["program"] or not all(name.startswith(SLICE) for name in names[:-1]):
        yield "program", f"the source defines {names}, not slices and then the program"
    for node in parsed.body:
        if not isinstance(node, ast.FunctionDef | ast.Import | ast.Expr):
            yield f"line {node.lineno}", f"{type(node).__name__} beside the functions: {ast.unparse(node)}"


def _straight_line(source: str, tensors: frozenset[str]) -> Flaws:
    for function in _functions(source):
        for statement in function.body:
            if not isinstance(statement, ast.Assign | ast.Delete | ast.Return):
                yield f"line {statement.lineno}", f"{type(statement).__name__} is no assignment, del or return"
        for node in ast.walk(function):
            line = f"line {getattr(node, 'lineno', '?')}"
            if isinstance(node, BRANCHING) or (isinstance(node, COMPREHENSIONS) and not _over_slices(node)):
                yield line, f"{type(node).__name__} in a straight line: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and node.attr in SYNCHRONISING:
                yield line, f".{node.attr} waits for the device: {ast.unparse(node)}"


def _over_slices(node: ast.AST) -> bool:
    """slice_0(…) for i in range(…)"""
    if not isinstance(node, ast.GeneratorExp | ast.ListComp):
        return False
    call = node.elt
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id.startswith(SLICE)


def _reads_known(source: str, tensors: frozenset[str]) -> Flaws:
    """Line by line: every name that is read was assigned and not deleted; the tensors are the program's own."""
    functions = _functions(source)
    given = {"torch", *dir(builtins), *(function.name for function in functions)}
    for function in functions:
        alive = given | {argument.arg for argument in function.args.args}
        for statement in function.body:
            nodes = list(ast.walk(statement))
            names = [node for node in nodes if isinstance(node, ast.Name)]
            loops = [node.target for node in nodes if isinstance(node, ast.comprehension)]
            own = {target.id for target in loops if isinstance(target, ast.Name)}
            own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
            for name in names:
                if not isinstance(name.ctx, ast.Store) and name.id not in alive | own:
                    yield f"line {statement.lineno}", f"{name.id!r} is not there: {ast.unparse(statement)}"
            alive -= {node.id for node in names if isinstance(node.ctx, ast.Del)}
            alive |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
            for node in nodes:
                if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "tensors":
                    if not isinstance(node.slice, ast.Constant) or node.slice.value not in tensors:
                        yield f"line {statement.lineno}", f"no such tensor: {ast.unparse(node)}"


SOURCE: tuple[tuple[str, SourceCheck], ...] = (
    ("it compiles to functions", _compiles),
    ("it is a straight line without synchronisation", _straight_line),
    ("it reads known tensors and living values", _reads_known),
)
"""What holds for the source, given the names of the program's tensors."""
