"""A rule at concrete shapes: its formulas as diagrams over the runtime values of one call.

equations = bind(rule, {"input": axes, "weight": axes, "bias": None}, names, output, output_axes, where).equations
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeVar

from ..diagram.core import BATCH, Delta, Diagram, Leg, Map, Product, Size, Tensor, leaves, summed_legs
from ..diagram.jacobian import Jacobian, Unit
from ..errors import RuleError, UnsupportedError
from .code import Code, Hole, Native, Nth, check, holes_of
from .code.helper import Helper
from .expand import Expander
from .inside import check_inside
from .parse import RESERVED, parse_access, parse_expression, parse_legs, parse_program
from .rule import Rule
from .solve import Axes, solve
from .syntax import Access, Factors, Index, Line, Node, accesses, mixing, nearest, selects

__all__ = ["Axes", "BoundRule", "Equation", "Saved", "bind", "output_axes"]

T = TypeVar("T")
COTANGENT, COTANGENTS, NOISE, CURVATURE, HESSIAN_ROOT = ":cotangent :cotangents :noise :curvature :hessian_root".split()
"""Holes of bound code that no runtime value has the name of."""


@dataclass(frozen=True)
class Equation:
    """One line of a rule, over runtime values.

    name       the value it defines; the last equation defines the call's output, line `x` is "{output}:x"
    legs       the legs of the value, row-major
    diagram    the formula; None where only Jacobians are declared
    jacobians  declared ones, by runtime value name of the operand (only on the last equation)
    units      the axes of size 1 of the operands of the formula, by the same
    """

    name: str
    legs: tuple[Leg, ...]
    diagram: Diagram | None
    jacobians: Mapping[str, Jacobian]
    units: Mapping[str, tuple[Unit, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A tensor that the forward keeps: torch code whose holes are runtime values."""

    name: str
    legs: tuple[Leg, ...]
    shape: tuple[Size, ...]
    code: Code


@dataclass(frozen=True)
class BoundRoot:
    """The root of a loss's rule (`Root`) over runtime values, and `NOISE` in the sample."""

    columns: int
    code: Code
    sample: Code
    mixes: tuple[int, ...] = ()
    elementwise: Code = Code()  # noqa: RUF009
    by_position: bool = False

    def noise_shape(self, output: tuple[T, ...]) -> tuple[T, ...]:
        """That of the noise of one column, at an output of this shape."""
        return tuple(size for k, size in enumerate(output) if not self.by_position or k not in self.mixes)


@dataclass(frozen=True)
class BoundRule:
    """A rule for one call. The holes of code are runtime values, and `COTANGENT` or `COTANGENTS` in a vjp.

    legs  runtime value name of an operand -> its legs where the rule reads it first (row-major; the image leg
          where it is index arithmetic)
    """

    equations: tuple[Equation, ...]
    saved: tuple[Saved, ...]
    forward: Code
    vjp: Mapping[str, Native]
    kinks: str
    legs: Mapping[str, tuple[Leg, ...]]
    root: BoundRoot | None = None
    draw: Code = Code()  # noqa: RUF009
    fallback: str = ""  # where only VJPs are known: the call, for the report
    looped: frozenset[str] = frozenset()  # operands to which vmap of its VJP would be wrong
    divisor: str = ""  # the saved value that a loss is divided by besides N
    backward: Mapping[str, Native] = field(default_factory=dict)

    @property
    def by_formula(self) -> BoundRule:
        """Without native code that gives values of lines: what reads them can be differentiated again."""
        lines = {equation.name for equation in self.equations[:-1]}
        if not any(saved.name in lines for saved in self.saved):
            return self
        read = {name for e in self.equations if e.diagram is not None for name in leaves(e.diagram)} - lines
        saved = tuple(each for each in self.saved if each.name in read)
        return replace(self, saved=saved, forward=Code(), vjp=MappingProxyType({}), backward={})


def bind(
    rule: Rule | str,
    operands: Mapping[str, Axes | None],
    names: Mapping[str, str],
    output: str,
    output_axes: Axes,
    where: str,
    own: bool = False,
) -> BoundRule:
    """Bind a rule to the shapes and value names of one call.

    operands     operand name -> its axes as row-major factors, None: absent
    names        operand name -> runtime value name
    output       runtime value name of the output, with its axes
    where        the call, for messages
    own          the text is by hand: a sum that looks like a slip is refused

    Raises `RuleError` (with a caret) where the text is wrong or does not fit the shapes, `UnsupportedError`
    where it mixes samples.
    """
    if isinstance(rule, str):
        rule = Rule(formula=rule)
    with _placed(where):
        binder = _Binder(rule, operands, names, output, output_axes, where)
        bound = binder.bind()
        if own:
            binder.check_slips(bound.equations)
        return bound


