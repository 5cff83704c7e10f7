"""Whether a loss Hessian has a square root: negative eigenvalues, and those that are zero but for rounding."""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch

from ...diagram.core import Diagram, Map, Operand, Tensor
from ..program import functions as f
from ..program.cost import Kernel
from ..program.expr import Call, Expr, Value
from ..program.numbers import Number
from ..program.store import Store

TOLERATED = 1e-5
"""A program refuses a smallest eigenvalue of less than -TOLERATED, relative to the largest of its block."""
ROUNDINGS = 100


def smallest_eigenvalue(
    store: Store, blocks: tuple[Expr, Expr], output: Expr, scale: sympy.Expr, dtype: torch.dtype, hint: str = ""
) -> Value:
    """The smallest eigenvalue of all blocks, relative to the largest magnitude in its own block.

    blocks  the smallest eigenvalue of each block, and the largest magnitude, tensors of one shape
    output  at which the Hessian was taken
    scale   of a sample's loss
    dtype   in which the Hessian was taken

    Where diag p - p pᵀ is zero but for rounding, its eigenvalues have any sign. They are off by as much as `ROUNDINGS`
    roundings of the terms that cancel: of the loss's scale, or of the batch's largest curvature where that is more,
    times |output|, for that is how far exp(output) is off. So much is added to the magnitude to make them tolerable.
    """
    low, high = blocks[0], store.add(blocks[1], (), Kernel.NATIVE)
    curvature = Call(f.CLAMP, (Call(f.AMAX, (high,)),), (("min", Number(scale)),))
    size = Call(f.CLAMP, (Call(f.AMAX, (Call(f.ABS, (output,)),)),), (("min", 1),))
    floor = float(f"{ROUNDINGS * torch.finfo(dtype).eps / TOLERATED:.2g}")
    bound = Call(f.ADD, (high, Call(f.MUL, (floor, curvature, size))))
    return store.add(Call(f.MIN, (Call(f.DIV, (low, bound)),)), (), Kernel.NATIVE, hint=hint)


def in_double(store: Store, formula: Diagram) -> Diagram:
    """A formula of the same values in float64."""
    products = (replace(p, operands=tuple(_operand(store, op) for op in p.operands)) for p in formula.products)
    return replace(formula, products=tuple(products))


def _operand(store: Store, operand: Operand) -> Operand:
    """What only says where values are (an index, a window) stays as it is."""
    match operand:
        case Tensor():
            return _tensor(store, operand)
        case Map():
            return replace(operand, args=tuple(_tensor(store, each) for each in operand.args))
        case _:
            return operand


def _tensor(store: Store, tensor: Tensor) -> Tensor:
    value = store.find(tensor.name)
    double = store.add(Call(f.DOUBLE, (value,)), value.shape, Kernel.NATIVE, strided=value.strided)
    return replace(tensor, name=store.key_of(double))
