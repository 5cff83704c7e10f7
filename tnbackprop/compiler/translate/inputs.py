"""The values that a graph starts from: parameters, buffers, constants and inputs, each once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from ...diagram.core import Size
from ...errors import UnsupportedError
from .graph import Value
from .names import Names
from .opaque import named_tensors
from .sizes import Sizes
from .torch_modes import check_plain


@dataclass
class Entered:
    """What `Graph` says about everything that no call makes."""

    env: dict[Node, Value] = field(default_factory=dict)
    values: dict[str, Value] = field(default_factory=dict)
    parameters: dict[str, tuple[str, ...]] = field(default_factory=dict)
    buffers: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Tensor] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)

    def dotted(self, name: str) -> str:
        """The user's name of a value."""
        return self.buffers.get(name) or self.parameters.get(name, (name,))[0]

    def add(
        self, name: str, shape: tuple[Size, ...], like: Tensor, depends: frozenset[str] = frozenset()
    ) -> Value:
        """A value that is read, not computed; dtype and device are those of `like`."""
        self.values[name] = Value(name, tuple((size,) for size in shape), like.dtype, depends, like.device.type)
        return self.values[name]


def enter(
    wrapped: nn.Module, exported: torch.export.ExportedProgram, sizes: Sizes, names: Names, example: tuple[Any, Any]
) -> Entered:
    """Values for every parameter (used or not), and for the buffers, constants and inputs of the exported program."""
    entered = Entered()
    known = _parameters(entered, wrapped.get_submodule("model"), names)
    tables = named_tensors(wrapped)
    leaves = iter(pytree.tree_flatten_with_path(example)[0])
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    for node, spec in zip(placeholders, exported.graph_signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            path, leaf = next(leaves)
            if isinstance(leaf, Tensor):
                name = names.fresh(_input_name(path))
                entered.env[node] = entered.add(name, sizes.shape(node.meta["val"]), leaf)
                entered.inputs.append(name)
            continue
        target = str(spec.target)
        tensor = tables[target] if target in tables else exported.constants[target]
        if not isinstance(tensor, Tensor):
            raise UnsupportedError(f"the model reads {target!r}, which is {type(tensor).__name__} and no tensor")
        if id(tensor) not in known:
            known[id(tensor)] = _lifted(entered, wrapped.get_submodule("model"), target, tensor, names)
        entered.env[node] = known[id(tensor)]
    return entered


def _parameters(entered: Entered, model: nn.Module, names: Names) -> dict[int, Value]:
    """Each parameter once, under the first of its names."""
    dotted: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        dotted.setdefault(id(parameter), []).append(name)
    known: dict[int, Value] = {}
    for first, parameter in model.named_parameters():
        depends: frozenset[str] = frozenset({first}) if parameter.requires_grad else frozenset()
        value = entered.add(names.fresh(f"p_{first}"), tuple(parameter.shape), parameter, depends)
        entered.parameters[value.name] = (first, *(name for name in dotted[id(parameter)] if name != first))
        known[id(parameter)] = value
    return known


def _lifted(entered: Entered, model: nn.Module, target: str, tensor: Tensor, names: Names) -> Value:
    """A buffer of the model; everything else (the loss's tensors, literals) is a constant."""
    name = target.removeprefix("model.")
    check_plain(repr(name), tensor)
    own = target.startswith("model.") and dict(model.named_buffers(remove_duplicate=False)).get(name) is tensor
    value = entered.add(names.fresh(f"{'b' if own else 'c'}_{name}"), tuple(tensor.shape), tensor)
    if own:
        entered.buffers[value.name] = name
    else:
        entered.constants[value.name] = tensor.detach()
    return value


def refuse_complex(name: str, tensor: Tensor) -> None:
    """Of a parameter or a buffer, by its name."""
    if tensor.is_complex():
        raise UnsupportedError(f"{name!r} is complex: complex tensors are not supported")


def _input_name(path: tuple[Any, ...]) -> str:
    """x, y, x_0, x_input_ids, …"""
    keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", "")))) for key in path[1:]]
    return "_".join(["xy"[path[0].idx], *keys])
