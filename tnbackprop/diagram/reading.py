"""Readings: the tensors that a quantity reads beside those of the sweep.

Diagrams read them by a name of their own; what each is stands here: handed in when the program is called, or computed
between two phases from totals.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain

import sympy

from ..errors import InputError
from .core import BATCH, COLUMN, COLUMN_COPY, Diagram, Leg, N, Product, Size, Tensor

Legs = tuple[Leg, ...]
Axes = tuple[Leg | str | Legs, ...]
"""The axes of an operand: a leg, the name of one, or several legs that are one axis together."""
PARAMETER = sympy.Symbol("*p")
"""Stands for the shape of a parameter, in messages."""


@dataclass(frozen=True)
class Reading:
    """A tensor beside those of the sweep.

    key        as the quantity calls it
    axes       the legs of each of its axes
    parameter  the dotted name of the parameter whose it is; "": one for all
    of         the quantity that has it made between two phases; "": it is handed in
    own        the parameter's legs: where all of them are axes, one after the other, they stand for its shape
    joined     which axes were said to be one axis of several legs, be it one: those do not stand for that shape
    """

    key: str
    axes: tuple[Legs, ...]
    parameter: str = ""
    of: str = ""
    own: Legs = ()
    joined: tuple[bool, ...] = ()

    @property
    def legs(self) -> Legs:
        return tuple(chain.from_iterable(self.axes))

    @property
    def sizes(self) -> tuple[Size, ...]:
        """Of its legs, as diagrams read it."""
        return tuple(leg.size for leg in self.legs)

    def shape(self, parameter: tuple[Size, ...]) -> tuple[Size, ...]:
        """Of the tensor, for a parameter of this shape."""
        alone = tuple((leg,) for leg in self.own)
        for k in range(len(self.axes) - len(alone) + 1 if alone else 0):
            if self.axes[k : k + len(alone)] == alone and not any(self.joined[k : k + len(alone)]):
                return (*_sizes(self.axes[:k]), *parameter, *_sizes(self.axes[k + len(alone) :]))
        return _sizes(self.axes)

    def __str__(self) -> str:
        return f"operand {self.key!r}" + (f" of parameter {self.parameter!r}" if self.parameter else "")


def _sizes(axes: tuple[Legs, ...]) -> tuple[Size, ...]:
    found = (sympy.Mul(*(leg.size for leg in axis)) for axis in axes)
    return tuple(int(size) if size.is_Integer else size for size in found)


@dataclass(frozen=True)
class Readings:
    """All that is read, by the name that diagrams have for it; `of`: the quantity that reads, where it has phases."""

    found: dict[str, Reading] = field(default_factory=dict)
    of: str = ""
    taken: Legs = ()

    def within(self, quantity: str, taken: Legs) -> Readings:
        """The same for a parameter with these legs, and what a quantity reads that has some made between its phases."""
        return Readings(self.found, quantity, taken)

    def read(self, key: str, axes: Axes, parameter: str = "", own: Legs = ()) -> Diagram:
        """The diagram of an operand. Raises `InputError` for legs that nobody knows, and for a key that means two."""
        if not isinstance(key, str) or not key:
            raise InputError(f"the key of an operand is {key!r}: a text that is not empty")
        joined = tuple(isinstance(axis, tuple) for axis in axes)
        reading = Reading(key, tuple(_axis(key, axis, own) for axis in axes), parameter, self.of, own, joined)
        self._check_own(reading)
        names = [leg.name for leg in reading.legs]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"{reading}: two of its legs are called {twice!r}; give each a name of its own")
        alike = {name: other for name, other in self.found.items() if (other.key, other.of) == (key, self.of)}
        for other in alike.values():
            _check_alike(reading, other)
        again = (name for name, other in alike.items() if (other.parameter, other.sizes) == (parameter, reading.sizes))
        name = next(again, None)
        if name is None:
            number = sum(other.parameter == parameter for other in alike.values())
            name = f":operand:{':'.join(filter(None, (self.of, key, parameter)))}{f':{number}' * bool(number)}"
            self.found[name] = reading
        return Diagram(reading.legs, (Product(sympy.Integer(1), (Tensor(name, reading.legs),)),))


    def _check_own(self, reading: Reading) -> None:
        """What is one tensor for all parameters has no leg that is called as one of theirs: they would be one leg."""
        same = {leg.name for leg in reading.legs} & {leg.name for leg in self.taken}
        if same and not reading.parameter:
            legs = ", ".join(map(str, self.taken))
            raise InputError(
                f"{reading} has a leg {min(same)!r} of its own, and a parameter has one of that name ([{legs}]): call "
                "it otherwise. What has legs of the parameter is J.operand(…)"
            )


def _check_alike(one: Reading, other: Reading) -> None:
    """One key is one tensor, or one of each parameter."""
    if bool(one.parameter) != bool(other.parameter):
        raise InputError(
            f"operand {one.key!r} is read as one tensor for all, g.operand(…), and as one of each parameter, "
            "J.operand(…): give one of them another key"
        )
    shapes = [each.shape((PARAMETER,)) for each in (one, other)]
    if one.parameter == other.parameter and shapes[0] != shapes[1]:
        raise InputError(
            f"{one} is read with the shapes {_shown(shapes[0])} and {_shown(shapes[1])}: give one of them another key"
        )


def _shown(shape: tuple[Size, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _axis(key: str, axis: object, own: Legs) -> Legs:
    """The legs of one axis."""
    legs = axis if isinstance(axis, tuple) else (axis,)
    return tuple(_leg(key, leg, own) for leg in legs)


def _leg(key: str, leg: object, own: Legs) -> Leg:
    known = {each.name: each for each in (BATCH, *own)}
    if isinstance(leg, str):
        if leg not in known:
            raise InputError(
                f"operand {key!r} has an unknown leg {leg!r}: there are {', '.join(known)}.\n"
                f"  For one of its own write tn.Leg({leg!r}, size)."
            )
        return known[leg]
    if not isinstance(leg, Leg):
        raise InputError(f"operand {key!r}: {leg!r} is no leg; give tn.Leg(name, size), or one of {', '.join(known)}")
    if leg.name in (COLUMN, COLUMN_COPY):
        raise InputError(
            f"operand {key!r} has the leg of columns {leg.name!r}, of which a program may take some at a time: it "
            "cannot be handed in"
        )
    if known.get(leg.name, leg) != leg:
        raise InputError(
            f"operand {key!r}: its leg {leg.name!r} has size {leg.size}, and there is one of size "
            f"{known[leg.name].size} already; call it otherwise"
        )
    if leg.size != N and (not isinstance(leg.size, int | sympy.Integer) or int(leg.size) < 1):
        raise InputError(f"operand {key!r}: its leg {leg.name!r} has size {leg.size!r}; give a number > 0, or tn.N")
    return leg
