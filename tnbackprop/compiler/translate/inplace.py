"""In-place ops of an exported graph: their functional counterparts, and whether views make that insufficient."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from ...errors import UnsupportedError
from .torch_internals import OpOverload

aten = torch.ops.aten

MAYBE_SAME = frozenset({aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default})
"""Ops whose schema says "new tensor" but which return their input in eval mode."""

WHOLE = frozenset({aten.alias.default, aten.lift_fresh.default})
"""Views that are the tensor itself."""

COPIED = {aten.view.default: aten.reshape.default, aten.view_as.default: aten.reshape_as.default}
"""Views that fail for some strides, as ops that copy for those."""

RENAMED = {
    aten.normal_.default: aten.normal_functional.default,
    aten.bernoulli_.float: aten.bernoulli.p,
    aten.squeeze_.dim: aten.squeeze.dim,
}


def is_mutation(target: Any) -> bool:
    """Whether a call of `target` writes to one of its arguments."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def functional(target: Any, where: str) -> Any:
    """relu_ -> relu, with the same overload."""
    if target in RENAMED:
        return RENAMED[target]
    name = target._schema.name.split("::")[1]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None:
        raise UnsupportedError(
            f"{where} writes to its argument and has no functional counterpart. Use the op without _"
        )
    return overload


def mutated(node: Node) -> Node:
    """The node whose tensor an in-place call writes to."""
    for k, argument in enumerate(node.target._schema.arguments):  # type: ignore[union-attr]
        if argument.alias_info is not None and argument.alias_info.is_write:
            found = node.args[k] if k < len(node.args) else node.kwargs[argument.name]
            assert isinstance(found, Node)
            return found
    raise UnsupportedError(f"{node.target} writes to an argument that its schema does not name")


def owner(node: Node) -> Node:
    """The node whose tensor `node` is, through in-place results and whole aliases."""
    while node.op == "call_function":
        if is_mutation(node.target):
            node = mutated(node)
        elif node.target in WHOLE:
            node = node.all_input_nodes[0]
        else:
            return node
    return node


def mutates_view(program: GraphModule) -> bool:
    """Whether some in-place call writes to a tensor that has views (or is one): renaming is then not enough."""
    nodes = [
        n for g in program.modules() if isinstance(g, GraphModule) for n in g.graph.nodes if n.op == "call_function"
    ]
    if any(n.target is aten.embedding_renorm_.default for n in nodes):
        raise UnsupportedError(
            "an embedding with max_norm writes to its weight during forward: a program changes no parameter. "
            "Leave max_norm out, and renormalize between steps"
        )
    written = {owner(n) for n in nodes if is_mutation(n.target)}
    views = [n for n in nodes if _is_view(n) and n.all_input_nodes]
    inner = any(n.op == "placeholder" and n.graph is not program.graph for n in written)
    return inner or any(n in written or owner(n.all_input_nodes[0]) in written for n in views)


def copy_views(program: GraphModule) -> None:
    """Let each view copy where it must, in a program that writes to no view: what replaces an operator may have other
    strides than the operator, after which `contiguous` was a no-op and left out.
    """
    for graph in (part.graph for part in program.modules() if isinstance(part, GraphModule)):
        for node in graph.nodes:
            node.target = COPIED.get(node.target, node.target)


def _is_view(node: Node) -> bool:
    if not isinstance(node.target, OpOverload) or is_mutation(node.target) or node.target in WHOLE:
        return False
    return node.target in MAYBE_SAME or any(r.alias_info is not None for r in node.target._schema.returns)
