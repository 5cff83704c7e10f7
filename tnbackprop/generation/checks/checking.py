"""The part of a generated file that checks it, for layers and models: definitions, and autograd on the file's forward.

A file has `forward`, `total` (a number whose derivatives are the gradients), `computed` (every result) and tables; the
`texts` do the rest. What has no definition that autograd can give is compared with recorded numbers, and the file
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Template
from typing import Any

from ...compiler.emit import printer
from ...compiler.emit.layout import Doc, Group, Row
from ...compiler.emit.naming import string
from ...quantities import HessianDiag, Quantity, Total
from ..parts.text import data, literal, statement, table
from .references import definition
from .texts import AUTOGRAD, CALLS, CHECK_DEFINITIONS, CHECK_FACTORS, CHECK_RECORDED, CHECK_SECOND, EXAMPLE, MAIN, TEXTS
from .whole import CHECK_WHOLE, WHOLE_CALLS, WHOLE_TEXTS, Whole, groups

Key = tuple[str, str]
Recorded = Mapping[Key, tuple[float, ...]]
SAMPLES = 3


@dataclass
class Checks:
    """What a file's check compares, and the texts that it needs. The tables are source."""

    references: dict[str, tuple[str, str]] = field(default_factory=dict)  # quantity -> (function, definition)
    second: dict[str, tuple[str, bool]] = field(default_factory=dict)  # quantity -> (a number's function, per sample)
    factors: dict[Key, Doc] = field(default_factory=dict)  # the entry of its table
    whole: dict[str, Doc] = field(default_factory=dict)  # quantity -> an expression in `values`, {name: value}
    groups: dict[str, dict[str, tuple[str, ...]]] = field(default_factory=dict)  # total -> group -> parameters
    recorded: list[Key] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)  # of this kind of file
    calls: list[str] = field(default_factory=list)  # of this kind of file
    uses: set[str] = field(default_factory=set)  # functions that all this calls

    def add(self, quantity: Quantity, functions: Mapping[str, str], scale: float, second: str = "") -> bool:
        """Enter a definition of the quantity, if there is one; `functions` give G, V and J."""
        found = definition(quantity, scale)
        if type(quantity) is HessianDiag and second:
            self.enter_second(quantity.name, second, quantity.per_sample)
            return True
        if found is None or found[0] not in functions:
            return False
        letter, text = found
        self.enter(quantity.name, functions[letter], f"lambda {letter}: {text}")
        return True

    def enter(self, result: str, function: str, definition: str) -> None:
        """A definition of a result in what a function gives."""
        self.references[result] = function, definition
        self.uses.add(function)

    def enter_whole(self, quantity: Quantity, whole: Whole, parameters: Sequence[str]) -> bool:
        """Enter a definition in the derivatives of all parameters, if there is one."""
        found = whole.found(quantity)
        if found is None:
            return False
        self.whole[quantity.name], uses = found
        self.uses |= uses
        if isinstance(quantity, Total):
            self.groups[quantity.name] = groups(quantity, parameters)
        return True

    def enter_second(self, result: str, function: str, per_sample: bool) -> None:
        """A result is the second derivatives of the number that a function gives."""
        self.second[result] = function, per_sample
        self.uses.add(function)

    def enter_factors(
        self, key: Key, exact: Doc, pull: str, names: Sequence[str], axes: tuple[Sequence[int], Sequence[int]]
    ) -> None:
        """Factors are exact for the columns that `exact` says, which `pull` pulls back."""
        entries = (printer.data(tuple(each)) for each in (names, *axes))
        self.factors[key] = Group("(", (exact, pull, *entries), ")")
        self.uses |= {pull}


def note(keys: Iterable[Key]) -> list[str]:
    """What the header says of the check."""
    by_quantity: dict[str, list[str]] = {}
    for quantity, name in keys:
        by_quantity.setdefault(quantity, []).append(name)
    usage = "`python FILE --check` compares every result with autograd"
    end = "its exit status is 0 where all agree."
    if not by_quantity:
        return [f"{usage}; {end}"]
    shown = "; ".join(f"{quantity} of {', '.join(names)}" for quantity, names in by_quantity.items())
    return [
        f"{usage}, except approximations that autograd has no definition of; {end}",
        f"These are compared with numbers that were recorded when this file was written: {shown}.",
    ]


