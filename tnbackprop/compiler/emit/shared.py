"""Shared: lines that stand in a program several times in a row, of other values, are written as a function.

The layers of a deep model are such lines: the source grows with the layers that differ. What is computed, in which
order, and when it is let go of, stays as it is: what a function lets go of is handed over in a list, which it empties.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ...diagram.core import N
from ..program.expr import Body, Value, reads, sizes_in
from ..program.lines import Line
from .naming import common
from .printer import Printer

LEAST = 24
"""Lines of source that a function must save."""
CALL = 4
"""Lines of source that a call of it takes."""
GRAM = 4
"""Lines of a program that are looked up together; a function has as many at least."""
TRIED = 12
"""Distances at which lines are compared."""


@dataclass(frozen=True, eq=False)
class Shared:
    """A function: its lines are those of the first place where they stand.

    handed   the values from outside that it lets go of
    params   the other values from outside
    results  its own values that are read later
    hints    what its values may be called: what their names at all places have in common
    """

    handed: tuple[Value, ...]
    params: tuple[Value, ...]
    results: tuple[Value, ...]
    lines: tuple[Line, ...]
    hints: Mapping[Value, str]


@dataclass(frozen=True)
class Use:
    """A place where it is called; `unread` of the results nobody reads there."""

    shared: Shared
    handed: tuple[Value, ...]
    params: tuple[Value, ...]
    results: tuple[Value, ...]
    unread: tuple[Value, ...]
    note: str


Rows = list[Line | Use]


def shared(lines: Sequence[Line], kept: frozenset[Value], functions: Mapping[Body, str]) -> Rows:
    """The lines, with a call in place of those that a function stands for."""
    if len(lines) < LEAST:
        return list(lines)
    forms = [_form(line, functions) for line in lines]
    known: dict[object, int] = {}
    tokens = [known.setdefault(form.token, len(known)) for form in forms]
    last = {value: k for k, form in enumerate(forms) for value in form.values}
    last |= dict.fromkeys(kept, len(lines))
    return _Finder(lines, forms, tokens, last).rows(0, len(lines))


@dataclass(frozen=True)
class _Form:
    """What is written for a line, without its values, and the values in order: those that are read, and let go of."""

    token: object
    values: tuple[Value, ...]
    frees: frozenset[Value]


def _form(line: Line, functions: Mapping[Body, str]) -> _Form:
    places: dict[Value, str] = {}
    text = Printer(lambda value: places.setdefault(value, f"\0{len(places)}"), functions).text(line.expr)
    frees = [places.setdefault(value, f"\0{len(places)}") for value in line.frees]
    plain = line.block is None and sizes_in(line.expr) <= {N}
    known = {*reads(line.expr), *line.frees}  # the variables of functions inside are none
    values = tuple(value for value in places if value in known)
    return _Form((text, tuple(frees)) if plain else object(), values, frozenset(line.frees))


@dataclass(frozen=True)
class _Place:
    """The lines from `first` on, as a place of a function: the values from outside, and which line reads what.

    handed  the numbers of those from outside that it lets go of
    """

    first: int
    outside: Mapping[Value, int]
    handed: tuple[int, ...]
    pattern: tuple[object, ...]


class _Finder:
    def __init__(
        self, lines: Sequence[Line], forms: Sequence[_Form], tokens: Sequence[int], last: Mapping[Value, int]
    ) -> None:
        self.lines, self.forms, self.tokens, self.last = lines, forms, tokens, last
        noted = (line.note != before.note for before, line in pairwise((lines[0], *lines)))
        self.written = [1 + bool(line.frees) + new for line, new in zip(lines, noted, strict=True)]

    def rows(self, start: int, stop: int) -> Rows:
        """The rows for some of the lines: around the longest repetition, the same again."""
        found = self._repetition(start, stop)
        if found is None:
            return list(self.lines[start:stop])
        first, length, count = found
        uses = self._uses([first + k * length for k in range(count)], length)
        end = first + count * length
        return [*self.rows(start, first), *uses, *self.rows(end, stop)]

    def _repetition(self, start: int, stop: int) -> tuple[int, int, int] | None:
        """(first line, lines, times) of what saves most; None where nothing saves enough."""
        seen: dict[tuple[int, ...], int] = {}
        votes: Counter[int] = Counter()
        for k in range(start, stop - GRAM + 1):
            gram = tuple(self.tokens[k : k + GRAM])
            if gram in seen:
                votes[k - seen[gram]] += 1
            seen[gram] = k
        best: tuple[int, int, int, int] | None = None
        for length, _ in votes.most_common(TRIED):
            for first, equal in self._runs(start, stop, length):
                count = 1 + equal // length
                saves = (count - 1) * sum(self.written[first : first + length]) - count * CALL
                if length >= GRAM and saves >= LEAST and (best is None or saves > best[0]):
                    best = saves, first, length, equal
        if best is None:
            return None
        _, first, length, equal = best
        phases = range(first, first + equal % length + 1)
        return min(phases, key=lambda at: self._between(at, length)), length, 1 + equal // length

    def _runs(self, start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
        """(first line, how many) of lines that are equal to those so far behind them."""
        first = start
        for k in range(start, stop - length + 1):
            if k == stop - length or self.tokens[k] != self.tokens[k + length]:
                if k - first >= length:
                    yield first, k - first
                first = k + 1

    def _between(self, first: int, length: int) -> int:
        """How many values go in and out of so many lines."""
        end = first + length
        own = {self.lines[k].value for k in range(first, end)}
        read = {value for k in range(first, end) for value in self.forms[k].values} - own
        return len(read) + sum(self.last.get(value, -1) >= end for value in own)

    def _place(self, first: int, length: int) -> _Place:
        own = {self.lines[first + k].value: k for k in range(length)}
        outside: dict[Value, int] = {}
        pattern: list[object] = []
        handed: dict[int, None] = {}
        for k in range(first, first + length):
            form = self.forms[k]
            pattern.append([(own[v], 0) if v in own else (outside.setdefault(v, len(outside)), 1) for v in form.values])
            handed |= {outside[value]: None for value in form.values if value in form.frees and value not in own}
        return _Place(first, outside, tuple(handed), tuple(pattern))

    def _uses(self, firsts: Sequence[int], length: int) -> Rows:
        """The places, each as a call; where values go in otherwise than at those before, another function begins."""
        places = [self._place(first, length) for first in firsts]
        rows: Rows = []
        while places:
            alike = [place for place in places if place.pattern == places[0].pattern]
            count = next((k for k, place in enumerate(places) if place not in alike), len(places))
            some, places = places[:count], places[count:]
            if count == 1:
                rows += self.lines[some[0].first : some[0].first + length]
            else:
                rows += self._calls(some, length)
        return rows

    def _calls(self, places: Sequence[_Place], length: int) -> Iterator[Use]:
        every = [[self.lines[place.first + k] for k in range(length)] for place in places]
        later = [
            [self.last.get(line.value, -1) >= place.first + length for line in lines]
            for place, lines in zip(places, every, strict=True)
        ]
        results = [k for k in range(length) if any(each[k] for each in later)]
        outside = [tuple(place.outside) for place in places]
        handed = places[0].handed
        params = [k for k in range(len(outside[0])) if k not in handed]
        columns = zip(*([line.value for line in lines] for lines in every), strict=True)
        every_value = (*columns, *zip(*outside, strict=True))
        hints = {column[0]: common([value.hint for value in column], "") for column in every_value}
        notes = [common([line.note for line in column], "*") for column in zip(*every, strict=True)]
        function = Shared(
            tuple(outside[0][k] for k in handed),
            tuple(outside[0][k] for k in params),
            tuple(every[0][k].value for k in results),
            tuple(replace(line, note=note) for line, note in zip(every[0], notes, strict=True)),
            hints,
        )
        for k, lines in enumerate(every):
            yield Use(
                function,
                tuple(outside[k][j] for j in handed),
                tuple(outside[k][j] for j in params),
                tuple(lines[j].value for j in results),
                tuple(lines[j].value for j in results if not later[k][j]),
                lines[0].note,
            )
