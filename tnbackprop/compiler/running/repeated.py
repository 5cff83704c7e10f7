"""Repeated: a module that is equal to one that was traced before has its operators, with other parameters.

Equal are two modules of one class with the same attributes, the same modules inside and tensors of the same shapes and
dtypes, that are called with the same arguments but for the values of tensors. What a forward reads besides, nobody
sees here: the graph of the whole is compared with the model afterwards (`one_sample.py`), and where the two differ it
is traced again without this.
"""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from ..translate.torch_internals import OpOverload, global_hooks, is_mutation
from .torch_tracer import (
    another,
    described,
    installed,
    is_traced,
    memory_of,
    modules_around,
    node_of,
    track,
    unseen,
)

PLAIN = (int, str, bool, types.NoneType, bytes, range, torch.dtype, torch.device, torch.layout, torch.Size)
"""Types whose values say all."""
SAME = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, type, OpOverload, Enum)
"""What two modules may have in common, as one object."""
SIZES = frozenset({torch.ops.aten.sym_size.int, torch.ops.aten.sym_stride.int, torch.ops.aten.sym_numel.default})
CHECKS = frozenset({"_assert_tensor_metadata"})
UNLIKE = frozenset({
    torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
})  # fmt: skip
"""Of operators that are not the same when they are called again, or whose sizes are not known."""


class _Unknown(Exception):
    """Something that may be another thing in each call."""