def output_axes(rule: Rule, operands: Mapping[str, Axes | None], where: str) -> Axes:
    """The axes that the formula gives its output, where nothing else says them; the same errors as `bind`."""
    with _placed(where):
        binder = _Binder(rule, operands, {name: name for name in operands}, "output", None, where)
        return tuple((size,) for size in binder.legs.shape(binder.lines[-1].left.items))


@contextmanager
def _placed(where: str) -> Iterator[None]:
    """Errors in the text say which call it is the rule of."""
    try:
        yield
    except RuleError as error:
        place = f"in the rule of {where}"
        raise RuleError(error.what, error.text, error.column, "\n".join(filter(None, (error.hint, place)))) from None


class _Binder:
    def __init__(
        self,
        rule: Rule,
        operands: Mapping[str, Axes | None],
        names: Mapping[str, str],
        output: str,
        output_axes: Axes | None,
        where: str,
    ) -> None:
        self.rule, self.output, self.where = rule, output, where
        self.lines = parse_program(rule.formula) if rule.formula.strip() else ()
        if not self.lines and not rule.jacobian and not rule.forward:
            raise RuleError("the rule has neither formula nor jacobian", hint="give one of them")
        self.helpers = tuple(map(Helper.of, rule.functions))
        named = [(parse_access(key), code) for key, code in rule.saved.items() if "[" in key]
        self.saved = {access.tensor: (access, code) for access, code in named}
        self.opaque = tuple(key for key in rule.saved if "[" not in key)
        self.jacobian = {name: parse_expression(text) for name, text in rule.jacobian.items()}
        self.declared = {name: parse_legs(name, text) for name, text in rule.legs.items()}
        self.absent = frozenset(name for name, axes in operands.items() if axes is None)
        self.axes = {name: axes for name, axes in operands.items() if axes is not None}
        lines = [line.left.tensor for line in self.lines[:-1]]
        own = lines + [name for name in self.saved if name not in lines]  # a line may be saved by native code
        self.own = tuple(own)
        self.names = {name: names[name] for name, axes in operands.items() if axes is not None}
        self.names |= {name: f"{output}:{name}" for name in (*own, *self.opaque)} | {"output": output}
        self._check_names(operands)
        if output_axes is not None:
            self.axes["output"] = output_axes
        unknown = own if output_axes is not None else [*own, "output"]
        self.legs = solve(self._uses(), self.axes, unknown, rule.constants, where)
        self.expander = Expander(self.legs, rule.constants, self.names, self.absent)

    def bind(self) -> BoundRule:
        equations = [self._equation(line) for line in self.lines[:-1]]
        equations.append(self._output())
        self._refuse_mixing(equations)
        saved = tuple(self._saved(key, code) for key, code in self.rule.saved.items())
        return BoundRule(
            tuple(equations),
            saved,
            self._code(self.rule.forward),
            self._pulled(self.rule.vjp, "cotangent", "cotangents"),
            self.rule.kinks,
            self._operand_legs(),
            self._root(),
            self._code(self.rule.draw, "noise"),
            "" if self.lines or self.rule.jacobian else self.where,
            divisor=self.names.get(self.rule.divisor, ""),
            backward=self._pulled(self.rule.backward, "cotangent"),
        )

    def _check_names(self, operands: Mapping[str, Axes | None]) -> None:
        """Every tensor of the text is an operand, a line, saved, or (in a Jacobian) the output."""
        for name in self.own:
            if name in operands or self.own.count(name) > 1 or name in RESERVED:
                raise RuleError(f"'{name}' is an operand or defined twice: a line or saved tensor needs another name")
        known = set(operands) | set(self.own)
        texts = [(line.right, known) for line in self.lines]
        texts += [(node, known | {"output"}) for node in self.jacobian.values()]
        for node, allowed in texts:
            for access in accesses(node):
                if access.tensor not in allowed | {"delta"}:
                    raise access.place.error(f"unknown tensor '{access.tensor}'", nearest(access.tensor, allowed))
        for kind, names, allowed in (
            ("jacobian", self.jacobian, set(operands)),
            ("vjp", _names(", ".join(self.rule.vjp)), set(operands)),
            ("backward", _names(", ".join(self.rule.backward)), set(operands)),
            ("legs", self.declared, known | {"output"}),
            ("divisor", [*filter(None, [self.rule.divisor])], set(self.saved)),
        ):
            for name in names:
                if name not in allowed:
                    raise RuleError(f"{kind} names '{name}', which is no operand", hint=nearest(name, allowed))

    def _saved(self, key: str, code: str) -> Saved:
        """A saved tensor with its legs, or a value that only other code reads (a tuple of outputs, say)."""
        if key in self.opaque:
            return Saved(self.names[key], (), (), self._code(code))
        access = parse_access(key)
        legs, shape = self.legs.flat(access.items), self.legs.shape(access.items)
        return Saved(self.names[access.tensor], legs, shape, self._code(code))

    def _uses(self) -> Iterator[Access]:
        """Every access of the rule that says something about legs."""
        nodes: list[Node] = []
        for line in self.lines:
            yield line.left
            nodes.append(line.right)
        yield from (access for access, _ in self.saved.values())
        yield from (access for name, access in self.declared.items() if name not in self.absent)
        nodes += [node for name, node in self.jacobian.items() if name not in self.absent]
        for node in nodes:
            yield from (access for access in accesses(node) if access.tensor not in self.absent)
            for select in selects(node):
                yield Access("select", (*select.choice, *select.near), select.place)

    def _equation(self, line: Line, jacobians: Mapping[str, Jacobian] = MappingProxyType({})) -> Equation:
        legs = self.legs.flat(line.left.items)
        diagram = self.expander.diagram(line.right, legs)
        self._check_left(line, diagram)
        return Equation(self.names[line.left.tensor], legs, diagram, MappingProxyType(dict(jacobians)))

    def _check_left(self, line: Line, diagram: Diagram) -> None:
        """A leg only on the left next to a leg only on the right is a slip; alone it is an expansion."""
        right = {leg: None for product in diagram.products for leg in product.legs}
        lonely = [leg for leg in right if leg not in diagram.legs and leg in self.legs.all and leg.size != 1]
        for item in line.left.items:
            for leg in self.legs.flat((item,)):
                if leg not in right and leg.size != 1 and lonely:
                    hint = nearest(leg.name, (lone.name for lone in lonely))
                    what = f"leg '{leg}' is only on the left, and {', '.join(map(str, lonely))} only on the right"
                    raise item.place.error(what, hint)

    def check_slips(self, equations: tuple[Equation, ...]) -> None:
        """A leg that one factor sums alone, next to one of its size that only others sum, is a slip of the pen."""
        for line, equation in zip(self.lines, equations, strict=bool(self.lines)):
            check_inside(line, self.legs)
            for product in equation.diagram.products if equation.diagram else ():
                for leg, other in _slips(product, equation.legs):
                    if leg in self.legs.all and other in self.legs.all:
                        raise self._slip(line, leg, other)

    def _slip(self, line: Line, leg: Leg, other: Leg) -> RuleError:
        """The error, where the leg stands."""
        for access in accesses(line.right):
            for item in access.items:
                if leg in (self.legs.flat((item,)) if isinstance(item, Factors) else ()):
                    what = f"leg '{leg}' is summed in '{access.tensor}' alone: no other factor has it"
                    hint = f"did you mean '{other}'? If not, sum it in a line of its own"
                    return item.place.error(what, hint)
        raise AssertionError(leg)

    def _output(self) -> Equation:
        jacobians: dict[str, Jacobian] = {}
        for name, node in self.jacobian.items():
            if name in self.absent:
                continue
            if self.names[name] in jacobians:
                raise UnsupportedError(f"{self.where}: '{self.names[name]}' is two operands with declared Jacobians")
            jacobians[self.names[name]] = self._jacobian(name, node)
        if self.lines:
            return self._equation(self.lines[-1], jacobians)
        return Equation(self.output, self._declared("output"), None, MappingProxyType(jacobians))

    def _jacobian(self, name: str, node: Node) -> Jacobian:
        """The declared Jacobian; a leg that operand and output share means a delta."""
        out, into = self._declared("output"), self._declared(name)
        diagram = self.expander.diagram(node, out + tuple(leg for leg in into if leg not in out))
        taken = {leg.name for product in diagram.products for leg in product.legs} | {leg.name for leg in out + into}
        fresh: dict[Leg, Leg] = {}
        for leg in into:
            new = leg.name + "'"
            while new in taken:
                new += "'"
            taken.add(new)
            fresh[leg] = Leg(new, leg.size)
        deltas = tuple(Delta((leg, fresh[leg])) for leg in into if leg in out)
        renamed = diagram.rename({leg: fresh[leg] for leg in into if leg not in out})
        products = tuple(Product(p.scale, p.operands + deltas) for p in renamed.products)
        ends = tuple(fresh[leg] for leg in into)
        return Jacobian(Diagram(out + ends, products), out, ends)

    def _declared(self, name: str) -> tuple[Leg, ...]:
        """The legs of an operand or the output, as declared or as the formula has them."""
        access = self.declared.get(name) or self._first_access(name)
        if access is None or any(isinstance(item, Index) for item in access.items):
            raise RuleError(f"the legs of '{name}' are not known", hint=f'declare legs={{"{name}": "n, …"}}')
        legs = self.legs.flat(access.items)
        if len(set(legs)) != len(legs):
            raise RuleError(f"the legs of '{name}' are not distinct: {access}")
        return legs

    def _first_access(self, name: str) -> Access | None:
        if name == "output":
            return self.lines[-1].left if self.lines else None
        nodes = [line.right for line in self.lines] + list(self.jacobian.values())
        return next((a for node in nodes for a in accesses(node) if a.tensor == name), None)

    def _operand_legs(self) -> Mapping[str, tuple[Leg, ...]]:
        found: dict[str, tuple[Leg, ...]] = {}
        for name in self.axes:
            access = self.declared.get(name) or self._first_access(name)
            if access is not None and name != "output":
                found.setdefault(self.names[name], self.expander.access(access)[0].legs)
        return MappingProxyType(found)

    def _refuse_mixing(self, equations: list[Equation]) -> None:
        """A sum over the batch must not reach a value that has the batch."""
        summed: set[str] = set()
        for equation in equations:
            if equation.diagram is None:
                continue
            over_batch = any(BATCH in summed_legs(p, equation.legs) for p in equation.diagram.products)
            tainted = summed.intersection(leaves(equation.diagram))
            if BATCH in equation.legs and tainted:
                raise mixing(self.where, f"'{min(tainted)}' is a sum over the batch")
            if over_batch or tainted:
                summed.add(equation.name)

    def _pulled(self, codes: Mapping[str, str], *given: str) -> Mapping[str, Native]:
        """Native VJPs by runtime value; none for a value that is two operands."""
        found: dict[str, Native] = {}
        for key, code in codes.items():
            bound, names = self._code(code, *given), _names(key)
            for k, name in enumerate(names):
                if name not in self.absent and list(self.names.values()).count(self.names[name]) == 1:
                    found[self.names[name]] = Nth(bound, k) if len(names) > 1 else bound
        return MappingProxyType(found)

    def _root(self) -> BoundRoot | None:
        root = self.rule.root
        if root is None:
            return None
        code, sample = self._code(root.code, "curvature"), self._code(root.sample, "noise", "curvature")
        return BoundRoot(root.columns, code, sample, root.mixes, self._code(root.elementwise), root.by_position)

    def _code(self, code: str, *kept: str) -> Code:
        """Torch code with runtime values in its holes, and None for what is absent; those of `kept` are not merged."""
        check(code, frozenset(self.names), frozenset(helper.name for helper in self.helpers))
        to: dict[str, Hole | str] = {}
        for name, place in holes_of(code):
            if name not in self.names and name not in (*kept, *self.absent):
                known = [*self.names, *self.absent, *kept]
                raise RuleError(f"unknown tensor '{name}' in the code", code, place, nearest(name, known))
            own = Hole(f":{name}" if name in kept else self.names.get(name, name))
            to[name] = "None" if name in self.absent and name not in kept else own
        return Code.parsed(code).calling(self.helpers).with_holes(to)


def _names(key: str) -> list[str]:
    """The operands that native code is by."""
    return [name.strip() for name in key.split(",") if name.strip()]


def _slips(product: Product, kept: tuple[Leg, ...]) -> Iterator[tuple[Leg, Leg]]:
    reads = [read for op in product.operands for read in (op.args if isinstance(op, Map) else (op,))]
    summed = [leg for leg in summed_legs(product, kept) if leg.size != 1]
    for leg in summed:
        holders = [read for read in reads if leg in read.legs]
        if len(holders) == 1 and isinstance(holders[0], Tensor):
            name = holders[0].name
            mine = {own for read in reads if isinstance(read, Tensor) and read.name == name for own in read.legs}
            yield from ((leg, other) for other in summed if other.size == leg.size and other not in mine)
