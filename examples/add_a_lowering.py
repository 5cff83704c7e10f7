"""A lowering from outside: one more way to compute a product of two tensors, tried with those that are built in.

A lowering sees a product of operands on named legs, never a layer or a quantity. It gives candidates: the parts that
the planner builds first, and what is made of their values, a call with its FLOPs and bytes. The predicted time decides.

This one computes outer products x[n, i] g[n, o], the individual gradients of a linear layer, as batched matrix
products of a column and a row in place of a broadcast product.
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
from tnbackprop.diagram.core import BATCH, Product, Tensor

OUTER = function("torch.bmm", memory=Memory.OWN)


def outer_products(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """A candidate for two tensors with one leg each next to the batch, all of which are kept."""
    tensors = [op for op in product.operands if isinstance(op, Tensor)]
    if len(product.operands) != 2 or len(tensors) != 2 or len(legs) != 3 or legs[0] != BATCH:
        return []
    left, right = (next((op for op in tensors if op.legs == (BATCH, leg)), None) for leg in legs[1:])
    if left is None or right is None:
        return []

    def called(store: Store) -> Ref:
        column = arranged(store, read(store, left), ((BATCH,), (legs[1],), ()))
        row = arranged(store, read(store, right), ((BATCH,), (), (legs[2],)))
        work = Work(flops=((2, legs),), moved=((1, left.legs), (1, right.legs), (1, legs)), fresh=((1, legs),))
        return Ref(store.add(Call(OUTER, (column, row)), sizes_of(legs), Kernel.BMM, work), legs, legs)

    return [Candidate(called)]


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 3))
    x, y, loss = torch.randn(64, 20), torch.arange(64) % 3, nn.CrossEntropyLoss()
    quantities = [tn.BatchGrad(), tn.Variance()]
    plain = tn.compile(model, loss, (x, y), quantities)
    program = tn.compile(model, loss, (x, y), quantities, lowerings=[outer_products])
    for name, value in program(x, y)["batch_grad"].items():
        torch.testing.assert_close(value, plain(x, y)["batch_grad"][name])
    before, after = (each.source.count("torch.bmm(") for each in (plain, program))
    print(f"batched matrix products: {before} without the lowering, {after} with it")


if __name__ == "__main__":
    main()
