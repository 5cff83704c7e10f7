"""Outs: a product or matmul written to memory that is there already, instead of to memory of its own."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from ..diagram import Size
from .arrange import tuple_text
from .store import Step

MEMORY = "memory"
"""The argument of a program that says where a large value goes: (like, shape) -> a tensor, or None: torch decides."""
ADDING = {"torch.mm": "addmm_", "torch.bmm": "baddbmm_"}
"""Matmuls, and the methods that add one to what is there."""


def function_of(code: str) -> str:
    """The function that code calls, if it is one call and nothing else."""
    node = ast.parse(code, mode="eval").body
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def written_to(out: str, code: str) -> str | None:
    """The same product or matmul with out=; None for other code."""
    node = ast.parse(code, mode="eval").body
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        first, second = sorted((node.left, node.right), key=_is_number)  # a number cannot come first
        return f"torch.mul({ast.unparse(first)}, {ast.unparse(second)}, out={out})"
    return f"{code[:-1]}, out={out})" if function_of(code) in ADDING else None


def _is_number(node: ast.expr) -> bool:
    """Whether code reads nothing but sizes."""
    return {each.id for each in ast.walk(node) if isinstance(each, ast.Name)} <= {"N", "V"}


def handed(steps: Iterable[Step], shapes: Mapping[str, tuple[Size, ...]], large: Container[str]) -> tuple[Step, ...]:
    """The steps; those of the products and matmuls that are large go where `MEMORY` says."""
    return tuple(_handed(step, shapes[step.name]) if step.own and step.name in large else step for step in steps)


def _handed(step: Step, shape: tuple[Size, ...]) -> Step:
    code = written_to(_memory(shape), step.code)
    return replace(step, code=code) if code is not None else step


def empty(shape: tuple[Size, ...], large: bool) -> str:
    """Code for a value that is filled in later."""
    out = f", out={_memory(shape)}" if large else ""
    return f"torch.empty({tuple_text(shape)}, dtype=like.dtype, device=like.device{out})"


def _memory(shape: tuple[Size, ...]) -> str:
    return f"{MEMORY}(like, {tuple_text(shape)})"
