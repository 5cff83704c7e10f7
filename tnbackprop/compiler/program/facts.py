"""Facts that follow from an expression: its shape, whose memory it has, in what it is linear, what it may go over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...diagram.core import Size
from ..translate.operators import row_of
from ..translate.torch_internals import overload
from .expr import Call, Filled, Value, reads
from .functions import Linear, Memory, aten, method


def shape_of(expr: Any) -> tuple[Size, ...] | None:
    """The shape of a value that is seen in another way; None where that is not known."""
    if isinstance(expr, Value):
        return expr.shape
    if isinstance(expr, Call) and expr.fn.shape is not None and not expr.options:
        inner = shape_of(expr.args[0])
        return expr.fn.shape(inner, *expr.args[1:]) if inner is not None else None
    return None


def base_of(expr: Any) -> Value | None:
    """The value whose elements an expression sees, each once and in order; None for any other expression."""
    while isinstance(expr, Call) and expr.fn.memory is Memory.WHOLE:
        expr = expr.args[0]
    return expr if isinstance(expr, Value) else None


def makes_memory(expr: Any) -> bool:
    """Whether its value lies in memory of its own, as far as the rows say."""
    while isinstance(expr, Call) and expr.fn.memory in (Memory.WHOLE, Memory.SEEN):
        expr = expr.args[0]
    return isinstance(expr, Call) and expr.fn.memory is Memory.OWN


def is_linear(expr: Any, value: Value) -> bool:
    """Whether it is a matmul, a product, a sum over axes or another view of `value`, and linear in it."""
    if isinstance(expr, Value):
        return expr is value
    if not isinstance(expr, Call) or expr.options:
        return False
    reading = [each for each in expr.args if value in reads(each)]
    if expr.fn.linear is Linear.FIRST:
        return reading == [expr.args[0]] and is_linear(expr.args[0], value)
    return expr.fn.linear is Linear.EACH and len(reading) == 1 and is_linear(reading[0], value)


def written_over(expr: Any) -> Iterator[tuple[Value, Any]]:
    """(operand, the same expression written over it), for every operand that has its elements and is read once."""
    if isinstance(expr, Filled):
        yield from _over_cotangent(expr)
    if not isinstance(expr, Call):
        return
    if isinstance(expr.fn.over, str) and expr.fn.over:
        yield from _over_operands(expr)
    elif expr.fn.over:
        if isinstance(expr.args[0], Value):
            yield expr.args[0], Call(aten(expr.fn.over), expr.args, expr.options)
    elif expr.args and (expr.fn.linear is Linear.FIRST or expr.fn.memory in (Memory.SEEN, Memory.WHOLE)):
        for operand, other in written_over(expr.args[0]):
            yield operand, Call(expr.fn, (other, *expr.args[1:]), expr.options)


def _over_cotangent(expr: Filled) -> Iterator[tuple[Value, Any]]:
    """A native VJP of an elementwise operator over the cotangent that it reads."""
    call, holes = expr.code.call, dict(expr.holes)
    into = row_of(overload(call.aten)).into if call.aten else ""
    own = base_of(holes.get(call.first))
    others = tuple(each for hole, each in expr.holes if hole != call.first)
    if call.whole and into and own is not None and own not in reads(others):
        yield own, Filled(expr.code.written(f"{call.name}.{into}", into, call.first), expr.holes)


def _over_operands(expr: Call) -> Iterator[tuple[Value, Any]]:
    shapes = [shape_of(each) if isinstance(each, Value | Call) else () for each in expr.args]
    if any(shape is None for shape in shapes):
        return
    whole = max((shape for shape in shapes if shape is not None), key=len)
    sizes = [max((s[k] for s in shapes if s and s[k] != 1), key=str, default=1) for k in range(len(whole))]
    for k, each in enumerate(expr.args):
        operand = base_of(each)
        others = (*expr.args[:k], *expr.args[k + 1 :])
        if operand is not None and shapes[k] == tuple(sizes) and operand not in reads(others):
            yield operand, _method(str(expr.fn.over), each, others)


def _method(name: str, operand: Any, others: tuple[Any, ...]) -> Any:
    """operand.name(other) for each of the others in turn."""
    fn = OVER[name]
    if not others:
        return Call(fn, (operand,))
    for other in others:
        operand = Call(fn, (operand, other))
    return operand


OVER = {name: method(name, memory=Memory.WHOLE) for name in ("mul_", "neg_", "add_", "square_")}
