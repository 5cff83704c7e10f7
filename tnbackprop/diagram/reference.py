"""The meaning of a diagram, in numpy: the reference interpreter that every test compares with.

It is slow and plain on purpose: each operand becomes a dense float64 array, each product one `np.einsum`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy
from numpy.typing import NDArray

from .core import Delta, Diagram, Leg, Map, N, Operand, Part, Product, Selection, Size, Tensor, Window, argument

Array = NDArray[np.float64]
Values = Mapping[str, NDArray[np.generic]]

_FUNCTIONS = {
    "erf": np.vectorize(math.erf, otypes=[float]),
    "erfc": np.vectorize(math.erfc, otypes=[float]),
    "loggamma": np.vectorize(math.lgamma, otypes=[float]),
    "polygamma": np.vectorize(lambda order, x: float(sympy.polygamma(int(order), float(x)).evalf()), otypes=[float]),
    "sigmoid": lambda x: np.exp(-np.logaddexp(0, -x)),
    "logsigmoid": lambda x: -np.logaddexp(0, -x),
    "softplus": lambda x: np.logaddexp(0, x),
    "power": np.power,
    "quotient": np.divide,
    "DiracDelta": np.zeros_like,  # derivatives are those of the branch taken: no mass at a kink
}


def evaluate(diagram: Diagram, values: Values, n: int) -> Array:
    """The value of a diagram, with shape `[size of leg for leg in diagram.legs]`, in float64.

    values   runtime value name -> array with the elements of the stored tensor in row-major order
    n        the batch size, put for N

    Each product is scale · einsum(operands): legs that are not output legs are summed, an output leg in no
    operand is constant along its size. The products are added.
    """
    shape = tuple(size_of(leg.size, n) for leg in diagram.legs)
    total = np.zeros(shape)
    for product in diagram.products:
        total = total + _product(product, diagram.legs, values, n)
    return total


def _product(product: Product, output: tuple[Leg, ...], values: Values, n: int) -> Array:
    legs = [op.legs for op in product.operands]
    arrays = [materialise(op, values, n) for op in product.operands]
    missing = tuple(leg for leg in output if leg not in product.legs)
    legs.append(missing)
    arrays.append(np.ones([size_of(leg.size, n) for leg in missing]))
    numbers = {leg: k for k, leg in enumerate(dict.fromkeys(leg for group in legs for leg in group))}
    sublists: list[Any] = []
    for array, group in zip(arrays, legs, strict=True):
        sublists += [array, [numbers[leg] for leg in group]]
    optimize = "greedy" if len(arrays) > 2 else False
    value = np.einsum(*sublists, [numbers[leg] for leg in output], optimize=optimize)
    return np.asarray(float(sympy.sympify(product.scale).subs(N, n)) * value)


def materialise(operand: Operand, values: Values, n: int) -> Array:
    """The operand as a dense array with one axis per leg of `operand.legs`."""
    shape = tuple(size_of(leg.size, n) for leg in operand.legs)
    match operand:
        case Tensor():
            return np.asarray(values[operand.name], dtype=np.float64).reshape(shape)
        case Map():
            return _map(operand, values, n)
        case Delta():
            index = np.indices(shape)
            return np.asarray((index == index[:1]).all(axis=0), dtype=np.float64)
        case Window():
            return _window(operand, shape)
        case Selection():
            return _selection(operand, values, n)
        case Part():
            return evaluate(operand.diagram, values, n)


def size_of(size: Size, n: int) -> int:
    """A size at batch size n."""
    return int(sympy.sympify(size).subs(N, n))


def _map(operand: Map, values: Values, n: int) -> Array:
    legs = operand.legs
    args = [_aligned(materialise(arg, values, n), arg.legs, legs) for arg in operand.args]
    symbols = [argument(k) for k in range(len(args))]
    function = sympy.lambdify(symbols, operand.expr.subs(N, n), modules=[_FUNCTIONS, "numpy"])
    with np.errstate(all="ignore"):  # a branch that is not taken may overflow
        value = np.asarray(function(*args), dtype=np.float64)
    return np.array(np.broadcast_to(value, [size_of(leg.size, n) for leg in legs]))


def _aligned(array: Array, own: tuple[Leg, ...], legs: tuple[Leg, ...]) -> Array:
    """The array with its axes in the order of `legs`, and size 1 where it has none."""
    present = [leg for leg in legs if leg in own]
    sizes = [array.shape[own.index(leg)] if leg in own else 1 for leg in legs]
    return _ordered(array, own, tuple(present)).reshape(sizes)


def _ordered(array: Array, own: tuple[Leg, ...], legs: tuple[Leg, ...]) -> Array:
    """The array with its axes in the order of `legs`; a leg that it has twice is its diagonal."""
    sublists: list[Any] = [array, [own.index(leg) for leg in own], [own.index(leg) for leg in legs]]
    return np.asarray(np.einsum(*sublists))


def _window(operand: Window, shape: tuple[int, ...]) -> Array:
    position = dict(zip(operand.legs, np.indices(shape), strict=True))
    reached = operand.offset + sum(c * position[leg] for c, leg in operand.terms)
    return np.asarray(position[operand.image] == reached, dtype=np.float64)


def _selection(operand: Selection, values: Values, n: int) -> Array:
    index, choice = operand.index.legs, operand.choice
    sizes = [size_of(leg.size, n) for leg in choice]
    stored = materialise(operand.index, values, n)
    one_hot = (stored[..., None] == np.arange(math.prod(sizes))).astype(np.float64).reshape([*stored.shape, *sizes])
    value = _ordered(one_hot, index + choice, operand.legs)
    for window in operand.near:
        value = value * _near(window, operand.legs, n)
    return value


def _near(window: Window, legs: tuple[Leg, ...], n: int) -> Array:
    """1 where some k brings a position to the image: an index that is elsewhere selects nothing here."""
    dense = _window(window, tuple(size_of(leg.size, n) for leg in window.legs))
    others = tuple(k for k, leg in enumerate(window.legs) if leg not in legs)
    own = tuple(leg for leg in window.legs if leg in legs)
    inside = dense.max(axis=others).transpose(sorted(range(len(own)), key=lambda k: legs.index(own[k])))
    return np.asarray(inside.reshape([size_of(leg.size, n) if leg in own else 1 for leg in legs]))
