"""From the syntax tree of an expression to a sum of products of operands.

Sums that are factors are multiplied out; a nonlinear function of accesses becomes one `Map`; index
arithmetic becomes a `Window` on a fresh image leg, a leg twice in one access a `Delta`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product as pairs
from numbers import Real

import sympy

from ..diagram.core import (
    Delta,
    Diagram,
    Leg,
    Map,
    N,
    Operand,
    Product,
    Selection,
    Size,
    Tensor,
    Window,
    argument,
    ordered_union,
)
from ..diagram.functions import exact, power
from .parse import FUNCTIONS
from .solve import Legs
from .syntax import Access, Apply, Factors, Index, Name, Node, Number, Rest, Select, accesses, mixing, nearest, selects

_RELATIONS = {"<": sympy.Lt, "<=": sympy.Le, ">": sympy.Gt, ">=": sympy.Ge, "==": sympy.Eq, "!=": sympy.Ne}
_ARITHMETIC: dict[str, Callable[..., sympy.Basic]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "**": power, "neg": operator.neg,
}  # fmt: skip


@dataclass(frozen=True)
class _Term:
    """A product under construction; `absent` names an optional operand that is a factor of it."""

    scale: sympy.Expr
    operands: tuple[Operand, ...] = ()
    absent: str = ""

    def times(self, other: _Term) -> _Term:
        operands = self.operands + other.operands
        shape = [op for op in operands if isinstance(op, Window | Delta)]  # 0 or 1: once is enough
        values = [op for op in operands if not isinstance(op, Window | Delta)]
        return _Term(self.scale * other.scale, (*values, *dict.fromkeys(shape)), self.absent or other.absent)


@dataclass
class _Arguments:
    """The tensors inside one map and the windows and deltas that go with it."""

    tensors: list[Tensor] = field(default_factory=list)
    shape: dict[Operand, None] = field(default_factory=dict)

    def symbol(self, tensor: Tensor) -> sympy.Symbol:
        if tensor not in self.tensors:
            self.tensors.append(tensor)
        return argument(self.tensors.index(tensor))


@dataclass
class Expander:
    """Expands the expressions of one rule.

    names   tensor of the text -> runtime value name; absent: optional operands that are None
    kept    the legs that the expression at hand is not summed over
    """

    legs: Legs
    constants: Mapping[str, object]  # numbers, or sizes that contain the batch
    names: Mapping[str, str]
    absent: frozenset[str]
    kept: tuple[Leg, ...] = ()
    images: dict[tuple[object, ...], Leg] = field(default_factory=dict)

    def diagram(self, node: Node, legs: tuple[Leg, ...]) -> Diagram:
        """The expression as a diagram with output legs `legs`."""
        self.kept = legs
        terms = self.fused(node) or self.expand(node)
        products = []
        for term in terms:
            others = [op for op in term.operands if isinstance(op, Tensor | Map | Selection)]
            if term.absent and others:
                what = f"'{term.absent}' is absent, but a factor of a term with {others[0]}"
                raise node.place.error(what, "write the formula without it")
            if not term.absent and term.scale != 0:
                products.append(Product(term.scale, term.operands))
        if not products and any(term.absent for term in terms):
            raise node.place.error("nothing is left: every term has an absent operand")
        return Diagram(legs, tuple(products))

    def fused(self, node: Node) -> list[_Term]:
        """A nonlinear function of a single read is one map, however it is written; [] for all others."""
        reads = set(accesses(node))
        if len(reads) != 1 or next(selects(node), None) is not None:
            return []
        (read,) = reads
        if read.tensor == "delta" or read.tensor in self.absent:
            return []
        if not set(self.access(read)[0].legs) <= set(self.kept):
            return []
        terms = self.map(node)
        (operand,) = terms[0].operands or (None,)
        if not isinstance(operand, Map):
            return []
        x = argument(0)
        linear = operand.expr.is_polynomial(x) and sympy.degree(operand.expr, x) <= 1
        return [] if linear else terms

    def expand(self, node: Node) -> list[_Term]:
        """The sum of products that the expression is."""
        match node:
            case Number():
                return [_Term(node.value)]
            case Name():
                value = self.constant(node)
                if value.is_infinite:
                    raise node.place.error(f"'{node.name}' is infinite: it may only be compared with")
                return [_Term(value)]
            case Access(tensor="delta"):
                return [_Term(sympy.Integer(1), self.delta(node))]
            case Access():
                if node.tensor in self.absent:
                    return [_Term(sympy.Integer(1), (), node.tensor)]
                tensor, shape = self.access(node)
                return [_Term(sympy.Integer(1), (tensor, *shape))]
            case Select():
                return [_Term(sympy.Integer(1), (self.select(node),))]
            case Apply(op="+", args=(left, right)):
                return self.expand(left) + self.expand(right)
            case Apply(op="-", args=(left, right)):
                return self.expand(left) + self.scaled(right, -1)
            case Apply(op="neg", args=(inner,)):
                return self.scaled(inner, -1)
            case Apply(op="*", args=(left, right)):
                return self.multiply(self.expand(left), self.expand(right), node)
            case Apply(op="/", args=(left, right)):
                one = Number(sympy.Integer(1), right.place)
                return self.multiply(self.expand(left), self.map(Apply("/", (one, right), right.place)), node)
            case Apply(op="**", args=(base, Number(value=value))) if value == 1:
                return self.expand(base)
            case _:
                return self.map(node)

    def scaled(self, node: Node, by: int) -> list[_Term]:
        return [_Term(by * t.scale, t.operands, t.absent) for t in self.expand(node)]

    def multiply(self, left: list[_Term], right: list[_Term], node: Apply) -> list[_Term]:
        """Multiply out. The terms must agree in what they sum, or a bracket would mean two things."""
        terms = [a.times(b) for a, b in pairs(left, right)]
        sums = [{leg.name for leg in self.summed(t) if leg.size != 1} for t in terms if not t.absent]
        for other in sums[1:]:
            if other != sums[0]:
                shown = ", ".join(sorted(other ^ sums[0]))
                what = f"the terms of this bracket do not all sum over {shown}"
                raise node.place.error(what, "write the bracket as a line of its own, or multiply it out")
        return terms

    def summed(self, term: _Term) -> tuple[Leg, ...]:
        return tuple(leg for leg in ordered_union(*(op.legs for op in term.operands)) if leg not in self.kept)

    def constant(self, node: Name) -> sympy.Expr:
        """A constant of the rule, or the size of a leg."""
        if node.name in self.constants:
            value = self.constants[node.name]
            if isinstance(value, sympy.Expr):
                return value
            if isinstance(value, bool) or not isinstance(value, Real) or value != value:
                raise node.place.error(f"the constant '{node.name}' is {value!r}, not a number")
            return exact(value)
        if node.name in ("pi", "inf"):
            return sympy.pi if node.name == "pi" else sympy.oo
        size = self.legs.size(node.name)
        if size is not None:
            return size
        if node.name in self.names or node.name in self.absent:
            raise node.place.error(f"tensor '{node.name}' needs its legs", f"write {node.name}[…]")
        sizes = [leg.lstrip("*").upper() for leg in self.legs.of_name] + [s.upper() for s in self.legs.stars]
        give = f"or give it: tn.Rule(…, constants={{'{node.name}': …}})"
        hint = nearest(node.name, [*self.constants, *sizes])
        raise node.place.error(f"unknown constant '{node.name}'", f"{hint}\n{give}")

    def access(self, node: Access) -> tuple[Tensor, tuple[Operand, ...]]:
        """The tensor on its legs, and the windows and deltas that its indices need."""
        if any(isinstance(item, Rest) for item in node.items):
            return Tensor(self.names[node.tensor], self.legs.flat(node.items)), ()
        found: list[Leg] = []
        shape: list[Operand] = []
        for axis, item in enumerate(self.legs.items(node.items)):
            legs, windows = self.axis(node, axis, item)
            for leg in legs:
                if leg in found:
                    twin = self.image((node.tensor, axis, leg), leg.name, leg.size)
                    shape.append(Delta((leg, twin)))
                    leg = twin
                found.append(leg)
            shape += windows
        return Tensor(self.names[node.tensor], tuple(found)), tuple(shape)

    def axis(self, node: Access, axis: int, item: Factors | Index) -> tuple[tuple[Leg, ...], tuple[Window, ...]]:
        """The legs of one axis of an access, with the window where it is index arithmetic."""
        if isinstance(item, Factors):
            return tuple(leg for name in item.names for leg in self.legs.of_name[name]), ()
        size = self.legs.axis_size(node.tensor, axis)
        if size is None:
            raise item.place.error(f"the size of axis {axis} of '{node.tensor}' is not known")
        terms, offset = self.affine(item)
        if offset == 0 and len(terms) == 1 and terms[0][0] == 1 and terms[0][1].size == size:
            return (terms[0][1],), ()
        positions = [leg.name for _, leg in terms if leg in self.kept] or [leg.name for _, leg in terms]
        word = positions[0] if positions else axis
        leg = self.image((node.tensor, axis, terms, offset), f"{node.tensor}_{word}", size)
        return (leg,), (Window(leg, terms, offset),)

    def image(self, key: tuple[object, ...], name: str, size: Size) -> Leg:
        """The fresh leg for `key`, always the same one."""
        if key not in self.images:
            taken = {leg.name for leg in self.legs.all}
            taken |= {leg.name for leg in self.images.values()}
            while name in taken:
                name += "_"
            self.images[key] = Leg(name, size)
        return self.images[key]

    def affine(self, item: Index) -> tuple[tuple[tuple[int, Leg], ...], int]:
        """Coefficients and offset of an affine index."""
        coefficients = self.linear(item.expr)
        offset = coefficients.pop("", 0)
        terms = []
        for name, coefficient in coefficients.items():
            legs = self.legs.of_name[name]
            if any(leg.size == N or not isinstance(leg.size, int) for leg in legs):
                raise mixing(self.legs.where, f"the index {item} uses the batch leg '{name}'")
            if coefficient:
                terms.append((coefficient, legs[0]))
        return tuple(terms), offset

    def linear(self, node: Node) -> dict[str, int]:
        """Leg name -> integer coefficient; the offset is under ''."""
        match node:
            case Name(name=name) if name in self.legs.of_name and name not in self.constants:
                return {name: 1}
            case Number() | Name():
                value = node.value if isinstance(node, Number) else self.constant(node)
                if not value.is_Integer:
                    raise node.place.error(f"an index has integer coefficients, not {value}")
                return {"": int(value)}
            case Apply(op="neg", args=(inner,)):
                return {name: -c for name, c in self.linear(inner).items()}
            case Apply(op="+" | "-" as op, args=(left, right)):
                total = self.linear(left)
                for name, c in self.linear(right).items():
                    total[name] = total.get(name, 0) + (c if op == "+" else -c)
                return total
            case Apply(op="*", args=(left, right)):
                a, b = self.linear(left), self.linear(right)
                if set(b) == {""}:
                    a, b = b, a
                if set(a) != {""}:
                    raise node.place.error("the index is not affine: legs are multiplied")
                return {name: a[""] * c for name, c in b.items()}
            case _:
                raise node.place.error("the index is not affine", "only + - * with integers")

    def delta(self, node: Access) -> tuple[Operand, ...]:
        """delta[a, b], or delta[a, affine index] as a window on a."""
        items = self.legs.items(node.items)
        if len(items) != 2:
            raise node.place.error(f"delta takes two legs, {len(items)} given")
        if isinstance(items[0], Index):
            items.reverse()
        first, second = items
        if isinstance(first, Index):
            raise node.place.error("one side of a delta must be a leg")
        left = self.legs.flat((first,))
        if isinstance(second, Factors):
            right = self.legs.flat((second,))
            if tuple(leg.size for leg in left) != tuple(leg.size for leg in right):
                raise node.place.error(f"the sides of {node} differ in size")
            return tuple(Delta((a, b)) for a, b in zip(left, right, strict=True))
        if len(left) != 1 or left[0].size == N:
            raise node.place.error(f"'{first}' cannot be the image of an index")
        return (Window(left[0], *self.affine(second)),)

    def select(self, node: Select) -> Selection:
        choice = self.legs.flat(node.choice)
        if any(leg.size == N for leg in choice):
            raise mixing(self.legs.where, "select runs over the batch")
        if node.index.tensor in self.absent:
            raise node.place.error(f"'{node.index.tensor}' is absent but selects")
        tensor, shape = self.access(node.index)
        if shape:
            raise node.index.place.error("the index of a select has plain legs only")
        near = (self.near(leg, item, tensor.legs) for leg, item in zip(choice, node.near, strict=bool(node.near)))
        return Selection(tensor, choice, tuple(near))

    def near(self, choice: Leg, item: Index, index: tuple[Leg, ...]) -> Window:
        """Where a choice lies: the index's own legs come first, and the others are in no formula."""
        terms, offset = self.affine(item)
        own = tuple((c, leg) for c, leg in terms if leg in index)
        free = tuple((c, Leg(f"{leg}°", leg.size)) for c, leg in terms if leg not in index)
        return Window(choice, (*own, *free), offset)

    def map(self, node: Node) -> list[_Term]:
        """A nonlinear expression as one map (or a number, if it reads no tensor)."""
        arguments = _Arguments()
        expr = sympy.sympify(self.scalar(node, arguments))
        if expr.has(sympy.zoo, sympy.nan, sympy.oo, -sympy.oo):
            raise node.place.error("the value is not finite: a constant in it is infinite, or it divides by zero")
        used = [k for k in range(len(arguments.tensors)) if argument(k) in expr.free_symbols]
        renumbered = expr.xreplace({argument(k): argument(position) for position, k in enumerate(used)})
        tensors = tuple(arguments.tensors[k] for k in used)
        for tensor in arguments.tensors:
            lost = [leg for leg in tensor.legs if leg not in self.kept + ordered_union(*(t.legs for t in tensors))]
            if tensor not in tensors and lost:
                raise node.place.error(f"the value does not depend on {tensor}, but is summed over {lost[0]}")
        shape = tuple(arguments.shape)
        if not tensors and not shape:
            return [_Term(expr)]
        self.check_outside(node, renumbered, tensors, shape)
        value: Operand = tensors[0] if renumbered == argument(0) else Map(renumbered, tensors)
        return [_Term(sympy.Integer(1), (value, *shape)) if tensors else _Term(expr, shape)]

    def check_outside(
        self, node: Node, expr: sympy.Expr, tensors: tuple[Tensor, ...], shape: tuple[Operand, ...]
    ) -> None:
        """A map of a padded read must be 0 where the read is outside, for that is what the window makes of it."""
        for window in shape:
            if not isinstance(window, Window) or not leaves_image(window):
                continue
            zero = {argument(k): 0 for k, t in enumerate(tensors) if window.image in t.legs}
            if sympy.simplify(expr.subs(zero)) != 0:
                what = f"a read outside of {window.image} is 0, but the function of it is not"
                raise node.place.error(what, "pad in a line of its own")

    def scalar(self, node: Node, arguments: _Arguments) -> sympy.Basic:
        """The expression in sympy, accesses as x0, x1, …"""
        match node:
            case Number():
                return node.value
            case Name():
                return self.constant(node)
            case Access() if node.tensor != "delta" and node.tensor not in self.absent:
                tensor, shape = self.access(node)
                arguments.shape |= dict.fromkeys(shape)
                return arguments.symbol(tensor)
            case Access() if node.tensor in self.absent:
                raise node.place.error(f"'{node.tensor}' is absent but inside a function")
            case Access() | Select():
                raise node.place.error("delta and select are factors, not arguments of a function")
            case Apply(op="if", args=(test, yes, no)):
                condition = self.condition(test, arguments)
                # only the branch that is taken may read: a constant condition leaves no trace of the other
                if condition in (sympy.true, sympy.false):
                    return self.scalar(yes if condition == sympy.true else no, arguments)
                return sympy.Piecewise((self.scalar(yes, arguments), condition), (self.scalar(no, arguments), True))
            case Apply(op=op, args=args) if op in FUNCTIONS:
                return FUNCTIONS[op][1](*(self.scalar(a, arguments) for a in args))
            case Apply(op=op, args=args) if op in _ARITHMETIC:
                return _ARITHMETIC[op](*(self.scalar(a, arguments) for a in args))
            case _:
                return sympy.Piecewise((1, self.condition(node, arguments)), (0, True))

    def condition(self, node: Node, arguments: _Arguments) -> sympy.Basic:
        """A comparison, or comparisons joined by and, or, not."""
        match node:
            case Apply(op="and" | "or" | "not" as op, args=args):
                tests = [self.condition(a, arguments) for a in args]
                return {"and": sympy.And, "or": sympy.Or, "not": sympy.Not}[op](*tests)
            case Apply(op=op, args=args) if op in _RELATIONS:
                return _RELATIONS[op](*(self.scalar(a, arguments) for a in args))
            case _:
                raise node.place.error("a condition is a comparison, as in input[*s] > 0")


def leaves_image(window: Window) -> bool:
    """Whether some position of the window lies outside of the image."""
    low = high = window.offset
    for coefficient, leg in window.terms:
        reach = coefficient * (int(leg.size) - 1)
        low, high = low + min(reach, 0), high + max(reach, 0)
    return bool(low < 0 or high >= int(window.image.size))
