"""What a quantity is: a name, options, and a few lines of algebra that never see a layer type."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from copy import copy
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from typing import Any

import sympy

from ..diagram.algebra import Cotangents, Uses
from ..diagram.core import COLUMN, Diagram
from ..errors import InputError, check_member
from .factors import Factors
from .propagation import Draws, Exact, Gradient, Labels, Propagation, check_propagation
from .stream import Stream

Samples = tuple[int, ...]
"""Places of samples in a batch."""
Totals = Mapping[str, Any]
"""Sums over all parameters by the name of a needed quantity, [N], [N, N], …; of a `Total` with groups {group: sum}."""
Outcome = Mapping[str, Any]
"""Tensors by the key of the operand that they are, or {parameter: tensor} where each parameter has one."""


class Scale(Enum):
    """Which multiples of the individual gradients ∇ℓ_n a quantity is made of; each docstring gives the formulas."""

    PAPER = "paper"
    UNSCALED = "unscaled"
    BACKPACK = "backpack"


@dataclass(frozen=True)
class Quantity(ABC):
    """Base class. A subclass is a frozen dataclass with a default `name`, its key in the result.

    Options have the type of their default. Raises `InputError` for another: a text for an enum would mean nothing.

    samples  the quantity of these samples of a batch alone, in this order, as if the batch had no others: what the
             program gives on their rows. Of a loss that averages it is an estimate of the whole batch's, at the price
             of so many samples. None: of all
    """

    name: str
    samples: Samples | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_samples(self)
        for option in fields(self):
            if option is not SAMPLES:
                _check_option(option, getattr(self, option.name), type(self).__name__)

    @property
    def of_samples(self) -> Samples | None:
        """The samples that it is of; None: all. A class of one's own may mean something else by its `samples`."""
        own = any(option is SAMPLES for option in fields(self))
        return self.samples if own else None

    @property
    def propagates(self) -> Propagation | tuple[Propagation, ...]:
        """What is propagated: the gradient, unless a quantity says otherwise.

        Several, ``(tn.Exact(), tn.Gradient())``, are the arguments of `extract` in that order: ``extract(J, S, g)``.
        Of two with columns those of the second have the leg ``μ`` in the place of ``ν``, and are all there at once.
        """
        return Gradient()

    @property
    def propagations(self) -> tuple[Propagation, ...]:
        """All that it propagates."""
        found = self.propagates
        return found if isinstance(found, tuple) else (found,)

    @property
    def host(self) -> Propagation:
        """The one whose sweep it is extracted in: the first with columns, else the gradient."""
        return next((each for each in self.propagations if not isinstance(each, Gradient)), self.propagations[0])

    @property
    def needs(self) -> tuple[Quantity, ...]:
        """Quantities whose sums over all parameters `between` makes operands of, which `extract` reads; default none.

        They are extracted first, in the same sweep, and are no results.
        """
        return ()

    def between(self, totals: Totals) -> Outcome:
        """Torch code between two phases: from the sums of what it `needs` to operands by key.

        It is traced once, for any number of samples; `g.operand(key)` and `J.operand(key)` read what it returns.
        """
        needed = ", ".join(need.name for need in self.needs)
        raise InputError(f"{type(self).__name__} needs {needed} and has no method between(totals) that uses it")

    @abstractmethod
    def extract(self, J: Uses, g: Cotangents) -> Diagram | Factors | Stream:
        """The quantity of one parameter: `J.T @ g` has legs [n, *parameter]; every other leg comes from algebra."""


(SAMPLES,) = (option for option in fields(Quantity) if option.name == "samples")


def check_samples(quantity: Quantity) -> None:
    """Its samples as a tuple; also of a class whose own `__post_init__` looks at other options alone."""
    if quantity.of_samples is not None:
        object.__setattr__(quantity, "samples", _indices(quantity.samples, type(quantity).__name__))


def whole(quantity: Quantity) -> Quantity:
    """The same of all samples."""
    found = copy(quantity)
    object.__setattr__(found, "samples", None)
    return found


def individual(J: Uses, g: Cotangents) -> Diagram:
    """∇ℓ_n with legs [n, *p], without the factor that the loss puts on ℓ_n."""
    found: Diagram = (J.T @ g) / g.scale
    return found


