"""Shared pieces of the rows: leg names, broadcast accesses, literals, refusals."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NoReturn

import sympy

from ...diagram.core import N
from ...errors import RuleError, UnsupportedError
from ...notation.rule import Constant, Rule

SPACE = {1: ("w",), 2: ("h", "w"), 3: ("d", "h", "w")}
"""Legs of the output positions of a convolution or a pool, by the number of space axes."""
KERNEL = {1: ("l",), 2: ("k", "l"), 3: ("j", "k", "l")}
"""Legs of the kernel positions."""
IMAGE = {1: ("x",), 2: ("y", "x"), 3: ("z", "y", "x")}
"""Legs of the input positions, where they are chosen and not computed."""
Row = Callable[[Any], Rule]
"""A row that always makes a `Rule`."""
Family = Callable[[Any, int], Rule]
"""A row with the number of space axes as a second argument."""
_LETTERS = [c for c in string.ascii_lowercase if c != "n"]


def refuse(call: Any, what: str, remedy: str) -> NoReturn:
    """Raise the error that names the call."""
    raise UnsupportedError(f"{call.where}: {what}.\n  {remedy}")


def axis(dim: int, rank: int) -> int:
    """A non-negative axis number."""
    return dim + rank if dim < 0 else dim


def per_axis(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """One int per space axis; a single one is for all of them."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def leg_names(value: Any, skip: str = "") -> list[str]:
    """One leg name per stored axis of a value; the batch axis is ``n``."""
    letters = iter([c for c in _LETTERS if c not in skip])
    return ["n" if factors == (N,) else next(letters) for factors in value.axes]


def join(legs: Sequence[str]) -> str:
    return ", ".join(legs)


def sizes(legs: Sequence[str]) -> str:
    """The number of elements as text: the product of the capital letters."""
    return " * ".join(leg.upper() for leg in legs) or "1"


def access(name: str, value: Any, target: Any, legs: Sequence[str]) -> str:
    """``name[…]`` aligned from the right with `target`; an axis that broadcasts gets a leg of size 1 of its own."""
    shift = len(legs) - len(value.axes)
    if shift < 0:
        raise ValueError(f"{name} has more axes than the result")
    items = []
    for k, size in enumerate(value.shape):
        spread = size == 1 and target.shape[k + shift] != 1
        items.append(f"u{k}" if spread else legs[k + shift])
    return f"{name}[{join(items)}]"


def broadcast_sizes(text: str) -> dict[str, Constant]:
    """The sizes of the legs of their own in an `access`, where no operand says them (saved tensors)."""
    return {leg.upper(): 1 for leg in re.findall(r"\bu\d+\b", text)}


def literal(number: Constant) -> str:
    """A number as text, exact where it is a short fraction; an infinite one, which may only be compared with."""
    if math.isinf(number):
        return "inf" if number > 0 else "(-inf)"
    if number != number:
        raise RuleError("a formula has no place for the number nan")
    fraction = Fraction(number)
    if fraction.denominator == 1:
        return f"({fraction})" if fraction < 0 else str(fraction)
    return f"({fraction})" if fraction.denominator <= 64 else f"({float(number)!r})"


def broadcast(template: str) -> Row:
    """A row that applies ``template`` ("{input} * {other}") elementwise to broadcast operands and numbers."""
    fields = tuple(dict.fromkeys(f for _, f, _, _ in string.Formatter().parse(template) if f))

    def row(call: Any) -> Rule:
        legs = leg_names(call.output)
        filled, constants = {}, {}
        for field in fields:
            value = call.arguments[field]
            if field in call.tensors:
                filled[field] = access(field, value, call.output, legs)
            elif isinstance(value, sympy.Expr):  # a size that contains the batch
                filled[field], constants[field] = field, value
            else:
                filled[field] = literal(value)
        return Rule(f"output[{join(legs)}] = " + template.format(**filled), constants=constants)

    return row


def chosen(condition: str, of: str = "{cotangents}") -> str:
    """Torch code for the cotangents where a condition holds, and 0 elsewhere, where a product has 0 times infinity.

    It takes several columns at once, as fast as a product is: torch's functions of masks are not.
    """
    return f"torch.ops.aten.threshold_backward({of}, ({condition}).to({of}.dtype), 0)"


def whole(call: Any, name: str) -> bool:
    """Whether an operand has the output's axes, so that its cotangent can be chosen from that of the output."""
    return name in call.tensors and call.tensors[name].axes == call.output.axes


def elementwise(
    function: str,
    *,
    derivative: str = "",
    vjp: str = "",
    kinks: str = "",
    arguments: Sequence[str] = (),
    constants: Mapping[str, Constant] | None = None,
) -> Row:
    """A row from a function of ``x``: its formula ``output[*s] = f(input[*s])``, none where the text is empty.

    `derivative` (of ``x`` and ``y``, the output) where a stable one is known; `arguments` are the arguments of
    the call that the texts name.
    """

    def row(call: Any) -> Rule:
        numbers = {name: call.arguments[name] for name in arguments}
        return Rule(
            f"output[*s] = {_apply(function)}" if function else "",
            jacobian={"input": _apply(derivative)} if derivative else {},
            legs={"input": "*s", "output": "*s"} if derivative else {},
            constants={**(constants or {}), **numbers},
            vjp={"input": _fill(vjp, numbers)} if vjp else {},
            kinks=kinks,
        )

    return row


def _apply(function: str) -> str:
    """The text with x and y replaced by accesses."""
    words = {"x": "input[*s]", "y": "output[*s]"}
    return "".join(words.get(word, word) for word in _words(function))


def _words(text: str) -> list[str]:
    found: list[str] = []
    for char in text:
        name = char.isalnum() or char == "_"
        if found and name and (found[-1][-1].isalnum() or found[-1][-1] == "_"):
            found[-1] += char
        else:
            found.append(char)
    return found


def _fill(code: str, numbers: Mapping[str, Any]) -> str:
    """The code with ``<name>`` replaced by the value of the argument; braces stay."""
    for name, value in numbers.items():
        finite = not isinstance(value, float) or math.isfinite(value)
        code = code.replace(f"<{name}>", repr(value) if finite else f"float('{value}')")
    return code


def for_rank(family: Family, count: int) -> Row:
    """The row of a 1d, 2d or 3d member of a family."""
    return lambda call: family(call, count)
