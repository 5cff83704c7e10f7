"""What the capture tests share: a graph is run op by op and must give what the model gives."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tnbackprop.compiler.capture.export import capture
from tnbackprop.compiler.translate.graph import Graph, Value
from tnbackprop.diagram.core import N


def concrete(value: Any, batch: int) -> Any:
    """A size expression at N = batch."""
    if isinstance(value, tuple):
        return tuple(concrete(v, batch) for v in value)
    if isinstance(value, sympy.Basic):
        number = value.subs(N, batch)
        return int(number) if number.is_Integer else float(number)
    return value


def run(graph: Graph, model: nn.Module, x: Any, y: Any) -> dict[str, Any]:
    """All values of the graph, by calling its targets; checks every shape, factor and dtype on the way."""
    leaves = [leaf for leaf in pytree.tree_leaves((x, y)) if leaf is not None]
    batch = next(leaf.shape[0] for leaf in leaves if leaf.ndim)
    env: dict[str, Any] = dict(zip(graph.inputs, leaves, strict=True))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    env |= {value: parameters[names[0]] for value, names in graph.parameters.items()}
    env |= {value: model.get_buffer(name) for value, name in graph.buffers.items()} | dict(graph.constants)

    def operand(value: Any) -> Any:
        if isinstance(value, Value):
            return env[value.name]
        return [operand(v) for v in value] if isinstance(value, tuple) else concrete(value, batch)

    for call in graph.calls:
        arguments = {name: operand(value) for name, value in call.arguments.items()}
        if call.module is not None:
            own = {n.replace(".", "_") for n, _ in [*call.module.named_parameters(), *call.module.named_buffers()]}
            result = call.module(**{k: v for k, v in arguments.items() if k not in own})
        else:
            schema = [a.name for a in call.target._schema.arguments]
            result = call.target(**{n: arguments["input" if n == "self" else n] for n in schema})
        result = result if call.item is None else result[call.item]
        result = result[0] if isinstance(result, tuple) else result
        assert tuple(result.shape) == tuple(math.prod(concrete(a, batch)) for a in call.output.axes), str(call.output)
        assert result.dtype == call.output.dtype
        env[call.output.name] = result
    return env


def take(tensor: Any, size: int) -> Any:
    """The same samples repeated to a batch of `size`."""
    return tensor[torch.arange(size) % len(tensor)] if tensor is not None and tensor.ndim else tensor


def captured(
    model: nn.Module, x: Any, y: Any = None, loss: Any = None, rules: Any = None, sizes: tuple[int, ...] = (1, 2, 5)
) -> Graph:
    """Capture, compare with the model for several batch sizes, and check the contract of the graph."""
    before = {name: dict(m.__dict__) for name, m in model.named_modules()}
    graph = capture(model, loss, (x, y), rules or {})
    assert {name: dict(m.__dict__) for name, m in model.named_modules()} == before
    for size in sizes:
        xs, ys = pytree.tree_map(functools.partial(take, size=size), (x, y))
        env = run(graph, model, xs, ys)
        args, kwargs = (xs, {}) if isinstance(xs, tuple) else ((), xs) if isinstance(xs, dict) else ((xs,), {})
        expected = model(*args, **kwargs)
        torch.testing.assert_close(pytree.tree_map(env.__getitem__, graph.output), expected)
        if loss is not None:
            torch.testing.assert_close(env[str(graph.loss)], loss(expected, ys))
    check_contract(graph, model)
    return graph


def check_contract(graph: Graph, model: nn.Module) -> None:
    """Names are unique identifiers, arguments are plain, values are defined before they are used."""
    known = {*graph.parameters, *graph.buffers, *graph.constants, *graph.inputs}
    for call in graph.calls:
        assert all(value.name in known and graph.values[value.name] is value for value in call.tensors.values())
        assert call.output.name.isidentifier() and call.output.name not in known | {"N", "n", "torch"}
        known.add(call.output.name)
        for value in pytree.tree_leaves(dict(call.arguments)):
            assert not isinstance(value, Tensor | torch.SymInt | torch.fx.Node | list)
        inside = frozenset().union(*(value.depends_on for value in call.tensors.values()))
        assert call.output.depends_on <= inside
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for v in graph.parameters for name in graph.values[v].depends_on} == trainable
    if graph.loss is not None:
        assert graph.loss == "loss"


class Function(nn.Module):
    """A model given by a function of (model, inputs)."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *args: Tensor) -> Any:
        return self.function(self, *args)


def targets(graph: Graph) -> list[str]:
    return [call.target._schema.name.split("::")[1] for call in graph.calls]
