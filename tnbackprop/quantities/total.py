"""Totals: the sum of a quantity over all parameters, or over named groups of them; and the sums that phases need."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..diagram.algebra import Cotangents, Uses
from ..diagram.core import Diagram
from ..errors import InputError, UnsupportedError
from .base import Outcome, Quantity, Totals
from .first_order import BatchL2
from .propagation import Propagation
from .stream import Stream

SQUARES = BatchL2()
ALL = "all"
"""The group of all parameters."""
Groups = Callable[[str], str] | Mapping[str, str | Sequence[str]]


@dataclass(frozen=True, init=False)
class Total(Quantity):
    """Σ over parameters of a quantity: {"all": sum}, or {group: sum}. For what has no legs of the parameter.

    The squared norms of whole individual gradients are ``tn.Total(tn.BatchL2())``, [N]; the Gram matrix of them
    ``tn.Total(tn.BatchDot())``, [N, N], of which only the sum is ever held, not one for each parameter.

    quantity  what is summed: values without the parameter's axes, [N], [N, N], numbers; `BatchL2` if nothing is said
    groups    None: all parameters together. A function from a parameter's name to its group (`str`: each is its own),
              or group -> names or patterns ("encoder.*"), of which the first that fits counts
    name      its key in the result; by default that of the quantity with "_total"

    Raises `InputError` for a value that has axes of the parameter, and for a parameter that is in no group.
    """

    name: str
    quantity: Quantity
    groups: Groups | None

    def __init__(self, quantity: Quantity = SQUARES, groups: Groups | None = None, name: str = "") -> None:
        if not isinstance(quantity, Quantity):
            raise InputError(f"tn.Total: quantity={quantity!r} is no tn.Quantity: give an instance, tn.BatchL2()")
        if isinstance(quantity, Total):
            raise InputError("tn.Total: a total is summed over parameters already; give the quantity itself")
        if not (groups is None or callable(groups) or isinstance(groups, Mapping)):
            raise InputError(f"tn.Total: groups={groups!r}: give a function of a parameter's name, or {{group: names}}")
        for group, names in groups.items() if isinstance(groups, Mapping) else ():
            if not isinstance(names, str | Collection) or not all(isinstance(each, str) for each in names):
                raise InputError(f"tn.Total: group {group!r} is {names!r}: give names or patterns")
        object.__setattr__(self, "name", name or f"{quantity.name}_total")
        object.__setattr__(self, "quantity", quantity)
        object.__setattr__(self, "groups", groups)
        object.__setattr__(self, "samples", quantity.of_samples)

    @property
    def propagates(self) -> Propagation | tuple[Propagation, ...]:
        return self.quantity.propagates

    @property
    def needs(self) -> tuple[Quantity, ...]:
        return self.quantity.needs

    def between(self, totals: Totals) -> Outcome:
        return self.quantity.between(totals)

    def extract(self, J: Uses, *g: Cotangents) -> Diagram | Stream:
        found = self.quantity.extract(J, *g)
        if isinstance(found, Stream):
            return found
        if not isinstance(found, Diagram) or any(leg in J.legs for leg in found.legs):
            what = ", ".join(map(str, found.legs)) if isinstance(found, Diagram) else "Kronecker factors"
            raise InputError(
                f"{self.quantity.name!r} of parameter {J.name!r} is [{what}], which has axes of the parameter: values "
                "of different parameters do not add up. Sum over them first, .sum_parameter()"
            )
        return found

    def group_of(self, parameter: str) -> str:
        """The group of a parameter."""
        if self.groups is None:
            return ALL
        if not isinstance(self.groups, Mapping):
            found = self.groups(parameter)
            if not isinstance(found, str):
                raise InputError(f"tn.Total {self.name!r}: groups gives {found!r} for {parameter!r}: give a text")
            return found
        for group, names in self.groups.items():
            if any(fnmatchcase(parameter, pattern) for pattern in _patterns(names)):
                return group
        raise InputError(f"tn.Total {self.name!r}: parameter {parameter!r} is in no group of {list(self.groups)}")


    def check_groups(self, parameters: Collection[str]) -> None:
        """Raises `InputError` for a pattern that fits none of them."""
        for names in self.groups.values() if isinstance(self.groups, Mapping) else ():
            for pattern in _patterns(names):
                if not any(fnmatchcase(parameter, pattern) for parameter in parameters):
                    known = ", ".join(list(parameters)[:6]) + (", …" if len(parameters) > 6 else "")
                    what = f"tn.Total {self.name!r}: {pattern!r} fits no parameter that it is summed over"
                    raise InputError(f"{what}: there are {known}")


def _patterns(names: str | Collection[str]) -> Collection[str]:
    return [names] if isinstance(names, str) else names


@dataclass(frozen=True, init=False)
class Needed(Total):
    """A total that another quantity needs, which is no result.

    of   the name of that quantity
    key  what it calls the total
    """

    of: str
    key: str

    def __init__(self, need: Quantity, of: str) -> None:
        total = need if isinstance(need, Total) else Total(need)
        super().__init__(total.quantity, total.groups, f"{of}: {need.name}")
        object.__setattr__(self, "of", of)
        object.__setattr__(self, "key", need.name)


def of_all_samples(quantities: Sequence[Quantity]) -> Sequence[Quantity]:
    """They, for one program. Raises `UnsupportedError` for one of some samples, which has a program of its own."""
    for quantity in quantities:
        if quantity.of_samples is not None:
            raise UnsupportedError(
                f"{quantity.name!r} is of samples {quantity.of_samples} alone, and this is for all of a batch.\n"
                "  Leave samples= out, and hand in the rows of these samples."
            )
    return quantities


def with_needs(quantities: Iterable[Quantity]) -> list[Quantity]:
    """The quantities, and the totals that they need, which may need others."""
    found: list[Quantity] = []
    for quantity in quantities:
        found += [quantity, *with_needs(Needed(need, quantity.name) for need in quantity.needs)]
    return found


def level_of(quantity: Quantity) -> int:
    """In which phase it is extracted: after all that it needs."""
    return max((1 + level_of(need) for need in quantity.needs), default=0)
