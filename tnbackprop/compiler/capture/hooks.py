"""Hooks that a program would leave out, and how errors tell a module."""

from __future__ import annotations

from torch import nn

from ...errors import UnsupportedError
from ...table import Rules
from ..translate.opaque import rule_class
from ..translate.torch_internals import backward_hooks, forward_hooks, global_backward_hooks, tensor_hooks

REPLACED = (
    "A program has no backward pass of autograd, so it would be left out.\n  Write a rule with the Jacobian that is "
    "meant: for a module, or for a function that tn.primitive wraps (examples/add_a_layer.py)."
)


def told(path: str, module: nn.Module) -> str:
    """A module by its path below `Wrapped`, as errors tell it."""
    whole, _, inside = path.partition(".")
    kind = type(module).__name__
    if not inside:
        return f"the {whole} ({kind})"
    return f"module {inside!r} ({kind})" + (" of the loss" if whole == "loss" else "")


def refuse_hooks(wrapped: nn.Module, rules: Rules) -> None:
    """Functions that autograd calls with gradients, and hooks of modules that a rule takes the place of."""
    if global_backward_hooks():
        raise UnsupportedError(
            "every module has a backward hook (torch.nn.modules.module.register_module_full_backward_hook or its kind)."
            " A program has no backward pass of autograd, so it would be left out.\n  Remove it before you compile: "
            "handle.remove()."
        )
    inside: set[nn.Module] = set()
    for path, module in wrapped.named_modules():
        if backward_hooks(module):
            raise UnsupportedError(
                f"{told(path, module)} has a backward hook. {REPLACED}\n  A hook that only looks: handle.remove()."
            )
        if module in inside and forward_hooks(module):
            raise UnsupportedError(
                f"{told(path, module)} has a forward hook, inside a module with a rule, which says nothing of it.\n"
                "  Remove it (handle.remove()), or register it on the module with the rule."
            )
        if rule_class(module, rules) is not None:
            inside |= set(module.modules()) - {module}
    for path, parameter in wrapped.named_parameters():
        if parameter.requires_grad and tensor_hooks(parameter):
            raise UnsupportedError(
                f"parameter {path.partition('.')[2]!r} has a hook (register_hook or "
                "register_post_accumulate_grad_hook). A program has no backward pass of autograd, so it would be left "
                "out.\n  Remove it before you compile (handle.remove()), and do to the result what it does."
            )
