"""Forwards that take derivatives or map functions themselves: what they do to tensors, operator by operator.

torch.export follows no `torch.autograd.grad`, `torch.func.grad` or `torch.vmap` inside a forward. Tracing below
autograd does: what is left is a program of plain operators, which is exported then. There nothing says any more where
the user has cut the gradient (`detach`, `no_grad`, a derivative without a graph): that is marked while it is traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ...errors import UnsupportedError
from ..running.torch_quiet import Quiet
from ..running.torch_versions import sizes_by_builtins
from ..translate.foreign import MISTAKES
from ..translate.opaque import named_tensors
from ..translate.symbolic import symbolic_kernels
from ..translate.torch_internals import traced_below_autograd, with_tensors

aten = torch.ops.aten
CUT = aten.alias_copy.default
"""An operator that is the identity, and that no forward calls, for what the user has cut."""
STATISTICS = (aten.native_layer_norm.default, aten.native_group_norm.default, aten.native_batch_norm.default)
"""Their backward takes its second and third output for constants, and has the whole derivative by the input."""
WHOLE = dict.fromkeys((aten.nll_loss_forward.default, aten.nll_loss2d_forward.default), aten.nll_loss_nd.default)
"""What is left of losses below autograd, as it is called: the first output, which alone has a derivative."""
DETACHING = (Tensor.detach, torch.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class Marking(TorchFunctionMode):
    """While active, what has no gradient because the user says so goes through `CUT`."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        final = func is torch.autograd.grad and not kwargs.get("create_graph")
        if not (func in DETACHING or final or not torch.is_grad_enabled()):
            return output
        given = {id(leaf) for leaf in pytree.tree_leaves((args, kwargs))}
        return pytree.tree_map(lambda leaf: leaf if id(leaf) in given else _cut(leaf), output)


def _cut(leaf: Any) -> Any:
    return CUT(leaf) if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


class Traced(nn.Module):
    """(x, y) -> (loss, output) as the traced operators; with the model and the loss, whose tensors it reads."""

    def __init__(self, wrapped: nn.Module, program: GraphModule, spec: Any) -> None:
        super().__init__()
        self.model, self.loss = wrapped.model, wrapped.loss
        self.training = wrapped.training
        self.own = [program, spec]  # in a list: they are no submodules

    def forward(self, x: Any, y: Any) -> Any:
        program, spec = self.own
        flat = program(*named_tensors(self).values(), *pytree.tree_leaves((x, y)))
        return pytree.tree_unflatten(flat, spec)


REMEDY = (
    "Take derivatives in reverse mode (torch.autograd.grad, vjp, jacrev), write them as plain operations, or give the "
    "module a rule (examples/add_a_layer.py); torch.func on the whole model takes it as it is."
)


def transformed(wrapped: nn.Module, example: tuple[Any, Any], what: str, ruled: bool) -> Traced:
    """The same as plain operators, for a batch of any size. Raises `UnsupportedError` where that is not known.

    what   is differentiated or mapped, where, for errors
    ruled  something has a rule of its own, which plain operators do not know
    """
    if ruled:
        raise UnsupportedError(f"{what}\n  A module or a function with a rule cannot stand next to that. {REMEDY}")
    try:
        return _traced(wrapped, example)
    except (RuntimeError, AssertionError, *MISTAKES) as error:
        raise cannot(what) from error


def cannot(what: str) -> UnsupportedError:
    return UnsupportedError(f"{what}\n  torch cannot tell what that does to a batch of any size. {REMEDY}")


def _traced(wrapped: nn.Module, example: tuple[Any, Any]) -> Traced:
    tensors = named_tensors(wrapped)
    leaves, batch_spec = pytree.tree_flatten(example)
    specs: list[Any] = []

    def flat(*given: Any) -> list[Any]:
        state = dict(zip(tensors, given[: len(tensors)], strict=True))
        with with_tensors(wrapped, state), Marking(), torch.enable_grad():
            results = wrapped(*pytree.tree_unflatten(list(given[len(tensors) :]), batch_spec))
        found, spec = pytree.tree_flatten(results)
        specs[:] = [spec]
        return found

    onednn = torch.backends.mkldnn.flags(enabled=False)  # its recurrent layer has no rule
    with Quiet(), sizes_by_builtins(), symbolic_kernels(), onednn:
        program = traced_below_autograd(flat, list(tensors.values()), leaves)
    _cut_again(program)
    return Traced(wrapped, program, specs[0])


def _cut_again(program: GraphModule) -> None:
    """A detach is autograd's own, for what it saves; what the user cut is one then, and what has no derivative."""
    for node in list(program.graph.nodes):
        if node.target is aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            program.graph.erase_node(node)
        elif node.target is CUT:
            node.target = aten.detach.default
        elif node.target is operator.getitem and node.args[0].target in WHOLE and not node.args[1]:
            with program.graph.inserting_before(node):
                loss = program.graph.call_function(WHOLE[node.args[0].target], node.args[0].args)
            node.replace_all_uses_with(loss)
        elif node.target is operator.getitem and node.args[0].target in STATISTICS and node.args[1]:
            with program.graph.inserting_after(node):
                cut = program.graph.call_function(aten.detach.default, (node,))
            node.replace_all_uses_with(cut, delete_user_cb=lambda user, cut=cut: user is not cut)
    program.graph.eliminate_dead_code()
    program.recompile()
