"""In-place ops of an exported graph: their functional counterparts, and whether views make that insufficient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ...errors import UnsupportedError
from .names import op_name
from .operators import Memory, row_of
from .torch_internals import (
    OpOverload,
    arguments_of,
    is_mutation,
    name_of,
    of_aten,
    overload,
    shares_memory,
    written_arguments,
)

aten = torch.ops.aten
NO_GRAD_BLOCK = torch.ops.higher_order.wrap_with_set_grad_enabled


def functional(target: Any, where: str) -> OpOverload:
    """relu_ -> relu, with the same overload."""
    name, which = name_of(target)
    known = of_aten(target)
    found = overload(row_of(target).functional or f"{name.removesuffix('_')}.{which}") if known else None
    if found is None or is_mutation(found):
        raise UnsupportedError(
            f"{where} writes to its argument and has no functional counterpart. Use the op without _"
        )
    return found


def in_place(target: Any) -> OpOverload | None:
    """relu -> relu_, with the same overload: what writes the result over the first operand, where there is that."""
    name, which = name_of(target)
    if not of_aten(target) or shares_memory(target):
        return None
    return overload(f"{name}_.{which}")


def mutated(node: Node) -> Node:
    """The node whose tensor an in-place call writes to."""
    place = written_arguments(node.target)[0]
    found = node.args[place] if place < len(node.args) else node.kwargs[arguments_of(node.target)[place].name]
    assert isinstance(found, Node)
    return found


def owner(node: Node) -> Node:
    """The node whose tensor `node` is, through in-place results and whole aliases."""
    while node.op == "call_function":
        if is_mutation(node.target):
            node = mutated(node)
        elif row_of(node.target).memory is Memory.ITSELF:
            node = node.all_input_nodes[0]
        else:
            return node
    return node


def nodes_of(program: GraphModule) -> list[Node]:
    """The calls of functions, those in nested graphs too."""
    graphs = (part.graph for part in program.modules() if isinstance(part, GraphModule))
    return [node for graph in graphs for node in graph.nodes if node.op == "call_function"]


def mutates_view(program: GraphModule) -> bool:
    """Whether some in-place call writes to a tensor that has views (or is one): renaming is then not enough."""
    nodes = nodes_of(program)
    for node in nodes:
        if row_of(node.target).refused:
            raise UnsupportedError(row_of(node.target).refused)
    written = {owner(n) for n in nodes if is_mutation(n.target)}
    views = [n for n in nodes if _is_view(n) and n.all_input_nodes]
    inner = any(n.op == "placeholder" and n.graph is not program.graph for n in written)
    return inner or any(n in written or owner(n.all_input_nodes[0]) in written for n in views)


def may_view(target: Any) -> bool:
    """Whether what an operator gives may be in the memory of its operand."""
    if not isinstance(target, OpOverload) or is_mutation(target):
        return False
    return row_of(target).memory is Memory.EITHER or shares_memory(target)


def copy_views(program: GraphModule) -> None:
    """Let each view copy where it must, in a program that writes to no view: what replaces an operator may have other
    strides than the operator, after which `contiguous` was a no-op and left out.
    """
    for graph in (part.graph for part in program.modules() if isinstance(part, GraphModule)):
        for node in graph.nodes:
            copying = row_of(node.target).copying
            node.target = overload(copying) if copying else node.target


def _is_view(node: Node) -> bool:
    return may_view(node.target) and row_of(node.target).memory is not Memory.ITSELF


def cut_blocks(program: GraphModule) -> None:
    """Detach what leaves a `torch.no_grad()` block: once operators are made of others, such blocks are gone."""
    for part in [part for part in program.modules() if isinstance(part, GraphModule)]:
        for node in part.graph.find_nodes(op="call_function", target=NO_GRAD_BLOCK):
            if node.args[0]:
                continue
            (made,) = getattr(part, str(node.args[1].target)).graph.output_node().args
            for output in [user for user in node.users if op_name(user.target) == "getitem"]:
                if owner(made[output.args[1]]).op == "call_function" and _is_floating(output):
                    with part.graph.inserting_after(output):
                        cut = part.graph.call_function(aten.detach.default, (output,))
                    cut.meta = dict(output.meta)
                    output.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)


def _is_floating(node: Node) -> bool:
    made = node.meta.get("val")
    return isinstance(made, Tensor) and (made.is_floating_point() or made.is_complex())
