"""An emitted program as source that a person would keep: no unused names, no long lines, no closures over a loop."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from .text import definition, quoted, statement, wrapped


def tidied(source: str) -> list[str]:
    """The functions of the source, line by line."""
    module = ast.parse(source)
    taken = _bound_lambdas(module)
    unused = {line for node in module.body if isinstance(node, ast.FunctionDef) for line in _unused(node)}
    heads = {node.lineno: node for node in module.body if isinstance(node, ast.FunctionDef)}
    assigned = (_lines(node) for node in ast.walk(module) if isinstance(node, ast.Assign))
    spread = {number for lines in assigned if len(lines) > 1 for number in lines}
    rows = source.split("\n")
    lines: list[str] = []
    for number, row in enumerate(rows, start=1):
        if number in heads:
            node = heads[number]
            body = [r for k, r in enumerate(rows[number : node.end_lineno], number + 1) if k not in unused]
            lines += definition(row, body)
            lines += ['    """Straight-line source, as it was emitted."""'] if node.name == "program" else []
        elif number not in unused:
            row = _binding(row, taken.get(number, []))
            lines += wrapped(quoted(row)) if number in spread else statement(row)
    return lines


def bound(body: Sequence[str]) -> list[str]:
    """The lines of a function's body; lambdas take along what is deleted later."""
    names = _bound_lambdas(ast.parse("\n".join(["def function():", *body])))
    return [_binding(row, names.get(number, [])) for number, row in enumerate(body, start=2)]


def _binding(row: str, names: Sequence[str]) -> str:
    return row.replace("lambda each:", f"lambda each, {', '.join(f'{n}={n}' for n in names)}:") if names else row


def _lines(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def _unused(function: ast.FunctionDef) -> set[int]:
    """The lines at the head that give a name that nothing reads."""
    found: set[int] = set()
    read: set[str] = set()
    for line in reversed(function.body):
        match line:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Subscript() | ast.Name()) if name not in read:
                found.add(line.lineno)
                continue
        names = (node for node in ast.walk(line) if isinstance(node, ast.Name))
        read |= {name.id for name in names if not isinstance(name.ctx, ast.Store)}
    return found


def _bound_lambdas(module: ast.Module) -> dict[int, list[str]]:
    """line -> the names that a lambda there takes from the loop around it, or that are deleted later."""
    found: dict[int, list[str]] = {}
    for around in (node for node in ast.walk(module) if isinstance(node, ast.For | ast.FunctionDef)):
        inside = list(ast.walk(around))
        kind = ast.Store if isinstance(around, ast.For) else ast.Del
        assigned = {n.id for n in inside if isinstance(n, ast.Name) and isinstance(n.ctx, kind)}
        for each in (node for node in inside if isinstance(node, ast.Lambda)):
            names = [n.id for n in ast.walk(each.body) if isinstance(n, ast.Name) and n.id in assigned]
            if names:
                found[each.lineno] = list(dict.fromkeys([*found.get(each.lineno, []), *names]))
    return found
