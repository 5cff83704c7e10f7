"""The forward: the model's own calls as expressions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from ...diagram.core import Selection, Size, Tensor, Window, hint_of
from ...notation.bind import BoundRule
from ...notation.code import Code
from ..derive.fallback import OperatorVjp
from ..derive.trial import Way
from ..program import expr as e
from ..program import functions as f
from ..program.cost import Kernel, Work
from ..program.expr import NO_WORK, Expr, Filled
from ..program.functions import Function
from ..program.store import Store
from ..translate.graph import Call, Value
from ..translate.inplace import in_place, may_view
from ..translate.operators import Memory, Same, row_of
from ..translate.torch_internals import arguments_of

EACH = e.Value("each", None, (), hint="each")
"""The variable of a function that is mapped over columns."""


def output_expr(call: Call, read: Callable[[Value], Expr], like: Expr) -> Expr:
    """What a call gives: one of the outputs of an operator with several."""
    every = call_expr(call, read, like)
    return every if call.item is None else e.Call(f.ITEM, (every, call.item))


def call_expr(call: Call, read: Callable[[Value], Expr], like: Expr) -> Expr:
    """The call of an operator with every argument that is not as by default; devices are those of `like`."""
    arguments = arguments_of(call.target)
    shown: list[Any] = []
    named: list[tuple[str, Any]] = []
    for k, argument in enumerate(arguments):
        value = call.arguments["input" if argument.name == "self" else argument.name]
        open_end = argument.name == "end" and value == sys.maxsize  # vmap of slice_scatter overflows
        if argument.has_default_value() and (open_end or _same(value, argument.default_value)):
            continue
        if argument.kwarg_only or named or len(shown) < k:
            named.append((argument.name, _argument(value, read, like)))
        else:
            shown.append(_argument(value, read, like))
    return e.Call(operator(call), tuple(shown), tuple(named))


def called(store: Store, call: Call, random: bool, own: torch.dtype | None = None) -> Expr:
    """The call of an operator; one with several outputs is called once for all of them.

    Where all floating values are of one dtype, it is not written: the program is one for any such dtype. That of torch
    code of a quantity's own is `own`, and others are meant as they are.
    """
    if store.one_dtype:
        dtypes = {k: v for k, v in call.arguments.items() if isinstance(v, torch.dtype) and v.is_floating_point}
        named = {k for k, v in dtypes.items() if own is None or v == own}
        call = replace(call, arguments={**call.arguments, **dict.fromkeys(named, e.Call(f.DTYPE, (store.like,)))})
    if call.item is None or call.outputs not in store:
        expr = call_expr(call, lambda v: store.find(v.name), store.like)
        if call.item is None:
            return expr
        every = store.add(expr, call.output.shape, Kernel.NATIVE, hint=hint_of(call.outputs), alone=random, own=False)
        store.name(call.outputs, every)
    return e.Call(f.ITEM, (store.find(call.outputs), call.item))


def enter(store: Store, calls: Iterable[Call], own: torch.dtype) -> None:
    """The values of torch code of a quantity's own, which is given values of the dtype `own`."""
    for call in calls:
        floating = store.one_dtype and call.output.dtype == own
        value = store.add(
            called(store, call, random=False, own=own), call.output.shape, Kernel.NATIVE, floating=floating
        )
        store.name(call.output.name, value)


def operator_vjp(store: Store, vjp: OperatorVjp, cotangent: Expr) -> Expr:
    """The VJP of an operator without a rule: of the batch, or vmap or a loop over samples, of torch.func's of one."""
    if vjp.way is Way.WHOLE:
        return _of_batch(store, vjp, cotangent)
    rows = {value.name: e.Value(value.name, None, (), hint=f"x{k}") for k, value in enumerate(vjp.batched)}
    *read, pulled, given = vjp.places
    places = dict(zip(rows, read, strict=True))

    def one(name: str) -> Expr:
        return e.Call(f.UNSQUEEZE, (rows[name], places[name])) if name in rows else store.find(name)

    own, at = vjp.operand.name, moved(0)
    point = e.Call(f.UNSQUEEZE, (at, places[own])) if own in rows else at
    called = output_expr(vjp.operation, lambda value: point if value.name == own else one(value.name), store.like)
    pull = e.Call(f.ITEM, (e.Call(f.VJP, (e.Lambda((at,), called), rows.get(own) or store.find(own))), 1))
    g = e.Call(f.UNSQUEEZE, (PULLED, pulled)) if vjp.sampled else PULLED
    each = e.Lambda((*rows.values(), PULLED), e.Call(f.ITEM, (e.Call(f.APPLY, (pull, g)), 0)))
    stacked = tuple(e.Call(f.CONTIGUOUS, (store.find(name),)) for name in rows)  # det is wrong else
    if vjp.way is Way.LOOPED:
        return e.Call(f.LOOP, (each, vjp.axes, cotangent, *stacked))
    axes = (("in_dims", (*read, pulled)), ("out_dims", given)) if any(vjp.places) else ()
    return e.Call(f.APPLY, (e.Call(f.VMAP, (each,), axes), *stacked, cotangent))


