"""Invariants of the emitted source: straight-line Python that reads what is there."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Callable, Iterator
from functools import lru_cache

from ..emit.source import ADDED
from ..lower.by_rows import PRODUCTS, SHIFTED_SQUARES
from ..lower.receptive import OF_KERNELS, OF_ROWS, OF_VJP, OF_WIDE_VJP
from ..lower.shifts import GRAM
from ..program.functions import LOOP

Flaws = Iterator[tuple[str, str]]
SourceCheck = Callable[[str, frozenset[str]], Flaws]

SYNCHRONISING = frozenset({"item", "tolist", "numpy", "cpu", "nonzero", "masked_select", "unique"})
"""Methods that wait for the device, or whose result has a shape that depends on the data."""

BRANCHING = (ast.If, ast.IfExp, ast.For, ast.While, ast.Try, ast.With, ast.BoolOp)
COMPREHENSIONS = (ast.GeneratorExp, ast.ListComp, ast.SetComp, ast.DictComp)
LOSS = "loss_"
"""How the function of a loss is called whose Hessian is taken by torch.func."""

SLICE, COLUMN, NOISE = "slice_", "column_", "noise_"
"""How names begin: functions of a slice of the batch, columns of a root, random inputs."""

HELPERS = (LOOP, PRODUCTS, SHIFTED_SQUARES, GRAM, OF_KERNELS, OF_ROWS, OF_VJP, OF_WIDE_VJP)
FIXED = frozenset({ADDED, *(fn.source for fn in HELPERS)})
"""Functions of constant text, with loops over sizes: their own tests check them, here only what calls them is read."""


@lru_cache(maxsize=1)
def _parsed(source: str) -> ast.Module | SyntaxError:
    try:
        return ast.parse(source)
    except SyntaxError as error:
        return error


def _defined(source: str) -> list[ast.FunctionDef]:
    module = _parsed(source)
    return [node for node in module.body if isinstance(node, ast.FunctionDef)] if isinstance(module, ast.Module) else []


def _functions(source: str) -> list[ast.FunctionDef]:
    """The functions that are written for this program."""
    return [function for function in _defined(source) if ast.get_source_segment(source, function) not in FIXED]


def _compiles(source: str, tensors: frozenset[str]) -> Flaws:
    parsed = _parsed(source)
    if isinstance(parsed, SyntaxError):
        yield f"line {parsed.lineno}", f"{parsed.msg}: {(parsed.text or '').strip()}"
        return
    names = [function.name for function in _functions(source)]
    if names[-1:] != ["program"] or not all(name.startswith((SLICE, LOSS)) for name in names[:-1]):
        yield "program", f"the source defines {names}, not slices and then the program"
    for node in parsed.body:
        if not isinstance(node, ast.FunctionDef | ast.Import | ast.Expr):
            yield f"line {node.lineno}", f"{type(node).__name__} beside the functions: {ast.unparse(node)}"


def _straight_line(source: str, tensors: frozenset[str]) -> Flaws:
    for function in _functions(source):
        for statement in _lines(function.body):
            if not isinstance(statement, ast.Assign | ast.Delete | ast.Return):
                yield f"line {statement.lineno}", f"{type(statement).__name__} is no assignment, del or return"
        for node in ast.walk(function):
            line = f"line {getattr(node, 'lineno', '?')}"
            if isinstance(node, BRANCHING + COMPREHENSIONS) and not _over_pieces(node):
                yield line, f"{type(node).__name__} in a straight line: {ast.unparse(node)}"
            if isinstance(node, ast.Attribute) and node.attr in SYNCHRONISING:
                yield line, f".{node.attr} waits for the device: {ast.unparse(node)}"


def _lines(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements in order; a loop over columns is the assignment of its variable and then its body."""
    for statement in body:
        if isinstance(statement, ast.For) and _over_pieces(statement):
            yield ast.copy_location(ast.Assign([statement.target], statement.iter), statement)
            yield from _lines(statement.body)
        else:
            yield statement


def _rows(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("unbind", "split")


def _over_pieces(node: ast.AST) -> bool:
    """A loop over slices of the batch or columns of a root."""
    match node:
        case ast.For(target=target, iter=ast.Call(func=ast.Name(id="progress"), args=[over])):
            first = target.elts[0] if isinstance(target, ast.Tuple) else target
            zipped = isinstance(over, ast.Call) and isinstance(over.func, ast.Name) and over.func.id == "zip"
            rows = over.args if isinstance(over, ast.Call) and zipped else [over]
            named = isinstance(first, ast.Name) and first.id.startswith((COLUMN, "draw_"))
            return named and all(_rows(row) for row in rows)
        case (
            ast.GeneratorExp(elt=ast.Call(func=ast.Name(id=name))) | ast.ListComp(elt=ast.Call(func=ast.Name(id=name)))
        ):
            return name.startswith(SLICE)
        case _:
            return False


def _lets_go(statement: ast.stmt) -> bool:
    """Whether it is ``name = None``, which frees what a function inside has captured."""
    return isinstance(statement, ast.Assign) and ast.unparse(statement.value) == "None"


def _reads_known(source: str, tensors: frozenset[str]) -> Flaws:
    """Line by line: every name that is read was assigned and not deleted; the tensors are the program's own."""
    functions = _functions(source)
    given = {"torch", *dir(builtins), *(function.name for function in _defined(source))}
    for function in functions:
        alive = given | {argument.arg for argument in function.args.args}
        for statement in _lines(function.body):
            nodes = list(ast.walk(statement))
            names = [node for node in nodes if isinstance(node, ast.Name)]
            inner = [n for node in nodes if isinstance(node, ast.comprehension) for n in ast.walk(node.target)]
            own = {node.id for node in inner if isinstance(node, ast.Name)}
            own |= {node.arg for node in nodes if isinstance(node, ast.arg)}
            for name in names:
                if not isinstance(name.ctx, ast.Store) and name.id not in alive | own:
                    yield f"line {statement.lineno}", f"{name.id!r} is not there: {ast.unparse(statement)}"
            alive -= {node.id for node in names if isinstance(node.ctx, ast.Del)}
            stored = {node.id for node in names if isinstance(node.ctx, ast.Store)} - own
            alive = alive - stored if _lets_go(statement) else alive | stored
            for node in nodes:
                if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "tensors":
                    key = node.slice.value if isinstance(node.slice, ast.Constant) else None
                    if key not in tensors and not str(key).startswith("noise:"):
                        yield f"line {statement.lineno}", f"no such tensor: {ast.unparse(node)}"


SOURCE: tuple[tuple[str, SourceCheck], ...] = (
    ("it compiles to functions", _compiles),
    ("it is a straight line without synchronisation", _straight_line),
    ("it reads known tensors and living values", _reads_known),
)
"""What holds for the source, given the names of the program's tensors."""
