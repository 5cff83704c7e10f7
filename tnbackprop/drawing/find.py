"""The diagrams of a program, by the names that a person knows: modules, parameters, quantities."""

from __future__ import annotations

from collections.abc import Iterator

from ..compiler.sweep.derived import Extraction
from ..compiler.translate.graph import Call
from ..diagram.algebra import differentiate
from ..diagram.core import Diagram
from ..errors import InputError
from ..notation.bind import BoundRule
from ..quantities.factors import Factors
from ..runtime import Program


def quantity(program: Program, name: str, parameter: str) -> Diagram | Factors:
    """What a quantity of a parameter is, as derived: G·G for "second_moment", the `Factors` for "kfac".

    The sum of what several sweeps of columns give: the diagonal of the Hessian. Any name of a tied parameter will do.
    Raises `InputError` where the program has no such quantity of that parameter.
    """
    names = program.compiled.graph.parameters
    first = {dotted: same[0] for same in names.values() for dotted in same}
    found: dict[str, dict[str, Diagram | Factors]] = {}
    for item in program.compiled.derived.items:
        if isinstance(item, Extraction):
            of = found.setdefault(names[item.parameter][0], {})
            of |= item.factors
            for key, diagram in item.diagrams.items():
                if key.factor is None:
                    before = of.get(key.quantity)
                    of[key.quantity] = before + diagram if isinstance(before, Diagram) else diagram
    parameter = first.get(parameter, parameter)
    if parameter not in found:
        raise InputError(f"no diagrams for a parameter {parameter!r}: there are {', '.join(found)}")
    if name not in found[parameter]:
        raise InputError(f"no diagram of {name!r} for {parameter!r}: there are {', '.join(found[parameter])}")
    return found[parameter][name]


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
