"""The diagrams of a program, by the names that a person knows: modules, parameters, quantities."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import reduce
from typing import overload

from ..compiler.sweep.derived import Backward, Extraction
from ..compiler.translate.graph import Call
from ..diagram.core import Diagram, hint_of, leaves
from ..diagram.derivatives import differentiate
from ..diagram.renamed import renamed
from ..errors import InputError
from ..notation.bind import BoundRule
from ..quantities import Total
from ..quantities.factors import Factors
from ..runtime import Program


@overload
def quantity(program: Program, name: str, parameter: str) -> Diagram | Factors: ...


@overload
def quantity(program: Program, name: str, parameter: None = None) -> dict[str, Diagram]: ...


def quantity(program: Program, name: str, parameter: str | None = None) -> Diagram | Factors | dict[str, Diagram]:
    """What a quantity of a parameter is, as derived: G·G for "second_moment", the `Factors` for "kfac".

    The sum of what several sweeps of columns give: the diagonal of the Hessian. Any name of a tied parameter will do.
    What is handed in, or made between phases, has its key for a name. Of a total it is what the parameter adds to it;
    without a parameter that of every one, by name. For `InputGrad` name an input.
    Raises `InputError` where the program has no such quantity of that parameter.
    """
    program = next((each for each in program.each if name in each.quantities), program)
    names = program.compiled.graph.parameters
    first = {dotted: same[0] for same in names.values() for dotted in same}
    found = _by_inputs(program)
    for item in program.compiled.derived.items:
        if isinstance(item, Extraction):
            of = found.setdefault(names[item.parameter][0], {})
            of |= item.factors
            for key, diagram in item.diagrams.items():
                if key.factor is None:
                    before = of.get(key.quantity)
                    of[key.quantity] = before + diagram if isinstance(before, Diagram) else diagram
    if parameter is None:
        return _shares(program, name, found)
    parameter = first.get(parameter, parameter)
    if parameter not in found:
        raise InputError(f"no diagrams for a parameter {parameter!r}: there are {', '.join(found)}")
    if name not in found[parameter]:
        raise InputError(f"no diagram of {name!r} for {parameter!r}: there are {', '.join(found[parameter])}")
    return _by_key(program, found[parameter][name])


def _shares(program: Program, name: str, found: Mapping[str, Mapping[str, Diagram | Factors]]) -> dict[str, Diagram]:
    """What every parameter adds to a total, in the order of the model."""
    if not isinstance(program.quantities.get(name), Total):
        totals = [key for key, each in program.quantities.items() if isinstance(each, Total)]
        known = f"totals are {', '.join(totals)}" if totals else "the program has no total"
        raise InputError(f"{name!r} is no total over parameters: name a parameter of it ({known})")
    order = [dotted[0] for dotted in program.compiled.graph.parameters.values()]
    own = {dotted: _by_key(program, found[dotted][name]) for dotted in order if name in found.get(dotted, {})}
    return {dotted: each for dotted, each in own.items() if isinstance(each, Diagram)}


def _by_inputs(program: Program) -> dict[str, dict[str, Diagram | Factors]]:
    """Input -> quantity -> the cotangent that it is; native code has no diagram."""
    derived = program.compiled.derived
    swept = {item.name: item for item in derived.items if isinstance(item, Backward)}
    found: dict[str, dict[str, Diagram | Factors]] = {}
    for name, by in derived.inputs.items():
        for value, cotangent in by.items():
            terms = [term for term in swept[cotangent].terms if isinstance(term, Diagram)]
            if len(terms) == len(swept[cotangent].terms):
                found.setdefault(value, {})[name] = reduce(Diagram.__add__, terms)
    return found


def _by_key(program: Program, what: Diagram | Factors) -> Diagram | Factors:
    """The same, where an operand is called by its key; by more where that is the name of something else."""
    diagrams = (what,) if isinstance(what, Diagram) else what.diagrams
    readings = program.compiled.derived.readings
    read = dict.fromkeys(name for diagram in diagrams for name in leaves(diagram))
    shown = {name: hint_of(name) for name in read if name not in readings}
    for name in (name for name in read if name in readings):
        key, of = readings[name].key, readings[name].of or "operand"
        shown[name] = key if key not in shown.values() else f"{of} {key}"
    made = tuple(renamed(diagram, lambda name: shown[name] if name in readings else name) for diagram in diagrams)
    return made[0] if isinstance(what, Diagram) else replace(what, diagrams=made)


def formulas(program: Program, module: str) -> dict[str, Diagram]:
    """The formula of every value that is computed in a module ("" is the model) or inside of it, in order.

    Raises `InputError` where there is none: native code and fallbacks have no formula.
    """
    found = {
        equation.name: equation.diagram
        for _, rule in _inside(program, module)
        for equation in rule.equations
        if equation.diagram is not None
    }
    if not found:
        raise InputError(f"no formula in module {module!r}: {_paths(program)}")
    return found


def jacobian(program: Program, module: str, parameter: str) -> Diagram:
    """∂output/∂parameter of the module's call that reads the parameter: legs [*output, *parameter].

    Raises `InputError` where no formula in the module reads it.
    """
    values = [value for value, dotted in program.compiled.graph.parameters.items() if parameter in dotted]
    for _, rule in _inside(program, module):
        for equation in rule.equations:
            for value in values:
                found = differentiate(equation.diagram, value) if equation.diagram is not None else None
                if found is not None:
                    return found.diagram
    raise InputError(f"no formula in module {module!r} reads a parameter {parameter!r}: {_paths(program)}")


def _inside(program: Program, module: str) -> Iterator[tuple[Call, BoundRule]]:
    for call, rule in program.compiled.derived.bound:
        if not module or call.path == module or call.path.startswith(f"{module}."):
            yield call, rule


def _paths(program: Program) -> str:
    paths = dict.fromkeys(call.path or "the model" for call, _ in program.compiled.derived.bound)
    return "there are calls in " + ", ".join(paths)
