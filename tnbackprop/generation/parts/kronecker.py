"""Kronecker factors in a generated file: which parameters have them, code that returns them, when they are exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod

from ...compiler.explain.text import legs_text
from ...compiler.lower.arrange import reshaped
from ...compiler.program import functions as f
from ...compiler.program.expr import Call, Expr, Value
from ...compiler.program.functions import helper
from ...compiler.sweep.derived import Extraction, Result, joined_with
from ...compiler.translate.graph import Graph
from ...diagram.core import BATCH, COLUMN, Leg, Tensor, leaves, summed_legs
from ...quantities.factors import Factors

Key = tuple[str, str]


@dataclass(frozen=True)
class Block:
    """The block of one parameter, or of a weight and the bias (dotted name) that is joined to it."""

    factors: Factors
    bias: str = ""

    @property
    def order(self) -> tuple[Leg, ...]:
        """The parameter's legs, in the order of the factors."""
        return (*self.factors.blocks, *(leg for legs in self.factors.legs for leg in legs))

    @property
    def input(self) -> int:
        """Which factor is that of the input, where a bias is joined: its last row is the bias's."""
        return 1 - self.factors.means.index(None)

    @property
    def cut(self) -> tuple[Leg, ...]:
        """The positions that were cut."""
        summed = {leg: None for d in self.factors.diagrams for p in d.products for leg in summed_legs(p, d.legs)}
        return tuple(leg for leg in summed if leg != BATCH and leg.name != COLUMN)

    @property
    def exact_for_one(self) -> bool:
        """Whether the factors of one sample are exact: one use, no positions, and nothing that was too large."""
        return self.factors.whole and not self.cut and all(len(d.products) == 1 for d in self.factors.diagrams)

    @property
    def axes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(Sizes of the parameter's legs, which of them come first), for the factors as they are returned.

        Legs of size 1 that no factor has are left out.
        """
        legs = list(self.factors.legs)
        order = self.order if not self.bias else (*legs[1 - self.input], *legs[self.input])
        own = [leg for leg in self.factors.parameter if leg in order]
        return tuple(int(leg.size) for leg in own), tuple(own.index(leg) for leg in order)

    def shape(self, weight: str) -> str:
        """What a function of it returns, in words."""
        factors = self.factors
        order = [1 - self.input, self.input] if self.bias else range(len(factors.legs))
        names = [f"F_{k}" for k in range(len(factors.legs))]
        acts = [f"{name} acts on ({legs_text(factors.legs[k])})" for name, k in zip(names, order, strict=True)]
        blocks = f", one for each ({legs_text(factors.blocks)})" if factors.blocks else ""
        if self.bias:
            acts[1] += " and the bias"
            blocks = f" of {weight} and {self.bias}"
        return f"({', '.join(names)}): the block{blocks} is {' ⊗ '.join(names)}; {', '.join(acts)}"


def blocks_of(items: Iterable[Extraction], graph: Graph) -> dict[Key, Block]:
    """(quantity, dotted parameter) -> its block; a bias that is joined to a weight has none."""
    by_quantity: dict[str, dict[str, Factors]] = {}
    for item in items:
        for quantity, factors in item.factors.items():
            by_quantity.setdefault(quantity, {})[graph.parameters[item.parameter][0]] = factors
    found: dict[Key, Block] = {}
    for quantity, by_name in by_quantity.items():
        joined = joined_with(by_name)
        for name, factors in by_name.items():
            if name not in joined.values():
                found[quantity, name] = Block(factors, joined.get(name, ""))
    return found


def absorbed(blocks: Mapping[Key, Block]) -> set[Key]:
    """The biases that are in the block of their weight."""
    return {(quantity, block.bias) for (quantity, _), block in blocks.items() if block.bias}


def factors_of(block: Block, quantity: str, values: Mapping[Result, Value]) -> tuple[Expr, ...]:
    """(factor, …): [d, d], or [d] of a diagonal one, with blocks in front; `values` of them and their means."""
    shown: list[Expr] = []
    for k, wanted in enumerate(block.factors.shapes):
        value = values[Result(quantity, k)]
        if prod(int(size) for size in value.shape) != prod(wanted):
            shown.append(Call(f.EXPAND, (value, *wanted)))
        else:
            shown.append(reshaped(value, value.shape, tuple(wanted)))
    if block.bias:
        A = block.input
        shown = [shown[1 - A], Call(WITH_ONE, (shown[A], values[Result(quantity, A, mean=True)]))]
    return tuple(shown)


@dataclass(frozen=True)
class Places:
    """Where columns must be the same for the factors to be exact: `tied` legs of the output, each place with columns of
    its own; along those that are `spread` every column is constant."""

    tied: tuple[int, ...]
    spread: tuple[int, ...]


def places(block: Block, given: str, output: tuple[Leg, ...]) -> Places | None:
    """Of a layer on its own, with `given` handed in at its output.

    None: the factor of what is handed in is made of more than that, or positions inside the layer were cut.
    """
    mine = [diagram for diagram in block.factors.diagrams if given in leaves(diagram)]
    if not block.factors.whole or len(block.factors.diagrams) > 2 or len(mine) != 1 or len(mine[0].products) != 1:
        return None
    operands = mine[0].products[0].operands
    rows = [row for op in operands if isinstance(op, Tensor) and op.name == given for row in _rows(op, output)]
    others = len(operands) - sum(isinstance(op, Tensor) and op.name == given for op in operands)
    if len(rows) != 2 or (others and len(block.factors.diagrams) > 1):
        return None
    closed = [k for k in range(len(output)) if not {row[k] for row in rows} & set(mine[0].legs)]
    tied = tuple(k for k in closed if rows[0][k] == rows[1][k])
    return Places(tied, tuple(k for k in closed if k not in tied))


def _rows(op: Tensor, output: tuple[Leg, ...]) -> list[tuple[Leg, ...]]:
    """The legs at the output of one copy, or of both sides of a matrix for the whole batch."""
    legs = tuple(leg for leg in op.legs if leg.name != COLUMN)
    if BATCH in legs:
        return [legs] if len(legs) == len(output) else []
    half = len(legs) // 2
    return [(BATCH, *legs[:half]), (BATCH, *legs[half:])] if half == len(output) - 1 else []


WITH_ONE_TEXT = '''
def with_one(A, mean):
    """The factor of an input that ends in a 1, which stands for the bias."""
    column = mean.reshape(-1, 1)
    last = torch.cat([column.T, torch.ones_like(column[:1])], 1)
    return torch.cat([torch.cat([A, column], 1), last])
'''
WITH_ONE = helper("with_one", WITH_ONE_TEXT)
