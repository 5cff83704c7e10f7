"""Pages: where large new values lie. What nobody has touched yet is mapped page by page, and huge pages are fewer.

Measured on Linux with huge pages on request: 115 MB are written for the first time in 7 ms, in small pages in 30.
"""

from __future__ import annotations

import ast
from dataclasses import replace
from typing import TYPE_CHECKING

from ..diagram import Size
from .arrange import text
from .cost import size_at
from .store import Step

if TYPE_CHECKING:
    from .plan import Plan

FRESH = '''def fresh(like, shape):
    # numpy asks for huge pages, which are mapped in a quarter of the time
    return torch.from_numpy(numpy.empty(shape, {torch.float32: "f4", torch.float64: "f8"}[like.dtype]))'''
PLAIN = """def fresh(like, shape):
    return like.new_empty(shape)"""
"""The same where nothing but torch is there."""

ADDING = {"torch.mm": "addmm_", "torch.bmm": "baddbmm_"}
"""Matmuls, and how they are added to a total."""


def new(plan: Plan, shape: tuple[Size, ...]) -> str:
    """Code for a new tensor like the program's others, with anything in it."""
    shown = f"({text(shape)},)"
    return f"fresh(like, {shown})" if is_large(plan, shape) else f"like.new_empty({shown})"


def is_large(plan: Plan, shape: tuple[Size, ...]) -> bool:
    """Whether first touching so much memory takes long on the device, and numpy has the dtype."""
    count = float(plan.itemsize)
    for size in shape:
        count *= size_at(size, plan.batch)
    return plan.itemsize >= 4 and count > plan.rates.fresh_threshold


def in_place_of(plan: Plan, step: Step) -> Step:
    """The step, writing a large value into huge pages if it can write anywhere."""
    if not step.own or not is_large(plan, plan.shapes[step.name]):
        return step
    code = written_to(step.code, new(plan, plan.shapes[step.name]))
    return step if code is None else replace(step, code=code)


def written_to(code: str, out: str) -> str | None:
    """The same product or matmul with out=; None for other code."""
    node = ast.parse(code, mode="eval").body
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return f"torch.mul({ast.unparse(node.left)}, {ast.unparse(node.right)}, out={out})"
    if called(code) in ADDING:
        return f"{code[:-1]}, out={out})"
    return None


def called(code: str) -> str:
    """The function that code calls, if it is one call and nothing else."""
    node = ast.parse(code, mode="eval").body
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""
