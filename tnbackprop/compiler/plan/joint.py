"""Joint: the gradient is propagated with the columns of a root, as one more of them, through layers that both pass.

One call for both instead of one for each; what comes out of it is read by either through a view. This pays where few
rows are slow for a kernel: small batches, and devices that are slow to launch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from ...diagram.core import COLUMN, Diagram, Leg, N, Operand, Product, Size, Tensor, hint_of, operand_tensors
from ...notation.bind import COTANGENTS
from ..lower.arrange import copy_work, reshaped, sizes_of
from ..program import functions as f
from ..program.cost import Kernel
from ..program.expr import Call, Expr
from ..program.store import Store
from ..sweep.derived import Backward, Columns, Extraction, Individual, Native, Schedule
from ..translate.graph import Graph
from .choose import Choice
from .items import backward, scheduled
from .loops import Results

Item = Backward | Individual | Extraction
Term = Diagram | Native


def in_turns(gradient: Schedule, columns: Schedule) -> Iterator[tuple[Item | None, Item | None]]:
    """The items of both sweeps, each in its order: two cotangents of one value are a pair."""
    one, other = list(gradient), list(columns)
    while one or other:
        if one and (not isinstance(one[0], Backward) or one[0].value not in _values(other)):
            yield one.pop(0), None
        elif other and (not isinstance(other[0], Backward) or other[0].value not in _values(one)):
            yield None, other.pop(0)
        elif _values(one[:1]) == _values(other[:1]):
            yield one.pop(0), other.pop(0)
        else:
            yield one.pop(0), None


def _values(items: Sequence[Item]) -> list[str]:
    return [item.value for item in items if isinstance(item, Backward)]


@dataclass
class JointSweep:
    """Builds the sweep of some columns with the rest of the gradient's; `joint` are the values that have both."""

    store: Store
    graph: Graph
    columns: Columns
    value_of: dict[str, str]  # the value of each cotangent of either sweep
    joint: dict[str, str] = field(default_factory=dict)

    def build(self, gradient: Schedule, chunk: int | None, choices: list[Choice]) -> Iterator[Results]:
        """The results of each item: quantity -> parameter name -> value."""
        for one, other in in_turns(gradient, self.columns.schedule):
            if isinstance(one, Backward) and isinstance(other, Backward) and self._together(one, other):
                continue
            for item, lead in ((one, ()), (other, self.columns.carried)):
                if item is not None:
                    yield scheduled(self.store, self.graph, (item,), chunk, choices, lead)

    def _together(self, one: Backward, other: Backward) -> bool:
        """Build both cotangents of a value in one call. Not where some term cannot, or is there in one sweep only."""
        pairs = list(zip(one.terms, other.terms, strict=False))
        alike = len(one.terms) == len(other.terms) and all(self._alike(*pair) for pair in pairs)
        if not (alike and self._sampled(other.value)):
            return False
        store, name = self.store, f":both:{other.value}"
        terms = tuple(self._joined(*pair) for pair in pairs)
        note = ", ".join([*([other.note] if other.note else []), "with the gradient"])
        backward(store, self.graph, Backward(name, other.value, terms, note), self._lead)
        self.joint[other.value] = name
        shape = self.graph.values[other.value].shape
        whole = self._shown(name, (*sizes_of(self._lead), *shape))
        strided, width = store.find(name).strided, self.columns.width
        own = (f.NARROW, 0, 0, width) if self.columns.carried else (f.SELECT, 0, 0)
        mine = (*sizes_of(self.columns.carried), *shape)
        for each, (view, *args), sizes in ((other, own, mine), (one, (f.SELECT, 0, width), shape)):
            expr = Call(view, (whole, *args))
            store.name(each.name, store.add(expr, sizes, Kernel.VIEW, hint=hint_of(each.name), strided=strided))
        return True

    @property
    def _lead(self) -> tuple[Leg, ...]:
        return (Leg(COLUMN, self.columns.width + 1),)

    def _alike(self, one: Term, other: Term) -> bool:
        """Whether both pull back a cotangent of the same value, in a way that takes several columns at once."""
        if isinstance(other, Native) and not (isinstance(one, Native) and COTANGENTS in other.code.holes):
            return False
        gradient, column = self._cotangent(one), self._cotangent(other)
        if gradient is None or column is None:
            return False
        return self.value_of[gradient] == self.value_of[column] and self._sampled(self.value_of[column])

    def _sampled(self, value: str) -> bool:
        """Whether it is a value of the graph with a batch: its cotangents have its shape."""
        return value in self.graph.values and any(N in axis for axis in self.graph.values[value].axes)

    def _cotangent(self, term: Term) -> str | None:
        """The cotangent in which the term is linear, if it is read once in each product, and not inside a part."""
        if isinstance(term, Native):
            return term.cotangent
        names = {name for product in term.products for name in self._read(product)}
        once = all(len(self._read(product)) == 1 for product in term.products)
        outside = all(any(isinstance(op, Tensor) and op.name in names for op in p.operands) for p in term.products)
        return names.pop() if len(names) == 1 and once and outside else None

    def _read(self, product: Product) -> list[str]:
        tensors = (tensor for op in product.operands for tensor in operand_tensors(op))
        return [tensor.name for tensor in tensors if tensor.name in self.value_of]

    def _joined(self, one: Term, other: Term) -> Term:
        """The columns' term for both."""
        gradient, column = self._cotangent(one), self._cotangent(other)
        assert gradient is not None and column is not None
        both = self.joint.get(self.value_of[column]) or self._stacked(column, gradient)
        if isinstance(other, Native):
            return replace(other, cotangent=both)
        (leg,), lead = self._lead, self.columns.carried
        whole = other.rename({lead[0]: leg}) if lead else other
        legs = whole.legs if lead else (leg, *whole.legs)
        return Diagram(legs, tuple(_reading(p, column, both, () if lead else (leg,)) for p in whole.products))

    def _stacked(self, column: str, gradient: str) -> str:
        """Both cotangents of a value, where they were not built together."""
        value = self.value_of[column]
        shape, count = self.graph.values[value].shape, self.columns.width
        both = [self._shown(column, (count, *shape)), self._shown(gradient, (1, *shape))]
        sizes = (count + 1, *shape)
        legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(sizes))
        joined = self.store.add(Call(f.CAT, (both,)), sizes, Kernel.COPY, copy_work(legs))
        self.joint[value] = self.store.key_of(joined)
        return self.joint[value]

    def _shown(self, name: str, shape: tuple[Size, ...]) -> Expr:
        found = self.store.find(name)
        return reshaped(found, found.shape, shape)


def _reading(product: Product, before: str, after: str, lead: tuple[Leg, ...]) -> Product:
    """The product with another tensor in the place of one, whose legs come after `lead`."""

    def other(op: Operand) -> Operand:
        return Tensor(after, (*lead, *op.legs)) if isinstance(op, Tensor) and op.name == before else op

    return Product(product.scale, tuple(map(other, product.operands)))
