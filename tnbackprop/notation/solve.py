"""The legs of a rule at concrete shapes: how many axes a star has, how large each leg is, where the batch is.

Every access says something: an axis of known size that is one leg gives its size, a grouped axis gives the
size of its one unknown factor. `solve` repeats this until nothing changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod

import sympy

from ..diagram.core import BATCH, Leg, N, Size
from ..errors import RuleError, UnsupportedError
from .syntax import Access, Factors, Index, Item, Name, Node, Number, Place, Rest, Select, Star, mixing, nearest

Axes = tuple[tuple[Size, ...], ...]
"""The axes of a tensor, each as its row-major factors; the batch factor is exactly N."""

Extent = tuple[Size, ...]
"""The size of a leg in the text: (size,), or N between the sizes before and after it that are not 1."""

REST = "..."


def extent(factors: Iterable[Size]) -> Extent | None:
    """Row-major factors with everything before and after N multiplied; None if N is no factor of its own."""
    before, after, batch = 1, 1, False
    for factor in factors:
        if factor == N:
            if batch:
                return None
            batch = True
        elif not isinstance(factor, int):
            return None
        elif batch:
            after *= factor
        else:
            before *= factor
    if not batch:
        return (before,)
    return tuple(part for part in (before, N, after) if part != 1)


@dataclass
class _Solver:
    where: str
    constants: Mapping[str, object]
    axes: dict[str, list[Extent | None] | None]
    rest_of: dict[str, Extent]  # tensors of known axes: all their factors
    stars: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, Extent] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    changed: bool = False

    def mixes(self, what: str) -> UnsupportedError:
        return mixing(self.where, what)

    def count(self, use: Access) -> None:
        """What the number of axes of one access says about its stars."""
        if any(isinstance(item, Rest) for item in use.items):
            return
        stars = [item.name for item in use.items if isinstance(item, Star)]
        unknown = {s for s in stars if s not in self.stars}
        fixed = len(use.items) - len(stars) + sum(self.stars.get(s, 0) for s in stars)
        axes = self.axes.get(use.tensor)
        if axes is None:
            if not unknown and use.tensor in self.axes:
                self.axes[use.tensor], self.changed = [None] * fixed, True
            return
        if len(unknown) > 1:
            return
        left, times = len(axes) - fixed, sum(s in unknown for s in stars)
        if left < 0 or (left % times if times else left):
            shown = ", ".join("?" if a is None else "*".join(map(str, a)) for a in axes)
            what = f"'{use.tensor}' has {len(axes)} axes [{shown}], but {use} names {fixed}"
            raise use.place.error(what + (" or more" if times else ""), self._no_batch(use, axes, fixed))
        for name in unknown:
            self.stars[name], self.changed = left // times, True

    def _no_batch(self, use: Access, axes: list[Extent | None], named: int) -> str:
        """What to write where the legs are those of one sample."""
        batch = [k for k, axis in enumerate(axes) if N in (axis or ())]
        items = [str(item) for item in use.items]
        if not batch or named + 1 != len(axes) or BATCH.name in items:
            return ""
        items.insert(batch[0], BATCH.name)
        return f"it has no batch leg: write {use.tensor}[{', '.join(items)}]"

    def measure(self, use: Access) -> None:
        """What the axes of one access say about the sizes of its legs, and the other way round."""
        if use.tensor == "delta":
            self.equal(use)
            return
        if any(isinstance(item, Rest) for item in use.items):
            if use.tensor in self.rest_of:
                self.bind(REST, self.rest_of[use.tensor], f"'{use.tensor}'", use.place)
            return
        axes = self.axes.get(use.tensor)
        if axes is None:
            return
        for k, item in enumerate(expand(use.items, self.stars, self.constants)):
            if isinstance(item, Factors):
                axes[k] = self.axis(item, axes[k], f"'{use.tensor}' (axis {k})")
            elif axes[k] is not None and N in (axes[k] or ()):
                raise self.mixes(f"the index {item} runs over the batch axis of '{use.tensor}'")

    def axis(self, item: Factors, size: Extent | None, origin: str) -> Extent | None:
        """Solve one axis: its size, where it follows from the legs."""
        if len(item.names) == 1:
            if size is not None:
                self.bind(item.names[0], size, origin, item.place)
            return self.sizes.get(item.names[0])
        if any(N in self.sizes.get(name, ()) for name in item.names) or N in (size or ()):
            raise self.mixes(f"the grouped axis {item} of {origin} holds the batch")
        known = 1
        for name in item.names:
            known *= int(self.sizes.get(name, (1,))[0])
        unknown = [name for name in item.names if name not in self.sizes]
        if size is None:
            return None if unknown else (known,)
        total = int(size[0])
        if len(unknown) <= 1 and (total % known if unknown and known else total != known):
            raise item.place.error(f"{origin} has size {total}, which is not {item} = {self.product(item)}")
        if len(unknown) == 1:
            self.bind(unknown[0], (total // known if known else 0,), origin, item.place)
        return size

    def product(self, item: Factors) -> str:
        return " * ".join(str(self.sizes[n][0]) if n in self.sizes else n for n in item.names)

    def bind(self, name: str, size: Extent, origin: str, place: Place) -> None:
        """Give a leg its size, or compare with the one that it has."""
        have = self.sizes.get(name)
        if have is None:
            self.sizes[name], self.origin[name], self.changed = size, origin, True
        elif have != size:
            shown = "'...'" if name == REST else f"leg '{name}'"
            if N in have and N in size and sympy.prod(have) == sympy.prod(size):
                places = f"in {origin} than in {self.origin[name]}"
                raise self.mixes(f"in {shown} the batch is at another row-major place {places}")
            sizes = f"{_shown(have)} in {self.origin[name]} but {_shown(size)} in {origin}"
            raise place.error(f"{shown} has size {sizes}")

    def equal(self, delta: Access) -> None:
        """The legs of a delta have one size."""
        names = [item.names[0] for item in delta.items if isinstance(item, Factors) and len(item.names) == 1]
        known = [name for name in names if name in self.sizes]
        for name in names if known else ():
            self.bind(name, self.sizes[known[0]], f"delta with '{known[0]}'", delta.place)


def _shown(size: Extent) -> str:
    return "*".join(map(str, size))


def expand(items: tuple[Item, ...], stars: Mapping[str, int], constants: Mapping[str, object]) -> list[Factors | Index]:
    """One item per axis: stars become their legs, a constant alone an index."""
    found: list[Factors | Index] = []
    for item in items:
        if isinstance(item, Star):
            found += [Factors((f"*{item.name}{k}",), item.place) for k in range(stars[item.name])]
        elif isinstance(item, Factors) and len(item.names) == 1 and item.names[0] in constants:
            found.append(Index(Name(item.names[0], item.place), str(item), item.place))
        elif isinstance(item, Factors | Index):
            found.append(item)
    return found


@dataclass(frozen=True)
class Legs:
    """What `solve` found: the legs of every leg name, star and '...' of the text."""

    where: str
    constants: Mapping[str, object]
    stars: Mapping[str, int]
    sizes: Mapping[str, Extent]
    of_name: Mapping[str, tuple[Leg, ...]]
    axes: Mapping[str, list[Extent | None] | None]

    @property
    def all(self) -> frozenset[Leg]:
        """Every leg that the text names."""
        return frozenset(leg for legs in self.of_name.values() for leg in legs)

    def axis_size(self, tensor: str, axis: int) -> int | None:
        """The size of an axis that does not hold the batch."""
        sizes = self.axes[tensor]
        size = sizes[axis] if sizes is not None else None
        return int(size[0]) if size is not None else None

    def items(self, items: tuple[Item, ...]) -> list[Factors | Index]:
        """One item per axis."""
        return expand(items, self.stars, self.constants)

    def flat(self, items: tuple[Item, ...]) -> tuple[Leg, ...]:
        """The legs of items that are all legs, in row-major order."""
        if any(isinstance(item, Rest) for item in items):
            return self.of_name[REST]
        found: list[Leg] = []
        for item in self.items(items):
            if isinstance(item, Index):
                raise item.place.error(f"'{item}' is not a leg")
            found += [leg for name in item.names for leg in self.of_name[name]]
        return tuple(found)

    def shape(self, items: tuple[Item, ...]) -> tuple[Size, ...]:
        """The stored shape of a tensor with these items: one axis per item."""
        axes = (self.flat((item,)) for item in self.items(items))
        return tuple(prod((leg.size for leg in axis), start=1) for axis in axes)

    def size(self, name: str) -> sympy.Expr | None:
        """The size that a capital name stands for (a star: the product of its axes), or None."""
        total = sympy.Integer(1)
        found = [leg for leg in self.of_name if leg.upper() == name]
        found += [f"*{star}{k}" for star, count in self.stars.items() if star.upper() == name for k in range(count)]
        if not found and not any(star.upper() == name for star in self.stars):
            return None
        for leg in found:
            for part in self.sizes[leg]:
                total = total * part
        return total


def solve(
    uses: Iterable[Access], axes: Mapping[str, Axes], lines: Iterable[str], constants: Mapping[str, object], where: str
) -> Legs:
    """Bind the legs of all accesses. `axes` are the known tensors, `lines` the names that the rule defines."""
    uses = list(uses)
    reads = [use for use in uses if use.tensor != "delta"]
    solver = _Solver(where, constants, _extents(axes, where) | dict.fromkeys(lines), {})
    solver.rest_of = {name: e for name, sizes in axes.items() if (e := extent(f for a in sizes for f in a)) is not None}
    _settle(solver, solver.count, reads)
    for use in uses:
        for item in use.items:
            if isinstance(item, Star) and item.name not in solver.stars:
                raise item.place.error(f"no operand tells how many axes *{item.name} stands for")
    names = _names_of(uses, solver)
    _presets(solver, names)
    _settle(solver, solver.measure, uses)
    for name, place in names.items():
        if name not in solver.sizes:
            raise _unsized(solver, name, place)
    batch = [name for name in names if N in solver.sizes[name]]
    if len(batch) > 1:
        raise solver.mixes(f"legs {' and '.join(repr(b.lstrip('*')) for b in batch)} are both the batch")
    return Legs(where, constants, solver.stars, solver.sizes, _legs_of(list(names), solver.sizes), solver.axes)


def compare(uses: Iterable[Access], axes: Mapping[str, Axes], constants: Mapping[str, object], where: str) -> None:
    """What tensors of known axes say about the legs, while others are still to come. Raises as `solve` does."""
    known = [use for use in uses if use.tensor in axes and not any(isinstance(i, Star | Rest) for i in use.items)]
    solver = _Solver(where, constants, _extents(axes, where), {})
    _settle(solver, solver.count, known)
    _presets(solver, _names_of(known, solver))
    _settle(solver, solver.measure, known)


def _extents(axes: Mapping[str, Axes], where: str) -> dict[str, list[Extent | None] | None]:
    found: dict[str, list[Extent | None] | None] = {}
    for name, sizes in axes.items():
        found[name] = extents = [extent(axis) for axis in sizes]
        for k, (size, axis) in enumerate(zip(extents, sizes, strict=True)):
            if size is None:
                shown = "*".join(map(str, axis))
                raise mixing(where, f"axis {k} of '{name}' has size {shown}")
    return found


def _presets(solver: _Solver, names: Mapping[str, Place]) -> None:
    """Constants that are the capitals of a leg give its size."""
    for name, place in names.items():
        size = solver.constants.get(name.upper())
        if isinstance(size, int):
            solver.bind(name, (size,), f"the constant {name.upper()}", place)


def _settle(solver: _Solver, step: Callable[[Access], None], uses: list[Access]) -> None:
    """Apply a step to every access until nothing changes."""
    solver.changed = True
    while solver.changed:
        solver.changed = False
        for use in uses:
            step(use)


def _names_of(uses: list[Access], solver: _Solver) -> dict[str, Place]:
    """Every leg name (star legs as *s0, …) with its first place."""
    found: dict[str, Place] = {}
    for use in uses:
        if any(isinstance(item, Rest) for item in use.items):
            found.setdefault(REST, use.place)
            continue
        for item in expand(use.items, solver.stars, solver.constants):
            if isinstance(item, Factors):
                for name in item.names:
                    found.setdefault(name, item.place)
            else:
                for bare in index_names(item.expr):
                    if bare.name not in solver.constants and bare.name != bare.name.upper():
                        found.setdefault(bare.name, bare.place)
    return found


def index_names(node: Node) -> Iterable[Name]:
    """The bare names in an affine index."""
    match node:
        case Name():
            yield node
        case Number() | Access() | Select():
            return
        case _:
            for arg in node.args:
                yield from index_names(arg)


def _unsized(solver: _Solver, name: str, place: Place) -> RuleError:
    shown = name.lstrip("*")
    known = [n for n in solver.sizes if n != REST] + [c for c in solver.constants if isinstance(c, str)]
    hint = nearest(shown, known)
    hint += f"\nor give it: constants={{'{shown.upper()}': …}} for its size, {{'{shown}': …}} for a number that it is"
    return place.error(f"the size of leg '{shown}' does not follow from the operands", hint)


def _legs_of(names: list[str], sizes: Mapping[str, Extent]) -> dict[str, tuple[Leg, ...]]:
    """Leg objects with names that are unique in the rule; the batch is BATCH, and no other leg is called n."""
    taken = set(names) | {BATCH.name}

    def fresh(wanted: str) -> str:
        while wanted in taken:
            wanted += "_"
        taken.add(wanted)
        return wanted

    found: dict[str, tuple[Leg, ...]] = {}
    for name in names:
        parts, bare = sizes[name], "r" if name == REST else name.lstrip("*")
        legs = []
        for k, part in enumerate(parts):
            wanted = bare if len(parts) == 1 else f"{bare}_{k}"
            own = wanted == name != BATCH.name
            legs.append(BATCH if part == N else Leg(wanted if own else fresh(wanted), part))
        # '...' has no use for legs of size 1
        found[name] = tuple(leg for leg in legs if name != REST or leg.size != 1)
    return found
