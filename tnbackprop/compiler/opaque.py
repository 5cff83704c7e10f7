"""Modules that have a rule of their own: one opaque op each while the model is exported."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import RuleError, UnsupportedError
from ..rule import Rules

NAMESPACE = "tnbackprop_capture"


@dataclass
class OpaqueCall:
    """One way a module is called: the flattened arguments (tensors replaced by their position) and their tree."""

    leaves: list[Any]
    spec: Any


@dataclass
class Opaque:
    """A module with a rule, for the time of one capture."""

    module: nn.Module
    target: type[nn.Module]
    path: str
    calls: list[OpaqueCall] = field(default_factory=list)

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Dotted names of the parameters and buffers, each tensor once per name."""
        named = [
            *self.module.named_parameters(remove_duplicate=False),
            *self.module.named_buffers(remove_duplicate=False),
        ]
        return tuple(name for name, _ in named)

    def arguments(self, site: int, inputs: tuple[Any, ...], tensors: tuple[Any, ...]) -> dict[str, Any]:
        """Operands of a call by name: the names of forward's signature, then the module's own tensors."""
        call = self.calls[site]
        leaves = [inputs[leaf.position] if isinstance(leaf, _Position) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        bound = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs)
        bound.apply_defaults()
        named = {name: _tuples(value) for name, value in list(bound.arguments.items())[1:]}
        for name, value in zip(self.tensor_names, tensors, strict=True):
            name = name.replace(".", "_")
            if name in named:
                raise RuleError(f"{self.target.__name__}: {name!r} is both an argument of forward and a parameter")
            named[name] = value
        return named


@dataclass(frozen=True)
class _Position:
    position: int


@contextmanager
def opaque_modules(model: nn.Module, rules: Rules) -> Iterator[dict[str, Opaque]]:
    """While active, each outermost submodule with a rule runs as one op; yields them by op name."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
    found: dict[str, Opaque] = {}
    patched: list[tuple[nn.Module, Any]] = []
    try:
        for path, module in _outermost(model, rules):
            target = rule_class(module, rules)
            assert target is not None
            name = f"{type(module).__name__}_{len(found)}"
            found[name] = Opaque(module, target, path)
            original = module.forward
            forward = _opaque_forward(library, name, found[name], original)
            patched.append((module, module.__dict__.get("forward")))
            module.__dict__["forward"] = forward
        yield found
    finally:
        for module, own in patched:
            _restore(module, own)
        library._destroy()  # type: ignore[no-untyped-call]


def rule_class(module: nn.Module, rules: Rules) -> type[nn.Module] | None:
    """The most derived class of the module that is a target of `rules`."""
    for cls in type(module).__mro__:
        if cls in rules and issubclass(cls, nn.Module):
            return cls
    return None


def _outermost(model: nn.Module, rules: Rules, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules with a rule that are inside no other such module, each once."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules(prefix=path):
        if module not in inside and rule_class(module, rules) is not None:
            inside.update(module.modules())
            yield name, module


def _opaque_forward(
    library: torch.library.Library, name: str, opaque: Opaque, original: Callable[..., Any]
) -> Callable[..., Any]:
    module = opaque.module

    def run(inputs: list[Tensor], tensors: list[Tensor], site: int) -> Tensor:
        call = opaque.calls[site]
        leaves = [inputs[leaf.position] if isinstance(leaf, _Position) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        state = dict(zip(opaque.tensor_names, tensors, strict=True))
        patched = module.__dict__.pop("forward")
        try:
            with torch.nn.utils.stateless._reparametrize_module(module, state):
                output = original(*args, **kwargs)
        finally:
            module.__dict__["forward"] = patched
        if not isinstance(output, Tensor):
            raise UnsupportedError(
                f"module {opaque.path!r} ({type(module).__name__}) has a rule but returns {type(output).__name__}: "
                "a rule describes one output tensor. Split the module"
            )
        return output.clone() if any(output is t for t in (*inputs, *tensors)) else output

    library.define(f"{name}(Tensor[] inputs, Tensor[] tensors, int site) -> Tensor")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", run, lib=library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs: list[Tensor] = []
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[k] = _Position(len(inputs))
                inputs.append(leaf)
        opaque.calls.append(OpaqueCall(leaves, spec))
        named = {
            **dict(module.named_parameters(remove_duplicate=False)),
            **dict(module.named_buffers(remove_duplicate=False)),
        }
        output: Tensor = op(inputs, [named[n] for n in opaque.tensor_names], len(opaque.calls) - 1)
        return output

    return forward


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = own


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
