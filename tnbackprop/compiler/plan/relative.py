"""Relative factors: those of a component in several axes whose scale is in another one, with a mean diagonal of 1."""

from __future__ import annotations

from math import prod

from ...diagram.core import Leg
from ..lower.arrange import reshaped
from ..program.cost import Kernel, Work
from ..program.expr import Call, Value
from ..program.functions import Memory, helper
from ..program.store import Store
from ..sweep.derived import Derived, Extraction, Result
from ..translate.graph import Graph

FULL = """\
def over_mean_diagonal(S):
    # [..., d, d] over the mean of its diagonal; what is zero stays zero.
    mean = S.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    return S / torch.where(mean == 0, torch.ones_like(mean), mean)"""
DIAGONAL = """\
def over_mean(s):
    # [..., d] over its mean; what is zero stays zero.
    mean = s.mean(-1, keepdim=True)
    return s / torch.where(mean == 0, torch.ones_like(mean), mean)"""
OVER = {
    False: helper("over_mean_diagonal", FULL, memory=Memory.OWN), True: helper("over_mean", DIAGONAL, memory=Memory.OWN)
}  # fmt: skip


def make_relative(store: Store, graph: Graph, derived: Derived, results: dict[Result, dict[str, Value]]) -> None:
    """Divide them in the results, where all rounds and sweeps have added to them."""
    for item in (item for item in derived.items if isinstance(item, Extraction)):
        dotted = graph.parameters[item.parameter][0]
        for quantity, factors in item.factors.items():
            for k in (k for k, relative in enumerate(factors.relative) if relative):
                store.note = f"{Result(quantity, k)} of {dotted}"
                by, flat = results[Result(quantity, k)], factors.diagonal[k]
                by[dotted] = _over_mean(store, by[dotted], factors.shapes[k], flat)


def _over_mean(store: Store, value: Value, shape: tuple[int, ...], flat: bool) -> Value:
    legs = (Leg("a", prod(shape)),)
    work = Work(flops=((1, legs),), moved=((2, legs),), fresh=((1, legs),))
    expr = Call(OVER[flat], (reshaped(value, value.shape, shape),))
    return store.add(expr, shape, Kernel.ELEMENTWISE, work)
