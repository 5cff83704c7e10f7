"""Sums that a reader may take to stand inside of a function: refused in a formula that is written by hand.

A leg that is not on the left is summed, and the sum goes over all of a term: `tanh(w[o, i] * x[n, i])` is the sum of
the tanh. Einstein's product `w[o, i] * x[n, i]` alone would be the sum over i, so both readings are plain; a line of
its own says which is meant. A function of a read, or of a difference of reads, has one reading.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..diagram.core import N
from ..errors import RuleError
from .parse import FUNCTIONS
from .solve import Legs, index_names
from .syntax import Access, Apply, Factors, Index, Line, Name, Node, Number, Select, Star, accesses

COMPARISONS = frozenset({"<", "<=", ">", ">=", "==", "!="})


def check_inside(line: Line, legs: Legs) -> None:
    """Raise `RuleError` where a product or a function with a leg that is summed is the argument of a function."""
    kept = tuple(_names(line.left))
    for node in _arguments(line.right, False):
        reads = [access for access in accesses(node) if access.tensor != "delta"]
        gone = dict.fromkeys(name for read in reads for name in _names(read) if name not in kept and _long(legs, name))
        if gone and not _each_sample(node, reads, kept, legs):
            raise _two_readings(line, node, kept, tuple(gone))


def _arguments(node: Node, inside: bool) -> Iterator[Apply]:
    """The products and functions that stand inside of a function, outermost first."""
    match node:
        case Apply(op="/", args=(left, right)):
            if inside and _reads(left) and _reads(right):
                yield node
            yield from _arguments(left, inside)
            yield from _arguments(right, True)
        case Apply(op=op, args=args):
            function = op in FUNCTIONS or op == "**"
            if inside and (function or (op == "*" and all(map(_reads, args)))):
                yield node
            for arg in args:
                yield from _arguments(arg, inside or function or op in COMPARISONS)
        case _:
            return


def _reads(node: Node) -> bool:
    return next(accesses(node), None) is not None


def _names(access: Access) -> Iterator[str]:
    """The names of the legs of an access, stars with theirs."""
    for item in access.items:
        match item:
            case Factors():
                yield from item.names
            case Star():
                yield str(item)
            case Index():
                yield from (name.name for name in index_names(item.expr))


def _long(legs: Legs, name: str) -> bool:
    """Whether a name is one of legs with more than one element: no constant, and nothing of size 1."""
    return any(leg.size != 1 for leg in legs.of_name.get(name, ()))


def _each_sample(node: Node, reads: list[Access], kept: tuple[str, ...], legs: Legs) -> bool:
    """A sum over the samples of functions of their values, as a loss is: it cannot stand inside."""
    batch = [name for name, found in legs.of_name.items() if any(leg.size == N for leg in found)]
    return bool(batch) and batch[0] not in kept and all(batch[0] in _names(read) for read in reads)


def _two_readings(line: Line, node: Apply, kept: tuple[str, ...], gone: tuple[str, ...]) -> RuleError:
    taken = {access.tensor for access in (line.left, *accesses(line.right))}
    name = next(letter for letter in ("h", "inner", "inner_") if letter not in taken)
    own = dict.fromkeys(n for access in accesses(node) for n in _names(access))
    left = ", ".join(n for n in kept if n in own)
    every = ", ".join([left, *gone] if left else gone)
    what = f"the sum over {', '.join(gone)} may be read as standing inside of the function, or around it"
    hint = f"write {name}[{left}] = {text(node)} on a line of its own, or {name}[{every}] = … if the function is summed"
    return node.place.error(what, hint)


def text(node: Node) -> str:
    """The expression as text."""
    match node:
        case Number(value=value):
            return str(value)
        case Name(name=name):
            return name
        case Access():
            return str(node)
        case Select():
            return f"select({node.index}, {', '.join(map(str, node.choice))})"
        case Apply(op="neg", args=(inner,)):
            return f"-{_bracketed(inner)}"
        case Apply(op="not", args=(inner,)):
            return f"not {_bracketed(inner)}"
        case Apply(op="if", args=(test, yes, no)):
            return f"{text(yes)} if {text(test)} else {text(no)}"
        case Apply(op=op, args=args) if op in FUNCTIONS:
            return f"{op}({', '.join(map(text, args))})"
        case Apply(op="**", args=args):
            return "**".join(map(_bracketed, args))
        case Apply(op=op, args=args):
            return f" {op} ".join(map(_bracketed, args))


def _bracketed(node: Node) -> str:
    plain = not isinstance(node, Apply) or node.op in FUNCTIONS
    return text(node) if plain else f"({text(node)})"
