"""One function of a generated file: its arguments are what it reads."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum
from types import MappingProxyType

import sympy
import torch

from ...compiler.emit.layout import Doc, Group, laid
from ...compiler.emit.naming import TAKEN, Scope
from ...compiler.emit.printer import Printer, data
from ...compiler.emit.source import small, words, written
from ...compiler.explain.polynomials import Symbols
from ...compiler.explain.text import body_text, legs_text
from ...compiler.plan.plan import Plan
from ...compiler.program.expr import Body, Expr, Value, helpers, reads, sizes_in
from ...compiler.program.lines import lines_of
from ...compiler.program.passes import passed
from ...compiler.running.drawing_calls import draws
from ...compiler.sweep.derived import Backward, Derived, Extraction, Given, Native
from ...compiler.translate.graph import Graph
from ...diagram.core import Diagram, N, Size, Tensor, V, hint_of, leaves
from ...errors import UnsupportedError
from ...notation.bind import COTANGENT as PULLED
from ...quantities import Quantity, Total
from ...quantities.propagation import COTANGENT
from .names import Names, cotangent_names
from .text import WIDTH, call, definition, docstring, rows

Tree = Expr | tuple[Expr, ...] | Mapping[str, Mapping[str, Expr | tuple[Expr, ...]]]
"""What a function returns: an expression, or a tuple or dictionaries of them."""
LARGEST = 4096
"""Elements of a constant that may stand in a file."""


@dataclass(frozen=True)
class Function:
    """A function of a generated file: statements with the last, lines of its text, the sources of what it calls."""

    name: str
    arguments: tuple[str, ...]
    body: tuple[str, ...]
    doc: tuple[str, ...] = field(default=())
    helpers: tuple[str, ...] = field(default=())

    @property
    def lines(self) -> list[str]:
        """The source."""
        return [*definition(self.name, self.arguments, self.body), *docstring(self.doc), *rows(self.body)]

    def call(self, values: Mapping[str, str]) -> Doc:
        """Code that calls it, given code for every argument."""
        return call(self.name, (values[name] for name in self.arguments))


@dataclass(frozen=True)
class Inputs:
    """What a function may read: value -> its shape, in the order of arguments, and constants by value."""

    shapes: Mapping[str, tuple[Size, ...]]
    constants: Mapping[str, torch.Tensor]
    floating: Sequence[str]
    names: Names


def function(
    name: str,
    plan: Plan,
    returns: Tree,
    inputs: Inputs,
    doc: Iterable[str] = (),
    more: Mapping[str, Value] = MappingProxyType({}),
    functions: Mapping[Body, str] = MappingProxyType({}),
) -> Function:
    """The steps of a plan as a function that returns an expression of their values (a tree of them).

    more       values that are arguments, too, by their name among the inputs
    functions  those next to it in the file
    """
    known = {value: plan.given[value] for value in (*inputs.shapes, *inputs.constants) if value in plan.given}
    known |= more
    read = {value for step in plan.steps for value in step.inputs} | set(reads(returns))
    arguments = [value for value in inputs.shapes if value in known and known[value] in read]
    constants = [value for value in inputs.constants if known[value] in read]
    needs_like = plan.like in read or bool(constants)
    floating = [value for value in inputs.floating if value in arguments]
    if needs_like and not floating:
        arguments = [value for value in inputs.shapes if value in arguments or value == inputs.floating[0]]
        floating = [inputs.floating[0]]
    shown = inputs.names.shown
    head: list[str] = []
    sizes = set().union(*(sizes_in(step.expr) for step in plan.steps), sizes_in(returns))
    for size in (N, V):
        if size in sizes:
            found = _axis_of(arguments, inputs, size) or _axis_of(inputs.shapes, inputs, size)
            if found is None:
                raise UnsupportedError(f"{name}: nothing that it may read has an axis of size {size}")
            arguments = [value for value in inputs.shapes if value in arguments or value == found[0]]
            head.append(f"    {size} = {shown(found[0])}.shape[{found[1]}]")
    head += [f"    like = {shown(floating[0])}"] if needs_like else []
    made = ((value, literal(value, inputs.constants[value])) for value in constants)
    head += [laid(f"    {hint_of(value)} = ", code, "", WIDTH) for value, code in made]
    fixed = {known[value]: shown(value) for value in (*arguments, *constants)} | {plan.like: "like"}
    every = {shown(value) for value in inputs.shapes} | set(fixed.values())
    called = {fn.name for step in plan.steps for fn in helpers(step.expr)} | set(functions.values())
    printer = Printer(Scope(TAKEN | every | called | words(plan.steps), names=fixed), functions, WIDTH)
    notes = {f"cotangent of {hint_of(value)}": f"cotangent of {name}" for value, name in inputs.names.of.items()}
    own_lines = (replace(line, note=notes.get(line.note, line.note)) for line in lines_of(plan.steps, functional=True))
    lines = written(passed(tuple(own_lines), small(set(reads(returns)))), printer)
    sources = dict.fromkeys(fn.source for step in plan.steps for fn in helpers(step.expr))
    own = tuple(shown(value) for value in arguments)
    body = (*head, *lines, printer.statement("    return ", returns))
    return Function(name, own, body, tuple(doc), tuple(sources))


def _axis_of(values: Iterable[str], inputs: Inputs, size: sympy.Symbol) -> tuple[str, int] | None:
    for value in values:
        for axis, own in enumerate(inputs.shapes[value]):
            if own == size:
                return value, axis
    return None


def literal(name: str, tensor: torch.Tensor) -> Doc:
    """Code for a constant tensor. Raises `UnsupportedError` where it is too large for a file."""
    if tensor.numel() > LARGEST:
        raise UnsupportedError(
            f"the constant {name} has {tensor.numel()} elements, too many for a source file.\n"
            "  Register it as a buffer of the model: then it is read from the state_dict."
        )
    dtype = "like.dtype" if tensor.is_floating_point() else tensor.dtype
    return Group("torch.tensor(", (data(tensor.tolist()), f"dtype={dtype}", "device=like.device"), ")")


def formulas(derived: Derived, diagrams: Sequence[tuple[str, Diagram]], names: Names, last: str = "") -> Iterator[str]:
    """The diagrams, and the cotangents that they read (and `last`), as formulas. What is handed in goes by its name."""
    swept = {item.name: item for schedule in derived.sweeps for item in schedule if isinstance(item, Backward)}
    inputs = {COTANGENT, *(c.variable for c in derived.columns if isinstance(c.start, Given))}
    only = {name: _tensor_of(item.terms[0]) for name, item in swept.items() if len(item.terms) == 1}
    handed = {name: tensor for name, tensor in only.items() if tensor in inputs}
    names = cotangent_names(names, swept.values())
    names = Names({**names.of, **{name: names.shown(tensor) for name, tensor in handed.items()}})
    wanted: dict[str, None] = {}

    def visit(name: str) -> None:
        if name in swept and name not in wanted and (name not in handed or name == last):
            for term in swept[name].terms:
                for leaf in leaves(term) if isinstance(term, Diagram) else (term.cotangent,):
                    visit(leaf)
            wanted[name] = None

    for leaf in [leaf for _, diagram in diagrams for leaf in leaves(diagram)] + [last] * bool(last):
        visit(leaf)
    terms = [(names.shown(name), term) for name in wanted for term in swept[name].terms]
    met: set[str] = set()
    for name, term in (*terms, *diagrams):
        yield _formula(name, term, names, "+=" if name in met else "=")
        met.add(name)


def _formula(name: str, term: Diagram | Native, names: Names, equals: str) -> str:
    """name[legs] = the diagram; or name = the code."""
    if isinstance(term, Diagram):
        return f"{name}[{legs_text(term.legs)}] {equals} {body_text(names.diagram(term), {})}"
    return f"{name} {equals} {term.code.filled(lambda hole: names.shown(term.cotangent if hole == PULLED else hole))}"


def _tensor_of(term: Diagram | Native) -> str:
    """The name of the tensor that the term is; "" where it is anything else."""
    if isinstance(term, Native) or len(term.products) != 1 or term.products[0].scale != 1:
        return ""
    operands = term.products[0].operands
    only = operands[0] if len(operands) == 1 else None
    return only.name if isinstance(only, Tensor) else ""


def refuse_unchecked(graph: Graph) -> None:
    """Raises `UnsupportedError` for what no file could check: operations that draw, shapes that buffers decide."""
    for name, _ in graph.fixed:
        raise UnsupportedError(
            f"forward makes numbers or shapes of the values of buffer {name!r}, and a file could not check that they "
            "are the same.\n  Give them to the module as numbers, or read the buffer with torch's functions alone."
        )
    for each in graph.calls:
        if draws(each.target, each.arguments):
            raise UnsupportedError(f"{each.where} is random, and a file could not be checked: call model.eval() first.")


def flops(plan: Plan) -> str:
    """FLOPs of a plan as a polynomial in the sizes of its legs, with its legend."""
    symbols = Symbols()
    terms = tuple(term for step, _ in plan.timed for term in step.work.flops)
    if not terms:
        return "no FLOPs"
    shown = symbols.text(symbols.polynomial(terms), plan.batch)
    return f"{shown} FLOPs" + (f" ({symbols.legend()})" if symbols.values else "")


def flops_of_many(plan: Plan) -> str:
    """The same for many results: a polynomial in N and V alone."""
    terms = [term for step, count in plan.timed for term in step.work.flops for _ in range(count)]
    total = sympy.expand(sympy.Add(*(c * sympy.Mul(*(leg.size for leg in legs)) for c, legs in terms)))
    shown = sympy.sstr(total).replace("**2", "²").replace("**3", "³").replace("*", "·")
    return f"{shown} FLOPs" if terms else "no FLOPs"


def asked(quantities: Sequence[Quantity]) -> str:
    """The quantities, with the options that are not what they are by default."""
    return ", ".join(_shown(quantity) for quantity in quantities) or "none"


def _shown(quantity: Quantity) -> str:
    options = [(f.name, getattr(quantity, f.name)) for f in fields(quantity) if getattr(quantity, f.name) != f.default]
    if isinstance(quantity, Total):
        plain = Total(quantity.quantity)
        options = [(name, value) for name, value in options if name == "quantity" or value != getattr(plain, name)]
    return f"{type(quantity).__name__}({', '.join(f'{name}={_option(value)}' for name, value in options)})"


def _option(value: object) -> str:
    """An option, the same every time: a function by its name."""
    if isinstance(value, Quantity):
        return _shown(value)
    return str(value) if isinstance(value, Enum) else getattr(value, "__name__", "") or repr(value)


def extractions(derived: Derived) -> Iterator[Extraction]:
    return (item for item in derived.items if isinstance(item, Extraction))
