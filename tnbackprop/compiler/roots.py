"""Roots: columns of the square root of the loss Hessian at the model's output, as torch code.

A loss with a `root` in its rule says how. For an elementwise loss the root follows from the formula: the Hessian is
diagonal, its entries are the second derivative, and the columns are their square roots, one per output element.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from ..algebra import differentiate
from ..bind import BoundRule
from ..diagram import BATCH, Delta, Diagram, Leg, Product
from ..errors import UnsupportedError
from ..rule import Root
from .graph import Call, Graph, Value


@dataclass(frozen=True)
class LossRoot:
    """The loss's root; `curvature` is the diagonal Hessian that its code reads as {curvature}, if it has one."""

    output: Value
    root: Root
    curvature: Diagram | None


def loss_root(graph: Graph, bound: tuple[tuple[Call, BoundRule], ...]) -> LossRoot:
    """The root for the single loss call on the model's only output. Raises `UnsupportedError` where there is none."""
    if not isinstance(graph.output, str):
        raise UnsupportedError("the GGN needs a model with one output tensor, and this one returns several.")
    output = graph.values[graph.output]
    calls = [(call, rule) for call, rule in bound if call.output.name == graph.loss]
    if not calls or output.name not in {v.name for v in calls[0][0].tensors.values()}:
        raise UnsupportedError(
            "the loss is more than one call on the model's output, so the root of its Hessian is not known.\n"
            "  Use one of torch's losses, or declare a rule with a root for yours: tnbackprop.Root."
        )
    call, rule = calls[0]
    if rule.root is not None:
        return LossRoot(output, rule.root, None)
    return _elementwise(call, rule, output)


def _elementwise(call: Call, rule: BoundRule, output: Value) -> LossRoot:
    diagram = rule.equations[-1].diagram
    first = differentiate(diagram, output.name) if diagram is not None and len(rule.equations) == 1 else None
    if first is None:
        raise UnsupportedError(f"{call.where} has no root of its Hessian.\n  Declare one in its rule: tnbackprop.Root.")
    second = differentiate(first.diagram, output.name)
    products = [] if second is None else [_diagonal(p, first.into, second.into) for p in second.diagram.products]
    if any(p is None for p in products):
        raise UnsupportedError(f"{call.where} has a Hessian that is not diagonal: declare its root (tnbackprop.Root).")
    curvature = Diagram(first.into, tuple(p for p in products if p is not None))
    curvature = curvature.rename({leg: BATCH for leg in first.into if leg.size == BATCH.size})
    size = prod(int(s) for s in output.shape[1:])
    shape = ", ".join(str(s) for s in output.shape)
    code = f"torch.diag_embed({{curvature}}.sqrt().reshape(N, {size}), dim1=0, dim2=2).reshape({size}, {shape})"
    normal = "1.4142135623730951 * torch.erfinv((2 * {noise} - 1) * 0.9999999)"
    sample = f"{{curvature}}.sqrt().reshape({shape}) * {normal}"
    return LossRoot(output, Root(size, code, sample), curvature)


def _diagonal(product: Product, first: tuple[Leg, ...], second: tuple[Leg, ...]) -> Product | None:
    """The product without the deltas that make it diagonal; None if they do not."""
    pairs = [frozenset(pair) for pair in zip(first, second, strict=True)]
    deltas = [op for op in product.operands if isinstance(op, Delta) and frozenset(op.legs) in pairs]
    rest = tuple(op for op in product.operands if op not in deltas)
    back = dict(zip(second, first, strict=True))
    if len({frozenset(d.legs) for d in deltas}) != len(pairs):
        return None
    return Product(product.scale, tuple(op.rename(back) for op in rest))
