"""The root of any loss's Hessian: columns by reverse over reverse, then an eigendecomposition per sample.

The loss is a sum over samples, so one product with the same tangent for all of them gives that column of each block.
All of it is in float64 from the output on: near a good fit, diag p - p pᵀ is as small as the rounding of 1 in float32.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

import torch

from ..diagram import BATCH, Leg
from .arrange import text
from .cost import Kernel, Work
from .definite import smallest_eigenvalue
from .forward import call_code
from .graph import Call, Graph, Value
from .listing import lines_of
from .roots import LossRoot
from .store import NO_WORK, Step, Store


def hessian_root(store: Store, graph: Graph, root: LossRoot, number: str) -> tuple[str, str]:
    """Names of the root [D, N, *output], and of its smallest eigenvalue relative to the largest of its sample.

    Of a signed one, the columns are roots of the magnitudes, and the second name is that of their signs, [D, N].
    """
    output = root.output
    size, shape = prod(int(s) for s in output.shape[1:]), text(output.shape)
    function, inputs = _function(store, graph, root, f"loss_{number}")
    own = ", ".join("o" if name == output.name else _double(store, graph.values[name]) for name in inputs)
    base, back = _double(store, output), _back(store, output)
    device = f"{store.resolve(output.name)}.device"
    eye = f"torch.eye({size}, dtype=torch.float64, device={device}).reshape({size}, 1, {text(output.shape[1:])})"
    gradient = f"torch.func.grad(lambda o: {function}({own}))"
    column = f"torch.func.vmap(lambda e: torch.func.vjp({gradient}, {base})[1](e.expand({shape}))[0])({eye})"
    work = _double_work(store, size)
    hessian = store.add(column, (size, *output.shape), Kernel.NATIVE, work, name=f"hessian_{number}")
    blocks = f"{hessian}.reshape({size}, N, {size}).transpose(0, 1)"
    eigen = store.add(f"torch.linalg.eigh({blocks})", (), Kernel.NATIVE, work, name=f"eigen_{number}")
    size_of = "abs()" if root.signed else "clamp(min=0)"
    positive = f"{eigen}[0].{size_of}.sqrt().unsqueeze(1)"
    code = f"({eigen}[1] * {positive}).permute(2, 0, 1).reshape({size}, {shape}){back}"
    name = store.add(code, (size, *output.shape), Kernel.NATIVE, work, name=f"hessian_root_{number}")
    if root.signed:
        return name, f"{eigen}[0].sign().t(){back}"
    blockwise = (f"{eigen}[0][:, 0]", f"{eigen}[0].abs().amax(1)")
    return name, smallest_eigenvalue(store, blockwise, base, root.scale, _precision(root), f"indefinite_{number}")


def _double(store: Store, value: Value) -> str:
    """A value in float64, if it is a floating one."""
    lower = value.dtype.is_floating_point and value.dtype != torch.float64
    return f"{store.resolve(value.name)}.double()" if lower else store.resolve(value.name)


def _back(store: Store, value: Value) -> str:
    """Code that casts what was taken in float64 back to a value's dtype."""
    return "" if value.dtype == torch.float64 else f".to({store.resolve(value.name)}.dtype)"


def _double_work(store: Store, size: int) -> Work:
    """What a step holds in float64 beside its result, in elements of the program's dtype: N blocks, twice."""
    return Work(inside=((2 * 8 // store.itemsize, (BATCH, Leg("i", size), Leg("j", size))),))


def _function(store: Store, graph: Graph, root: LossRoot, name: str) -> tuple[str, list[str]]:
    """The loss as a function of the output and of what else it reads: its name, and those of its arguments.

    There is one for all roots of a program, and so one Hessian.
    """
    made = {call.output.name for call in root.calls}
    reads = [v.name for call in root.calls for v in call.tensors.values() if v.name not in made]
    inputs = list(dict.fromkeys([root.output.name, *reads]))
    steps = []
    for call in root.calls:
        needed = tuple(dict.fromkeys(v.name for v in call.tensors.values()))
        steps.append(Step(call.output.name, _code_in_double(call), needed, Kernel.NATIVE, NO_WORK))
    body = [f"    N = {root.output.name}.shape[0]", *lines_of(tuple(steps), {str(graph.loss)})]
    if any("like." in step.code for step in steps):
        body.insert(0, f"    like = {root.output.name}")
    rest = "\n".join([f"({', '.join(inputs)}):", *body, f"    return {graph.loss}"])
    known = (other for other, source in store.functions.items() if source == f"def {other}{rest}")
    name = next(known, name)
    store.functions[name] = f"def {name}{rest}"
    return name, inputs


def _code_in_double(call: Call) -> str:
    """A call on operands in float64, with a result in float64.

    A floating dtype among its arguments becomes float64. An operator from outside torch is called in the dtypes that it
    was captured with: it may know no others.
    """
    floating = {v.name: v.dtype for v in call.tensors.values() if v.dtype.is_floating_point}
    if _is_foreign(call):
        code = call_code(call, lambda name: f"{name}.to({floating[name]})" if name in floating else name)
    else:
        arguments = {key: torch.float64 if _is_floating(value) else value for key, value in call.arguments.items()}
        code = call_code(replace(call, arguments=arguments), lambda name: name)
    follows = floating and not _is_foreign(call)
    return code if follows or not call.output.dtype.is_floating_point else f"{code}.double()"


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.dtype) and value.is_floating_point


def _is_foreign(call: Call) -> bool:
    return not str(call.target).startswith("aten.")


def _precision(root: LossRoot) -> torch.dtype:
    """The least precise dtype that the loss is taken in."""
    foreign = [call.output.dtype for call in root.calls if _is_foreign(call) and call.output.dtype.is_floating_point]
    return max([torch.float64, *foreign], key=lambda dtype: torch.finfo(dtype).eps)
