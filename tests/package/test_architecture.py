"""The shape of the source: imports point one way, files and functions stay small, nothing is hidden or swallowed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "tnbackprop"
OWN = sorted(PACKAGE.rglob("*.py"))
FOLDERS = ("tnbackprop", "tests", "benchmarks", "examples", "docs")
ALL = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

# The rooms in order: each may import those before it, and its own files. Another room is a question for the design.
ORDER = (
    "errors", "version", "diagram", "notation.code", "notation", "table", "rules.recurrent", "rules.composites",
    "rules.writing", "rules", "quantities", "phased",
    "compiler.translate", "compiler.running", "compiler.batched", "compiler.capture", "compiler.program",
    "compiler.sweep",
    "compiler.derive", "compiler.lower", "compiler.entered", "compiler.plan", "compiler.emit", "compiler.invariants",
    "compiler.merge", "compiler.explain", "compiler", "linalg", "results", "runtime.memory", "runtime", "attached",
    "subsampled",
    "proof", "declare",
    "layer", "api", "kernels", "products", "drawing", "generation.parts", "generation.checks", "generation",
    "definitions", "verification", "__init__", "commands", "__main__",
)  # fmt: skip
# What some of them must not know, though it comes before them.
ONLY = {
    "rules": ("errors", "diagram", "notation", "table", "rules.recurrent", "rules.composites", "rules.writing"),
    "rules.writing": ("errors", "diagram", "notation"),
    "rules.composites": ("errors", "notation", "table"),
    "rules.recurrent": ("errors", "notation", "table"),
    "quantities": ("errors", "diagram", "notation"),
    "linalg": ("errors",),
    "compiler.program": ("errors", "diagram", "notation.code", "notation", "compiler.translate"),
    "compiler.lower": ("errors", "diagram", "notation", "compiler.program"),
}
TORCH_FREE = ("errors", "diagram", "notation", "quantities")
MOST_LINES = 2400
"""Of a room."""


@lru_cache(4096)
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


@lru_cache(4096)
def nodes(path: Path) -> tuple[ast.AST, ...]:
    return tuple(ast.walk(parsed(path)))


def folder(path: Path) -> str:
    return str(path.parent.relative_to(ROOT))


def by_folder(paths: Iterable[Path]) -> pytest.MarkDecorator:
    """A test of all files of a folder: what it says names the file."""
    found = {name: list(group) for name, group in groupby(sorted(paths, key=folder), folder)}
    return pytest.mark.parametrize("paths", found.values(), ids=found)


def shown(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def name(path: Path) -> str:
    """tnbackprop/compiler/plan/plan.py is "compiler.plan"; a package is its __init__."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def part(module: str) -> str:
    """The room: "compiler.plan.choose" belongs to "compiler.plan", "compiler.search" to "compiler"."""
    first, *rest = module.removesuffix(".__init__").split(".")
    if rest and (PACKAGE / first / rest[0]).is_dir():
        return f"{first}.{rest[0]}"
    return first or "__init__"