def with_records(write: Callable[[Recorded], str], keys: Sequence[Key]) -> str:
    """A file with numbers that it gives itself, for what its check has no definition of."""
    first = write(dict.fromkeys(keys, ()))
    if not keys:
        return first
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(first, "<generated>", "exec"), namespace)
    found = namespace["computed"](namespace["example"](SAMPLES))
    numbers = {key: namespace["record"](found[key]).tolist() for key in keys}
    return write({key: tuple(float(f"{x:.8g}") for x in each) for key, each in numbers.items()})


def check_lines(checks: Checks, recorded: Recorded, low: bool = False) -> list[str]:
    """The tables, the texts that read them, and the main function."""
    texts = [EXAMPLE, *checks.texts]
    parts = list(_parts(checks, recorded))
    if {CHECK_DEFINITIONS, CHECK_WHOLE, CHECK_SECOND, CHECK_FACTORS} & {part.text for part in parts} or (
        "sampled" in checks.uses
    ):
        texts.append(AUTOGRAD)
    texts += [text for name, text in (TEXTS | WHOLE_TEXTS).items() if name in needed(checks.uses)]
    texts += [part.text for part in parts]
    tables = ["", "", *(line for part in parts for line in part.tables)] if parts else []
    calls = [*(part.call for part in parts), *checks.calls]
    right = statement("    right = ", Group("[", tuple(f"*{each}" for each in calls or ["[True]"]), "]"))
    return [
        f"SAMPLES = {SAMPLES}",
        f"TOLERANCE = {1e-4 if low else 1e-9!r}",
        *(row for piece in texts for row in lines_of_text(piece)),
        *tables,
        *lines_of_text(Template(MAIN).substitute(RIGHT="\n".join(right))),
    ]


@dataclass(frozen=True)
class _Part:
    """One kind of check: its tables, the function that reads them, and its call."""

    tables: list[str]
    text: str
    call: str


def _parts(checks: Checks, recorded: Recorded) -> Iterator[_Part]:
    """The kinds of which there is something to check."""
    if checks.references:
        rows = {string(name): Group("(", each, ")") for name, each in checks.references.items()}
        yield _Part(table("REFERENCES", rows), CHECK_DEFINITIONS, "check_definitions(values, found)")
    if checks.whole:
        whole = table("WHOLE", {string(name): Row(("lambda values: ", each)) for name, each in checks.whole.items()})
        groups = data("GROUPS", checks.groups) if checks.groups else []
        yield _Part([*groups, *whole], CHECK_WHOLE, "check_whole(values, found)")
    if checks.second:
        rows = {string(name): Group("(", (of, str(each)), ")") for name, (of, each) in checks.second.items()}
        yield _Part(table("SECOND", rows), CHECK_SECOND, "check_second_derivatives(values, found)")
    if checks.factors:
        head = "# (which columns make them exact), pulled back by, parameters, sizes of the axes, their order"
        factors = table("KRONECKER", {literal(key): entry for key, entry in checks.factors.items()})
        yield _Part([head, *factors], CHECK_FACTORS, "check_factors()")
    if recorded:
        yield _Part(data("RECORDED", recorded), CHECK_RECORDED, "check_recorded(found)")


def needed(uses: Iterable[str]) -> set[str]:
    """The functions of a check, and those that they call in turn."""
    found: set[str] = set()
    new = set(uses)
    while new:
        found |= new
        new = {other for name in new for other in (CALLS | WHOLE_CALLS).get(name, ())} - found
    return found


def lines_of_text(text: str) -> list[str]:
    """A piece of a file: two empty lines, then the text."""
    return ["", "", *text.strip("\n").split("\n")]