def columns(J: Uses, g: Cotangents, root: Propagation) -> Diagram:
    """V = Jᵀ S with legs [ν, n, *p] for the columns S of a root; of the labels ∇ℓ_n √scale, [n, *p]."""
    found: Diagram = J.T @ g
    return found * g.scale ** -sympy.Rational(1, 2) if isinstance(root, Labels) else found


def over_columns(diagram: Diagram, *names: str) -> Diagram:
    """Summed over the columns, where there are several, and over legs of these names."""
    return diagram.sum(*(leg.name for leg in diagram.legs if leg.name in (COLUMN, *names)))


def check_root(owner: str, root: object) -> None:
    """One of tn.Exact(), tn.Draws(k), tn.Labels(). Raises `InputError`."""
    if not isinstance(root, Exact | Draws | Labels):
        raise InputError(f"{owner}: root={root!r}: give tn.Exact(), tn.Draws(k) or tn.Labels()")


EXACT = Exact()
OF_ROWS = {"largest": "a dense factor", "rows": "a block of a factor"}
"""Options that are a number of rows, and of what."""


def _indices(samples: object, owner: str) -> Samples:
    """Raises `InputError` for what are no samples of a batch."""
    listed = getattr(samples, "tolist", lambda: samples)()
    found = tuple(listed) if isinstance(listed, Iterable) and not isinstance(listed, str) else ()
    if not found or any(type(k) is not int or k < 0 for k in found) or len(set(found)) < len(found):
        raise InputError(f"{owner}: samples={samples!r}: give places in a batch, each once: (0, 3) or range(8)")
    return found


def _check_option(option: Field[object], value: object, owner: str) -> None:
    """Of the type of its default; a count is positive, a name is a key that can be told apart."""
    kind = str if option.name == "name" else type(option.default)
    what = f"{owner}: {option.name}={value!r}"
    if issubclass(kind, Enum):
        check_member(f"{owner}: {option.name}", value, kind)
    elif kind in (bool, int, str) and type(value) is not kind:
        raise InputError(f"{what} is {type(value).__name__}, not {kind.__name__}")
    if option.name == "mc_samples" and isinstance(value, int) and value < 1:
        raise InputError(f"{what}: draw at least one column per sample")
    if option.name == "root":
        check_root(owner, value)
    if option.name in OF_ROWS and type(value) is int and value < 1:
        raise InputError(f"{what}: {OF_ROWS[option.name]} has at least one row")
    if option.name == "name" and not value:
        raise InputError(f"{what}: the key in the result is a text that is not empty")


def check_quantities(quantities: object) -> None:
    """Instances with different names. Raises `InputError`."""
    if isinstance(quantities, Quantity | str | type) or not isinstance(quantities, Collection):
        raise InputError(f"quantities is {_shown(quantities)}, not a list: write [tn.Grad(), tn.KFAC()]")
    for quantity in quantities:
        if isinstance(quantity, type) and issubclass(quantity, Quantity):
            raise InputError(f"{quantity.__name__} is a class: give an instance, {quantity.__name__}()")
        if not isinstance(quantity, Quantity):
            raise InputError(f"{_shown(quantity)} is no tn.Quantity: give instances, [tn.Grad(), tn.KFAC()]")
        check_samples(quantity)
        _check_propagations(quantity)
        if quantity.needs:
            check_quantities(quantity.needs)
        if not isinstance(quantity.name, str) or not quantity.name:
            what = f"{type(quantity).__name__}: name={quantity.name!r}"
            raise InputError(f"{what}: the key in the result is a text; options go by name")
    names = [quantity.name for quantity in quantities]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two quantities are called {name!r}: give one another name=, its key in the result")


def _check_propagations(quantity: Quantity) -> None:
    owner, found = repr(quantity.name), quantity.propagations
    for each in found:
        check_propagation(each, owner)
    columns = [each for each in found if not isinstance(each, Gradient)]
    if not found or len(set(found)) < len(found) or len(columns) > 2:
        raise InputError(
            f"{owner}: propagates {', '.join(type(each).__name__ for each in found) or 'nothing'}: give one, "
            "or several that differ, of which two have columns at most"
        )


def _shown(value: object) -> str:
    return repr(value) if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