def imports(path: Path, types: bool = True) -> Iterator[tuple[ast.AST, str]]:
    """Every import as a dotted name: relative ones as ".compiler.plan", seen from the package.

    types   also those that only a type checker makes
    """
    checked = [n for n in parsed(path).body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    left_out = set() if types else {node for each in checked for node in ast.walk(each)}
    for node in nodes(path):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield from ((node, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = name(path).split(".")
            base = here[: len(here) - node.level]
            modules = [node.module] if node.module else [alias.name for alias in node.names]
            yield from ((node, "." + ".".join([*base, module])) for module in modules)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_every_part_is_listed() -> None:
    assert {part(name(path)) for path in OWN} == set(ORDER)


@by_folder(OWN)
def test_imports_point_one_way(paths: list[Path]) -> None:
    for path in paths:
        own = part(name(path))
        before = ONLY.get(own, ORDER[: ORDER.index(own)])
        for node, module in imports(path):
            if module.startswith("tnbackprop"):
                assert own in ("commands", "__main__"), f"{shown(path, node)}: import {module} relatively"
            elif module.startswith("."):
                assert part(module[1:]) in (own, *before), f"{shown(path, node)}: {own} must not import {module[1:]}"


@pytest.mark.parametrize("room", sorted({part(name(path)) for path in OWN}))
def test_rooms_are_small(room: str) -> None:
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in OWN if part(name(path)) == room)
    assert lines <= MOST_LINES, f"{room} has {lines} lines"


def test_the_pipeline_is_one_page() -> None:
    """The stages in order, in at most 25 lines, and nothing else beside them."""
    (compile_program,) = functions(PACKAGE / "compiler" / "__init__.py")
    assert (compile_program.end_lineno or 0) - compile_program.lineno + 1 <= 25


def test_no_module_imports_itself_through_others() -> None:
    """The graph of single modules has no cycle."""
    graph: dict[str, set[str]] = {}
    modules = {name(path).removesuffix(".__init__"): path for path in OWN if name(path) != "__init__"}
    for module, path in modules.items():
        graph[module] = {m[1:] for _, m in imports(path, types=False) if m[1:] in modules and m[1:] != module}
        if path.stem == "__init__":  # a package and the files that it collects
            graph[module] = {m for m in graph[module] if not m.startswith(module + ".")}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join((*above, module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


@by_folder(p for p in OWN if part(name(p)) in TORCH_FREE)
def test_mathematics_without_torch(paths: list[Path]) -> None:
    for path in paths:
        for node, module in imports(path):
            assert module.split(".")[0] != "torch", shown(path, node)


@pytest.mark.parametrize("path", sorted((PACKAGE / "quantities").glob("*.py")), ids=name)
def test_quantities_never_see_a_layer(path: Path) -> None:
    """No layer type by name, neither of torch.nn nor of ATen."""
    layers = {
        "Linear",
        "Conv1d",
        "Conv2d",
        "Conv3d",
        "BatchNorm2d",
        "LayerNorm",
        "Embedding",
        "ReLU",
        "MaxPool2d",
        "nn",
        "aten",
    }
    for node in nodes(path):
        word = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
        assert word not in layers, shown(path, node)
    assert not any(module.startswith(".rules") for _, module in imports(path))


@by_folder(ALL)
def test_files_and_functions_are_small(paths: list[Path]) -> None:
    for path in paths:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
        for function in functions(path):
            length = (function.end_lineno or 0) - function.lineno + 1
            assert length <= 60, f"{shown(path, function)} {function.name} has {length} lines"


@by_folder(ALL)
def test_no_import_inside_a_function(paths: list[Path]) -> None:
    for path in paths:
        for node in nodes(path):
            if isinstance(node, ast.Import | ast.ImportFrom):
                inside = [f.name for f in functions(path) if f.lineno <= node.lineno <= (f.end_lineno or 0)]
                assert not inside, shown(path, node)


@by_folder(OWN)
def test_nothing_is_swallowed(paths: list[Path]) -> None:
    """No broad except, no `pass` as the answer to an error, no warning instead of one, no global statement."""
    for path, node in ((each, node) for each in paths for node in nodes(each)):
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"{shown(path, node)} catches {caught}"
            assert not all(isinstance(line, ast.Pass) for line in node.body), f"{shown(path, node)} is silent"
        assert not isinstance(node, ast.Global), f"{shown(path, node)}: a global that changes"
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "warnings.warn", f"{shown(path, node)}: raise or say it in explain()"


def unbounded(node: ast.expr) -> bool:
    """functools.cache, or lru_cache without a bound; the default is one."""
    text = ast.unparse(node)
    sizes = [*node.args, *(k.value for k in node.keywords if k.arg == "maxsize")] if isinstance(node, ast.Call) else []
    head = text.partition("(")[0].removeprefix("functools.")
    return head == "cache" or (head == "lru_cache" and any(ast.unparse(size) == "None" for size in sizes))


@by_folder(OWN)
def test_caches_are_bounded(paths: list[Path]) -> None:
    """What lives as long as the process; a method's may live as long as its object."""
    for path in paths:
        for function in functions(path):
            for decorator in function.decorator_list:
                assert not unbounded(decorator), f"{shown(path, function)} {function.name} keeps everything for ever"
        for line in parsed(path).body:
            value = getattr(line, "value", None)
            assert not (isinstance(value, ast.Call) and unbounded(value.func)), shown(path, line)


def test_what_a_bound_is() -> None:
    bad = ("cache", "functools.cache", "lru_cache(None)", "functools.lru_cache(maxsize=None)")
    good = ("lru_cache", "lru_cache(64)", "lru_cache(maxsize=2**9)", "cached_property")
    assert [unbounded(ast.parse(text, mode="eval").body) for text in (*bad, *good)] == [True] * 4 + [False] * 4


IMPORT_TIME = """
import time
import torch
start = time.process_time()
import tnbackprop
print(time.process_time() - start)
"""


@pytest.mark.slow
def test_import_is_quick_and_silent(tmp_path: Path) -> None:
    """Less than 2 s of the processor beyond `import torch`: the better of two, since the machine may be busy.

    As an installed package has it, from bytecode, though this process may be one that writes none."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)
    seconds = []
    for silence in ([], ["-W", "error"], ["-W", "error"]):
        command = [sys.executable, *silence, "-c", IMPORT_TIME]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        seconds.append(float(done.stdout))  # and nothing else
    assert min(seconds[1:]) < 2, seconds  # the first writes the bytecode


# After bind nothing is parsed, matched or replaced in text. What still takes text apart, and why it may:
PARSES = ("ast", "re", "tokenize", "textwrap")
TAKES_APART = ("startswith", "endswith", "partition", "rpartition", "removeprefix", "removesuffix", "replace",
               "split", "rsplit", "sub", "findall", "finditer", "fullmatch")  # fmt: skip
AFTER_BIND = ("compiler.sweep", "compiler.derive", "compiler.program", "compiler.lower", "compiler.entered",
              "compiler.plan",
              "compiler.emit", "compiler.invariants", "compiler.merge", "compiler.explain", "compiler",
              "generation.parts",
              "generation.checks", "generation")  # fmt: skip
MAY = {
    "compiler.emit.naming": "any text becomes an identifier, a comment or a docstring here, and nowhere else",
    "compiler.emit.loaded": "the place in a source that a traceback of Python tells",
    "compiler.emit.printing": "names of functions in a table; `replace` of sympy",
    "compiler.explain.text": "texts for people",
    "compiler.explain.phases": "texts for people",
    "compiler.explain.stages": "texts for people; and which steps are of the backward pass is still told by their note",
    "compiler.explain.alternatives": "how many parts are called G or D, for people",
    "compiler.processor": "/proc/cpuinfo",
    "compiler.plan.plan": "an operator's name in a note, for people",
    "compiler.limits": "the first of two names in an error",
    "compiler.plan.loops": "the id of a value from its hint",
    "compiler.program.rounds": "the hint of a value from another's",
    "compiler.program.functions": "torch.mm for the name of a row",
    "compiler.lower.receptive": "a helper with one other line, made of constant text at import",
    "compiler.invariants.table": "the names of rows: none is einsum",
    "compiler.invariants.program": "the names of rows: none waits for the device",
    "generation.parts.names": "names of parameters and rules as identifiers",
    "generation.parts.text": "docstrings and comments are filled, texts cut at the ends of their lines",
    "generation.front": "the title, from the repr of a module",
    "generation.parts.function": "FLOPs for people",
    "generation.stand_in": "the title, from a formula in one line",
    "generation.quantities": "keys of quantities that a user lists in one text",
}


def taken_apart(path: Path) -> Iterator[str]:
    """Where a file parses, matches or replaces text. The ends of lines are no text."""
    for node, module in imports(path):
        if module.split(".")[0] in PARSES:
            yield f"{shown(path, node)} imports {module}"
    for node in nodes(path):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in TAKES_APART:
            lines = [getattr(each, "value", None) for each in node.args] == ["\n"]
            if not lines:
                yield f"{shown(path, node)} .{node.func.attr}("


def test_no_text_is_taken_apart_after_bind() -> None:
    """The exceptions are all in use."""
    found = {name(path): list(taken_apart(path)) for path in OWN if part(name(path)) in AFTER_BIND}
    for module, places in found.items():
        assert not places or module in MAY, f"{places}: values carry what is to be known of them"
    assert not [module for module in MAY if not found[module]]
