"""Expressions: what makes a value, as calls on values. Frozen; a value is itself, and emit alone gives it a name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, TypeAlias

import sympy
import torch

from ...diagram.core import Leg, N, Size
from ...notation.code import Code
from .cost import Kernel, Work
from .functions import Function, helper_of
from .numbers import Number

NO_WORK = Work()
Legs = tuple[Leg, ...]


@dataclass(frozen=True, eq=False)
class Value:
    """A tensor of the program; its identity is the object.

    key       how diagrams call it
    expr      what makes it; None: it is given from outside, or it is the variable of a loop or a function
    hint      what it may be called
    own       it is a new tensor of the program's floating dtype, in memory that no earlier value has
    floating  it has the program's one floating dtype
    whole     it is all of a value's own memory, or a view of all of it
    strided   its memory is not row-major: merging legs copies
    seen      of a permuted view: the value that it is a view of
    near      of a strided value: axis -> stride, of short strides
    spread    what is constant along some legs: the value without them
    summands  of a sum: a summand in the same order, and one with fewer legs
    linear    a value in which it is linear, where its expression does not show it
    dtype     where it is made of what was cast for squares and factors: that dtype
    """

    key: str
    expr: Expr | None
    shape: tuple[Size, ...]
    kernel: Kernel = Kernel.VIEW
    work: Work = NO_WORK
    note: str = ""
    hint: str = ""
    own: bool = False
    floating: bool = False
    whole: bool = False
    strided: bool = False
    seen: Ref | None = None
    near: Mapping[int, int] | None = None
    spread: Ref | None = None
    summands: tuple[Ref, Ref] | None = None
    linear: Value | None = None
    dtype: torch.dtype | None = None
    inputs: tuple[Value, ...] = field(default=(), repr=False)

    def __str__(self) -> str:
        return self.hint or self.key

    __repr__ = __str__


@dataclass(frozen=True)
class Ref:
    """A value seen with named legs: `stored` factorises its memory row-major, `order` is how it is read now."""

    value: Value
    stored: Legs
    order: Legs

    def reordered(self, order: Legs) -> Ref:
        return Ref(self.value, self.stored, order)

    def renamed(self, legs: Legs) -> Ref:
        """The same value with its current legs called differently."""
        to = dict(zip(self.order, legs, strict=True))
        return Ref(self.value, tuple(to[leg] for leg in self.stored), legs)


@dataclass(frozen=True)
class Word:
    """A piece of Python that stands for itself: ..., None, a dtype."""

    text: str
    meaning: Any = None


@dataclass(frozen=True)
class Slice:
    """start:stop:step"""

    start: Size | None = None
    stop: Size | None = None
    step: int | None = None


class Call:
    """A call of a function on expressions and plain arguments (numbers, sizes, text, tuples of them)."""

    __slots__ = ("_hash", "_key", "args", "fn", "options")
    fn: Function
    args: tuple[Any, ...]
    options: tuple[tuple[str, Any], ...]

    def __init__(self, fn: Function, args: tuple[Any, ...], options: tuple[tuple[str, Any], ...] = ()) -> None:
        self.fn, self.args, self.options = fn, args, options
        self._key = (fn, _exact(args), _exact(options))
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Call) and self._hash == other._hash and self._key == other._key)

    def __repr__(self) -> str:
        return f"{self.fn.name}{self.args}"


def _exact(argument: Any) -> Any:
    """A key that tells 1, 1.0 and True apart, and -0.0 from 0.0."""
    if isinstance(argument, tuple | list):
        return (type(argument).__name__, *map(_exact, argument))
    if isinstance(argument, bool | float):
        return (type(argument).__name__, repr(argument))
    return argument


@dataclass(frozen=True)
class Pointwise:
    """A sympy expression of the values of its symbols, elementwise."""

    expr: sympy.Expr
    args: tuple[tuple[sympy.Symbol, Expr], ...]


@dataclass(frozen=True)
class Filled:
    """Torch code that a rule gives, with expressions in its holes."""

    code: Code
    holes: tuple[tuple[str, Expr], ...]


@dataclass(frozen=True)
class Lambda:
    """A function of some variables inside an expression."""

    params: tuple[Value, ...]
    body: Expr


@dataclass(frozen=True, eq=False)
class Body:
    """A function: steps on its parameters that lead to `results`. It reads nothing else.

    batch   the parameter and the axis that say how many samples there are; None: as many as outside
    total   the number of samples of the whole batch is a parameter
    """

    params: tuple[Value, ...]
    steps: tuple[Value, ...]
    results: tuple[Expr, ...]
    batch: tuple[Value, int] | None
    hint: str
    several: bool = False
    total: bool = False

    @property
    def values(self) -> tuple[Value, ...]:
        """The results, where they are values of its steps or of its parameters."""
        return tuple(result for result in self.results if isinstance(result, Value))


class Join(Enum):
    """How what the parts give is put together."""

    SUM = "sum"
    CAT = "concatenation"


@dataclass(frozen=True)
class Rounds:
    """A function that runs for one part after the other: of the samples, or of columns.

    args      what each parameter is given, and the axis along which that is cut (None: the whole in every round)
    size      how much there is: N samples, or so many columns, filled up to whole rounds
    width     how much of it at a time; a single column has no axis
    joins     how each result is put together, along `axis`
    begin     for each result, what a sum goes on from, if anything
    followed  a bar may follow it
    """

    body: Body
    args: tuple[tuple[Expr, int | None], ...]
    size: Size
    width: int
    joins: tuple[Join, ...]
    axis: int = 0
    begin: tuple[Expr | None, ...] = ()
    followed: bool = True

    @property
    def of_columns(self) -> bool:
        """Whether its parts are columns: then it stands in the program as a loop, and not as calls of a function."""
        return isinstance(self.size, int)

    @property
    def count(self) -> int:
        """How many rounds there are of columns."""
        return -(-int(self.size) // self.width)

    @property
    def rows(self) -> tuple[tuple[Value, Expr], ...]:
        """The parameters that are cut, with what they are parts of."""
        pairs = zip(self.body.params, self.args, strict=False)
        return tuple((variable, expr) for variable, (expr, axis) in pairs if axis is not None)


@dataclass(frozen=True)
class Of:
    """The call of a function next to the program."""

    body: Body
    args: tuple[Expr, ...]


Expr: TypeAlias = Value | Call | Pointwise | Filled | Lambda | Rounds | Of


def children(expr: Any) -> Iterator[Any]:
    """Everything that stands directly in an expression."""
    match expr:
        case Call():
            yield from expr.args
            yield from (value for _, value in expr.options)
        case tuple() | list():
            yield from expr
        case dict():
            yield from expr.values()
        case Pointwise():
            yield from (each for _, each in expr.args)
        case Filled():
            yield from (each for _, each in expr.holes)
        case Lambda():
            yield expr.body
        case Rounds():
            yield from (each for each, _ in expr.args)
            yield from expr.begin
        case Of():
            yield from expr.args
        case Slice():
            yield from (expr.start, expr.stop)


def reads(expr: Any) -> tuple[Value, ...]:
    """The values that an expression reads, each once; the variables of its functions are none."""
    found: dict[Value, None] = {}
    _collect(expr, found, frozenset())
    return tuple(found)


def _collect(expr: Any, found: dict[Value, None], bound: frozenset[Value]) -> None:
    if isinstance(expr, Value):
        if expr not in bound:
            found[expr] = None
        return
    if isinstance(expr, Lambda):
        bound = bound | frozenset(expr.params)
    for child in children(expr):
        _collect(child, found, bound)


def captured(expr: Any, inside: bool = False) -> Iterator[Value]:
    """The values that functions and comprehensions in an expression read."""
    if isinstance(expr, Value):
        if inside:
            yield expr
        return
    if isinstance(expr, Rounds) and expr.of_columns:
        yield from (value for step in expr.body.steps for value in captured(step.expr))
    inside = inside or isinstance(expr, Lambda) or (isinstance(expr, Rounds) and not expr.of_columns)
    inside = inside or (isinstance(expr, Filled) and expr.code.nested)
    for child in children(expr):
        yield from captured(child, inside)


def sizes_in(expr: Any) -> set[sympy.Symbol]:
    """The symbols of the sizes that are written in an expression."""
    if isinstance(expr, sympy.Basic):
        return set(expr.free_symbols)
    found: set[sympy.Symbol] = set()
    if isinstance(expr, Number):
        return expr.symbols
    if isinstance(expr, Pointwise):
        found |= expr.expr.free_symbols - {symbol for symbol, _ in expr.args}
    if isinstance(expr, Filled):
        found |= {sympy.Symbol(word, integer=True, positive=True) for word in expr.code.words & {"N", "V"}}
    if isinstance(expr, Rounds):
        found |= set().union(*(sizes_in(step.expr) for step in expr.body.steps)) if expr.of_columns else {N}
    for child in children(expr):
        found |= sizes_in(child)
    return found


def bodies(expr: Any) -> Iterator[Body]:
    """The functions next to the program that an expression calls."""
    if isinstance(expr, Rounds) and expr.of_columns:
        yield from (body for step in expr.body.steps for body in bodies(step.expr))
    elif isinstance(expr, Rounds | Of):
        yield expr.body
    for child in children(expr) if not isinstance(expr, Value) else ():
        yield from bodies(child)


def helpers(expr: Any) -> Iterator[Function]:
    """The helpers that an expression calls."""
    if isinstance(expr, Call) and expr.fn.source:
        yield expr.fn
    if isinstance(expr, Filled):
        yield from (helper_of(each) for each in expr.code.helpers)
    for child in children(expr) if not isinstance(expr, Value) else ():
        yield from helpers(child)


def replaced(expr: Any, to: Callable[[Value], Any]) -> Any:
    """The expression with other expressions for the values that it reads."""
    match expr:
        case Value():
            return to(expr)
        case Call():
            args, options = replaced(expr.args, to), tuple((k, replaced(v, to)) for k, v in expr.options)
            return Call(expr.fn, args, options)
        case tuple():
            return tuple(replaced(each, to) for each in expr)
        case list():
            return [replaced(each, to) for each in expr]
        case Pointwise():
            return Pointwise(expr.expr, tuple((s, replaced(e, to)) for s, e in expr.args))
        case Filled():
            return Filled(expr.code, tuple((h, replaced(e, to)) for h, e in expr.holes))
        case Lambda():
            own = set(expr.params)
            return Lambda(expr.params, replaced(expr.body, lambda v: v if v in own else to(v)))
        case Rounds():
            args = tuple((replaced(each, to), axis) for each, axis in expr.args)
            return replace(expr, args=args, begin=replaced(expr.begin, to))
        case Of():
            return Of(expr.body, replaced(expr.args, to))
    return expr
