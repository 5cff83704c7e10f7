"""Columns from labels that torch code draws: s_n = √c ∂ℓ_n(f_n, ŷ_n)/∂f_n, with the loss's factor c on ℓ_n."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch

from ...diagram.core import N
from ..program import expr as e
from ..program import functions as f
from ..program.expr import Body, Expr, Lambda, Of, reads
from ..program.store import Store
from ..sweep.roots import DrawnLabels, LossRoot
from ..translate.graph import Graph
from .forward import output_expr
from .hessian_root import AT, back, double, loss_function


def drawn_gradient(store: Store, graph: Graph, root: LossRoot, labels: DrawnLabels) -> Callable[[Expr], Expr]:
    """From noise to a column [N, *output]: the loss of drawn labels is differentiated by the output, in float64."""
    output, at = root.output, store.find(root.output.name)
    body, others = loss_function(store, graph, output, labels.loss)
    draw = _function(store, labels)
    given = tuple(map(store.find, labels.outputs))
    constants = tuple(map(store.find, labels.constants))

    smallest = torch.finfo(labels.given[-1].dtype).eps / 4

    def column(noise: Expr) -> Expr:
        inside = e.Call(f.CLAMP, (noise,), (("min", smallest),))  # torch draws 0 as well: its quantile is infinite
        drawn = Of(draw, (*given, inside, *constants))
        read = {output: AT, labels.y: double(drawn, labels.made)}
        own = tuple(read[v] if v in read else double(store.find(v.name), v) for v in others)
        gradient = e.Call(f.GRAD, (Lambda((AT,), Of(body, own)),))
        found = e.Call(f.APPLY, (gradient, double(at, output)))
        return back(e.Call(f.MUL, (found, 1 / sympy.sqrt(root.scale))), at, output)

    return column


def _function(store: Store, labels: DrawnLabels) -> Body:
    """The sampler's code as a function of the output, of noise, and of the tensors that it reads."""
    key = ("labels", labels.made.name)
    if key not in store.bodies:
        shapes = {name: tuple(tensor.shape) for name, tensor in labels.constants.items()}
        given = [*((v.name, v.shape) for v in labels.given), *shapes.items()]
        env = {name: e.Value(name, None, shape, hint=name) for name, shape in given}
        params = tuple(env.values())
        counted = next(value for value in params if N in value.shape)
        steps = []
        for call in labels.calls:
            expr = output_expr(call, lambda value: env[value.name], params[0])
            step = e.Value(call.output.name, expr, call.output.shape, hint=call.output.name, inputs=reads(expr))
            env[call.output.name] = step
            steps.append(step)
        store.bodies[key] = Body(
            params, tuple(steps), (env[labels.made.name],), (counted, counted.shape.index(N)), "draw_labels"
        )
    return store.bodies[key]
