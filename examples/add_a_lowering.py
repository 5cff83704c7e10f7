"""A lowering from outside: one more way to compute a product of two tensors, tried beside those that are built in.

A lowering sees a product of operands on named legs, never a layer or a quantity. It gives candidates: the parts that
the planner builds first, and what is made of their values, a call with its FLOPs and bytes. The predicted time decides.

This one computes Σ_i x[…, i] y[…, i], with the same legs on both, by `torch.linalg.vecdot` in one pass over both: no
product in memory, as dot products of individual gradients with a vector want it.
"""

from __future__ import annotations

import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.lower.arrange import arranged, sizes_of
from tnbackprop.compiler.lower.candidate import Candidate, Legs
from tnbackprop.compiler.lower.contract import read
from tnbackprop.compiler.program.cost import Kernel, Work
from tnbackprop.compiler.program.expr import Call, Ref
from tnbackprop.compiler.program.functions import Memory, function
from tnbackprop.compiler.program.store import Store
from tnbackprop.diagram.core import Product, Tensor

VECDOT = function("torch.linalg.vecdot", memory=Memory.OWN)


def dot_products(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """A candidate for two tensors with the same legs, some of which are summed."""
    if len(product.operands) != 2 or not all(isinstance(op, Tensor) for op in product.operands):
        return []
    one, other = (op for op in product.operands if isinstance(op, Tensor))
    summed = tuple(leg for leg in one.legs if leg not in legs)
    if set(one.legs) != set(other.legs) or not summed or len(summed) == len(one.legs):
        return []

    def called(store: Store) -> Ref:
        groups = (*((leg,) for leg in legs), summed)
        args = tuple(arranged(store, read(store, op), groups) for op in (one, other))
        whole = (*legs, *summed)
        work = Work(flops=((2, whole),), moved=((2, whole), (1, legs)), fresh=((1, legs),))
        return Ref(store.add(Call(VECDOT, args), sizes_of(legs), Kernel.REDUCE, work), legs, legs)

    return [Candidate(called)]


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    x, y, loss = torch.randn(64, 20), torch.arange(64) % 3, nn.CrossEntropyLoss()
    quantities = [tn.BatchGrad(), tn.BatchDot()]
    plain = tn.compile(model, loss, (x, y), quantities)
    program = tn.compile(model, loss, (x, y), quantities, lowerings=[dot_products])
    for name, value in program(x, y)["batch_dot"].items():
        torch.testing.assert_close(value, plain(x, y)["batch_dot"][name])
    calls = program.source.count("torch.linalg.vecdot(")
    print(f"{calls} of the program's values are computed by torch.linalg.vecdot")


if __name__ == "__main__":
    main()