@dataclass(frozen=True)
class _Call:
    """What a module is called with, and all that it has.

    key      equal for two calls that are traced alike
    tensors  those of the arguments, then parameters and buffers
    """

    key: tuple[Any, ...]
    tensors: tuple[Tensor, ...]

    @classmethod
    def of(cls, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """None where something in it may be another thing in each call."""
        tensors: list[Tensor] = []
        if any(map(len, global_hooks())):
            return None
        leaves, spec = pytree.tree_flatten((args, kwargs))
        try:
            with unseen():
                given = tuple(_leaf(leaf, tensors) for leaf in leaves)
                own = _state(module, tensors, {})
        except _Unknown:
            return None
        places: dict[int, int] = {}
        same = tuple(places.setdefault(id(tensor), k) for k, tensor in enumerate(tensors))
        modes = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.is_autocast_enabled("cuda")
        return cls((str(spec), given, own, same, modes, torch.get_default_dtype()), tuple(tensors))


def _leaf(leaf: Any, tensors: list[Tensor]) -> Any:
    if not isinstance(leaf, Tensor):
        return _plain(leaf)
    if not is_traced(leaf):
        raise _Unknown
    tensors.append(leaf)
    return described(leaf)


def _plain(value: Any) -> Any:
    """A value as what can be compared. Raises `_Unknown`."""
    kind = type(value)
    if kind in PLAIN:
        return kind, value
    if kind in (float, complex):
        return kind, repr(value)
    if kind in (tuple, list):
        return kind, tuple(map(_plain, value))
    if kind in (dict, OrderedDict):
        return kind, tuple((_plain(key), _plain(each)) for key, each in value.items())
    if kind in (set, frozenset):
        return kind, frozenset(map(_plain, value))
    if isinstance(value, SAME):
        return "is", id(value)
    raise _Unknown


def _state(module: nn.Module, tensors: list[Tensor], seen: dict[int, int]) -> Any:
    """The class and the attributes of a module, and those of the modules inside."""
    if id(module) in seen:
        return seen[id(module)]
    seen[id(module)] = len(seen)
    kind = type(module)
    if kind.__call__ is not nn.Module.__call__ or kind.__getattr__ is not nn.Module.__getattr__:
        raise _Unknown
    found: list[Any] = [kind]
    for name, value in vars(module).items():
        if name == "_modules":
            inside = ((key, None if each is None else _state(each, tensors, seen)) for key, each in value.items())
            found.append(tuple(inside))
        elif name in ("_parameters", "_buffers"):
            found.append(tuple((key, each if each is None else _leaf(each, tensors)) for key, each in value.items()))
        elif not name.endswith("_hooks") or value:
            if "hooks" in name and "state_dict" not in name and value:
                raise _Unknown
            found.append((name, None if "state_dict" in name else _plain(value)))
    return tuple(found)


@dataclass(frozen=True)
class _Made:
    """What a module gives: a tensor that it makes, and the node of it."""

    tensor: Tensor
    node: Node


@dataclass(frozen=True)
class _Given:
    """What a module gives: the k-th of the tensors that it is called with."""

    place: int


@dataclass(frozen=True)
class _Constant:
    """What a module gives: no tensor."""

    value: Any


@dataclass(frozen=True)
class _Traced:
    """What was traced of a module: nodes that are made again for an equal one.

    path     of the module
    nodes    in order
    given    the nodes of the tensors that it was called with and has; None: not one that is followed
    results  each leaf of what it gave
    """

    path: str
    nodes: tuple[Node, ...]
    given: tuple[Node | None, ...]
    results: tuple[_Made | _Given | _Constant, ...]
    spec: pytree.TreeSpec

    @classmethod
    def of(cls, tracer: Any, module: nn.Module, call: _Call, last: Node | None, value: Any) -> _Traced | None:
        """Of what was traced since `last`; None where an operator is not to be called again without a look."""
        since: list[Node] = []
        for node in reversed(tracer.graph.nodes):
            if node is last:
                break
            since.append(node)
        given = tuple(node_of(tracer, tensor) for tensor in call.tensors)
        nodes = _repeatable(since[::-1], given)
        leaves, spec = pytree.tree_flatten(value)
        results = None if nodes is None else _results(tracer, leaves, call, set(nodes))
        if nodes is None or results is None:
            return None
        return cls(tracer.path_of_module(module), nodes, given, results, spec)

    def again(self, tracer: Any, module: nn.Module, call: _Call) -> tuple[Any] | None:
        """The same for an equal module: what its call gives, in a tuple. None where that cannot be told."""
        given = tuple(node_of(tracer, tensor) for tensor in call.tensors)
        of: dict[Node, Node] = {}
        for then, now in zip(self.given, given, strict=True):
            if then is None or now is None:
                if then is not now:
                    return None
            elif of.setdefault(then, now) is not now:
                return None
        made = {each.node: another(each.tensor) for each in self.results if isinstance(each, _Made)}
        if None in made.values():
            return None
        around, path = modules_around(tracer), tracer.path_of_module(module)
        for node in self.nodes:
            of[node] = tracer.graph.node_copy(node, lambda each: of.get(each, each))
            of[node].meta["nn_module_stack"] = around | self._inside(node, path)
        leaves: list[Any] = []
        for each in self.results:
            match each:
                case _Made(_, node):
                    leaves.append(tensor := made[node])
                    assert tensor is not None
                    track(tracer, tensor, of[node])
                case _Given(place):
                    leaves.append(call.tensors[place])
                case _Constant(value):
                    leaves.append(value)
        return (pytree.tree_unflatten(leaves, self.spec),)

    def _inside(self, node: Node, path: str) -> dict[str, tuple[str, str]]:
        """Where a node is, from its module on, which is now at `path`."""
        size, stack = len(self.path), node.meta["nn_module_stack"].items()
        inside = [(key, own, kind) for key, (own, kind) in stack if f"{own}."[: size + 1] == f"{self.path}."]
        return {f"{path}{key[size:]}": (f"{path}{own[size:]}", kind) for key, own, kind in inside}


def _repeatable(nodes: Sequence[Node], given: Sequence[Node | None]) -> tuple[Node, ...] | None:
    """Those that are made again, without sizes, which are the same; None where one of them may not be."""
    known, found = {node for node in given if node is not None}, list[Node]()
    for node in nodes:
        if _is_size(node):
            continue
        if node.op != "call_function" or not _is_pure(node):
            return None
        if any(each not in known and not _is_size(each) for each in node.all_input_nodes):
            return None
        known.add(node)
        found.append(node)
    return tuple(found)


def _is_size(node: Node) -> bool:
    """Whether it is a number that is made of sizes alone."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), int | torch.SymInt | torch.SymBool):
        return False
    known = node.target in SIZES
    return known or (not isinstance(node.target, OpOverload) and all(map(_is_size, node.all_input_nodes)))


def _is_pure(node: Node) -> bool:
    """Whether it gives tensors, and the same ones whenever it is called with the same."""
    target: Any = node.target
    if not isinstance(target, OpOverload):
        return getattr(target, "__name__", "") == "getitem" and isinstance(node.meta.get("val"), Tensor)
    if target.namespace != "aten" or is_mutation(target) or UNLIKE & set(target.tags):
        return False
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return all(isinstance(leaf, Tensor) for leaf in leaves) and (
        bool(leaves) or target.overloadpacket.__name__ in CHECKS
    )


def _results(
    tracer: Any, leaves: Sequence[Any], call: _Call, nodes: set[Node]
) -> tuple[_Made | _Given | _Constant, ...] | None:
    """What is told of each leaf of what a module gives; None where one is a view of another, or of what was given."""
    taken = {memory_of(tensor) for tensor in call.tensors}
    found: list[_Made | _Given | _Constant] = []
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            if type(leaf) not in PLAIN:
                return None
            found.append(_Constant(leaf))
            continue
        place = next((k for k, tensor in enumerate(call.tensors) if tensor is leaf), None)
        node = node_of(tracer, leaf) if is_traced(leaf) else None
        if place is not None:
            found.append(_Given(place))
        elif node is not None and node in nodes and memory_of(leaf) not in taken:
            taken.add(memory_of(leaf))
            found.append(_Made(leaf, node))
        else:
            return None
    return tuple(found)


class Repeats:
    """The modules of one export that are traced already.

    count   how many were equal to one of them
    inside  whether what is asked of torch here is being asked
    """

    def __init__(self) -> None:
        self.count, self.inside = 0, False
        self._known: dict[tuple[Any, ...], _Traced | None] = {}
        self._called: set[int] = set()

    def __call__(
        self, tracer: Any, module: nn.Module, run: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What a call of a module gives. One that is called twice is traced each time."""
        self.inside = True
        known = id(module) in self._called or not installed(tracer, module)
        call = None if known else _Call.of(module, args, dict(kwargs))
        self._called.add(id(module))
        traced = None if call is None else self._known.get(call.key)
        found = None if call is None or traced is None else traced.again(tracer, module, call)
        last = next(iter(reversed(tracer.graph.nodes)), None)
        self.inside = False
        if found is not None:
            self.count += 1
            self._called |= {id(each) for each in module.modules()}
            return found[0]
        value = run()
        if call is not None and call.key not in self._known:
            self.inside = True
            after = _Call.of(module, args, dict(kwargs))
            same = after is not None and after.key == call.key  # it changed nothing of itself
            self._known[call.key] = _Traced.of(tracer, module, call, last, value) if same else None
            self.inside = False
        return value
