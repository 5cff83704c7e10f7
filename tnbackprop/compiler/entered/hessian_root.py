"""The root of any loss's Hessian: columns by reverse over reverse, then an eigendecomposition per sample.

The loss is a sum over samples, so one product with the same tangent for all of them gives that column of each block.
All of it is in float64 from the output on: near a good fit, diag p - p pᵀ is as small as the rounding of 1 in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch

from ...diagram.core import BATCH, Leg, N
from ..program import expr as e
from ..program import functions as f
from ..program.cost import Kernel, Work
from ..program.expr import Body, Expr, Lambda, Of, Slice, reads
from ..program.store import Store
from ..sweep.roots import LossRoot
from ..translate.graph import Call, Graph, Value
from ..translate.torch_internals import of_aten
from .definite import smallest_eigenvalue
from .forward import output_expr

AT, TANGENT = (e.Value(name, None, (), hint=name) for name in ("o", "e"))
"""The variables of functions: an output, and a tangent."""


def hessian_root(store: Store, graph: Graph, root: LossRoot, number: int) -> tuple[Expr, Expr]:
    """The root [D, N, *output], and its smallest eigenvalue relative to the largest of its sample.

    Of a signed one, the columns are roots of the magnitudes, and the second are their signs, [D, N].
    """
    output = root.output
    at = store.find(output.name)
    size = prod(int(s) for s in output.shape[1:])
    base = double(at, output)
    hessian = _hessian(store, graph, root, number, size)
    blocks = e.Call(f.TRANSPOSE, (e.Call(f.RESHAPE, (hessian, size, BATCH.size, size)), 0, 1))
    work = _double_work(store, size)
    eigen = store.add(e.Call(f.EIGH, (blocks,)), (), Kernel.NATIVE, work, hint=f"eigen_{number}")
    values, vectors = (e.Call(f.ITEM, (eigen, k)) for k in (0, 1))
    size_of = e.Call(f.ABS, (values,)) if root.signed else e.Call(f.CLAMP, (values,), (("min", 0),))
    positive = e.Call(f.UNSQUEEZE, (e.Call(f.SQRT, (size_of,)), 1))
    turned = e.Call(f.PERMUTE, (e.Call(f.MUL, (vectors, positive)), 2, 0, 1))
    columns = back(e.Call(f.RESHAPE, (turned, size, *output.shape)), at, output)
    made = store.add(columns, (size, *output.shape), Kernel.NATIVE, work, hint=f"hessian_root_{number}")
    if root.signed:
        return made, back(e.Call(f.T, (e.Call(f.SIGN, (values,)),)), at, output)
    blockwise = e.Call(f.ITEM, (values, (Slice(), 0))), e.Call(f.AMAX, (e.Call(f.ABS, (values,)), 1))
    found = smallest_eigenvalue(store, blockwise, base, root.scale, _precision(root), f"indefinite_{number}")
    return made, found


def _hessian(store: Store, graph: Graph, root: LossRoot, number: int, size: int) -> e.Value:
    """The Hessian of every sample, a column for each element of its output."""
    output = root.output
    at = store.find(output.name)
    body, others = loss_function(store, graph, root.output, root.calls)
    own = tuple(AT if value == output else double(store.find(value.name), value) for value in others)
    options = (("dtype", torch.float64), ("device", e.Call(f.DEVICE, (at,))))
    eye = e.Call(f.RESHAPE, (e.Call(f.EYE, (size,), options), size, 1, *output.shape[1:]))
    gradient = e.Call(f.GRAD, (Lambda((AT,), Of(body, own)),))
    pull = e.Call(f.ITEM, (e.Call(f.VJP, (gradient, double(at, output))), 1))
    tangent = e.Call(f.EXPAND, (TANGENT, *output.shape))
    column = Lambda((TANGENT,), e.Call(f.ITEM, (e.Call(f.APPLY, (pull, tangent)), 0)))
    every = e.Call(f.APPLY, (e.Call(f.VMAP, (column,)), eye))
    work = _double_work(store, size)
    return store.add(every, (size, *output.shape), Kernel.NATIVE, work, hint=f"hessian_{number}")


def double(read: Expr, value: Value) -> Expr:
    """A value in float64, if it is a floating one."""
    lower = value.dtype.is_floating_point and value.dtype != torch.float64
    return e.Call(f.DOUBLE, (read,)) if lower else read


def back(expr: Expr, at: e.Value, value: Value) -> Expr:
    """What was taken in float64, in a value's dtype."""
    return expr if value.dtype == torch.float64 else e.Call(f.TO, (expr, e.Call(f.DTYPE, (at,))))


def _double_work(store: Store, size: int) -> Work:
    """What a step holds in float64 while it makes its result, in elements of the program's dtype: N blocks, twice."""
    return Work(inside=((2 * 8 // store.itemsize, (BATCH, Leg("i", size), Leg("j", size))),))


def loss_function(store: Store, graph: Graph, output: Value, calls: Sequence[Call]) -> tuple[Body, list[Value]]:
    """Calls of the loss as a function of the output and of what else they read, in float64, with what that is.

    There is one for all roots of a program, and so one Hessian.
    """
    made = {call.output.name for call in calls}
    reading = [v for call in calls for v in call.tensors.values() if v.name not in made]
    others = list(dict.fromkeys([output, *reading]))
    key = ("loss", output.name, graph.loss, *sorted(made))
    if key not in store.bodies:
        params = [e.Value(v.name, None, v.shape, hint=v.name) for v in others]
        env = dict(zip((v.name for v in others), params, strict=True))
        steps = []
        for call in calls:
            expr = _in_double(call, env, params[0])
            step = e.Value(call.output.name, expr, call.output.shape, hint=call.output.name, inputs=reads(expr))
            env[call.output.name] = step
            steps.append(step)
        end = env[str(graph.loss)]
        counted = next((value for value in params if N in value.shape), params[0])
        batch = counted, counted.shape.index(N) if N in counted.shape else 0
        store.bodies[key] = Body(tuple(params), tuple(steps), (end,), batch, "loss")
    return store.bodies[key], others


def _in_double(call: Call, env: dict[str, e.Value], like: e.Value) -> Expr:
    """A call on operands in float64, with a result in float64.

    A floating dtype among its arguments becomes float64. An operator from outside torch is called in the dtypes that it
    was captured with: it may know no others.
    """
    foreign = _is_foreign(call)
    floating = any(v.dtype.is_floating_point for v in call.tensors.values())

    def read(value: Value) -> Expr:
        lower = foreign and value.dtype.is_floating_point
        return e.Call(f.TO, (env[value.name], value.dtype)) if lower else env[value.name]

    if not foreign:
        arguments = {key: torch.float64 if _is_floating(value) else value for key, value in call.arguments.items()}
        call = replace(call, arguments=arguments)
    expr = output_expr(call, read, like)
    same = floating and not foreign
    return expr if same or not call.output.dtype.is_floating_point else e.Call(f.DOUBLE, (expr,))


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point


def _is_foreign(call: Call) -> bool:
    return not of_aten(call.target)


def _precision(root: LossRoot) -> torch.dtype:
    """The least precise dtype that the loss is taken in."""
    foreign = [call.output.dtype for call in root.calls if _is_foreign(call) and call.output.dtype.is_floating_point]
    return max([torch.float64, *foreign], key=lambda dtype: torch.finfo(dtype).eps)
