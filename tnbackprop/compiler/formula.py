"""A formula alone as a program: the same stages on a graph of one call, without a model around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import sympy
import torch

from ..notation.bind import Axes, bind, output_axes
from ..notation.rule import Rule
from .emit.loaded import load, running
from .emit.source import emit
from .plan.plan import plan
from .program.cost import RATES
from .sweep.derived import Derived
from .sweep.units import without_units
from .translate.graph import Call, Graph, Value
from .translate.names import Names

EXAMPLE = 32
"""The batch size that the plan is made for; it holds for every one."""


def formula_function(
    rule: Rule, operands: Mapping[str, tuple[Axes, torch.dtype]], inputs: tuple[str, ...], device: str, where: str
) -> Callable[[Mapping[str, torch.Tensor]], torch.Tensor]:
    """What the formula says as a function of its operands by name, in torch calls that autograd sees through.

    inputs  the operands with the batch, which stands alone on one of their axes. Raises as `bind` does.
    """
    axes = {name: own for name, (own, _) in operands.items()}
    names = Names()
    values = {name: Value(names.fresh(name), own, dtype, device=device) for name, (own, dtype) in operands.items()}
    output = Value(names.fresh("output"), output_axes(rule, axes, where), next(v.dtype for v in values.values()))
    call = Call(Rule, MappingProxyType(dict(values)), output, where)
    bound = bind(rule, axes, {name: v.name for name, v in values.items()}, output.name, output.axes, where, own=True)
    known = {value.name: value for value in (*values.values(), output)}
    read = {values[name].name: values[name] for name in inputs}
    graph = Graph(
        calls=(call,),
        values=MappingProxyType(known),
        parameters=MappingProxyType({}),
        buffers=MappingProxyType({}),
        constants=MappingProxyType({}),
        inputs=(*read, *(v.name for v in values.values() if v.name not in read)),
        output=output.name,
        loss=None,
        example_batch=EXAMPLE,
    )
    derived = Derived(((call, without_units(bound)),), (), sympy.Integer(1))
    planned = plan(graph, derived, RATES.get(device, RATES["cpu"]), output.dtype.itemsize)
    source = emit(graph, planned, where, functional=True)
    program = load(source)

    def function(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with running(source):
            result: torch.Tensor = program({values[name].name: tensor for name, tensor in tensors.items()})[1][0]
        return result

    return function