def _of_batch(store: Store, vjp: OperatorVjp, cotangent: Expr) -> Expr:
    """All that the VJP of all samples gives, one for each operand."""
    at = {value.name: moved(k) for k, value in enumerate(vjp.operands)}
    called = output_expr(vjp.operation, lambda value: at.get(value.name) or store.find(value.name), store.like)
    own = e.Call(f.VJP, (e.Lambda(tuple(at.values()), called), *map(store.find, at)))
    return e.Call(f.APPLY, (e.Call(f.ITEM, (own, 1)), cotangent))


PULLED = e.Value("g", None, (), hint="g")
"""The cotangent of one sample in such a VJP."""


@lru_cache(256)
def moved(k: int) -> e.Value:
    """The variable that stands for operand k where a VJP is taken: always the same one, so that equal VJPs are one."""
    return e.Value(f"u{k}", None, (), hint=f"u{k or ''}")


def operator(call: Call) -> Function:
    """The row of the operator that is called. It writes over its operand where that is the only one, as large."""
    own = row_of(call.target).memory is Memory.OWN
    alone = list(call.tensors) == ["input"] and not call.by_rule and call.item is None
    value, output = call.tensors.get("input"), call.output
    fits = alone and value is not None and (value.shape, value.dtype) == (output.shape, output.dtype)
    return f.aten(call.target, f.Memory.OWN if own else f.Memory.UNKNOWN, (fits and in_place(call.target)) or "")


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, Value | Call):
        return False
    one, two = (list(v) if isinstance(v, tuple) else v for v in (value, default))
    return bool(one == two)


def _argument(value: Any, read: Callable[[Value], Expr], like: Expr) -> Any:
    """An argument of a call in an expression."""
    if isinstance(value, Value):
        return read(value)
    if isinstance(value, Call):
        return output_expr(value, read, like)
    if isinstance(value, tuple | list):
        return [_argument(each, read, like) for each in value]
    return e.Call(f.DEVICE, (like,)) if isinstance(value, torch.device) else value


def seen_in(store: Store, call: Call, own: tuple[Kernel, Work]) -> tuple[Kernel, Work, bool]:
    """Kernel and work of a forward, `own` unless it only views its operand, and whether its memory is not row-major.

    A reshape views what is row-major, and what it only splits; all else it copies.
    """
    row, value = row_of(call.target), call.tensors.get("input")
    drawn = row.memory is Memory.EITHER and call.arguments.get("train")
    if call.by_rule or value is None or not may_view(call.target) or row.same is Same.CAST or drawn:
        return *own, False
    strided = store.find(value.name).strided
    if not row.reshapes:
        return Kernel.VIEW, NO_WORK, strided or row.memory is not Memory.EITHER
    if strided and not _splits(value.shape, call.output.shape):
        return Kernel.COPY, own[1], False
    return Kernel.VIEW, NO_WORK, strided


def _splits(shape: tuple[Size, ...], wanted: tuple[Size, ...]) -> bool:
    """Whether each axis becomes axes of its own."""
    rest = list(wanted)
    for size in shape:
        found: Size = 1
        while found != size and rest:
            found = found * rest.pop(0)
        if found != size:
            return False
    return True


def fill(store: Store, code: Code, given: Mapping[str, Expr]) -> Expr:
    """Code with values in its holes: those that are given, and what diagrams call so."""
    return Filled(code, tuple((name, given[name] if name in given else store.find(name)) for name in code.holes))


def forward_work(rule: BoundRule | None) -> tuple[Kernel, Work]:
    """The kind of kernel, FLOPs and bytes of a forward, read off its formula: 2 per multiply-add, no images."""
    if rule is None or rule.equations[-1].diagram is None:
        return Kernel.NATIVE, Work()
    output = rule.equations[-1].legs
    kernel, flops, moved = Kernel.ELEMENTWISE, [], []
    for product in rule.equations[-1].diagram.products:
        windows = [op for op in product.operands if isinstance(op, Window)]
        chosen = {leg for op in product.operands if isinstance(op, Selection) for leg in op.choice}
        chosen |= {window.image for window in windows}  # they follow from the others
        legs = tuple(leg for leg in product.legs if leg not in chosen)
        tensors = [op for op in product.operands if isinstance(op, Tensor)]
        every = tuple(leg for leg in output if leg not in product.legs)
        flops.append((2 if len(tensors) > 1 else 1, (*legs, *every)))
        moved += [(1, t.legs) for t in tensors]
        if len(tensors) > 1 and any(leg not in output for leg in legs):
            kernel = Kernel.CONVOLUTION if windows else Kernel.MM
    return kernel, Work(tuple(flops), (*moved, (1, output)), ((1, output),))
