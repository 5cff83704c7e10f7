"""Modules and primitives that have a rule of their own: one opaque op each while the model is exported."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import RuleError, UnsupportedError
from ...notation.rule import Primitive
from ...table import Rules
from .torch_internals import operators, own_tables, with_tensors

NAMESPACE = "tnbackprop_capture"


@dataclass
class OpaqueCall:
    """One way a module is called: the flattened arguments (tensors replaced by their position) and their tree."""

    leaves: list[Any]
    spec: Any


@dataclass
class Opaque:
    """A module or a primitive with a rule, for the time of one capture. `function` is what a call really runs."""

    target: type[nn.Module] | Primitive
    function: Callable[..., Any]
    signature: inspect.Signature
    module: nn.Module | None = None
    path: str = ""
    calls: list[OpaqueCall] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The parameters and buffers by dotted name, each tensor once per name."""
        return {} if self.module is None else named_tensors(self.module)

    @property
    def facts(self) -> dict[str, Any]:
        """What a call of it says of its module."""
        own = self.module
        return {} if own is None else {"module": own, "path": self.path, "module_type": type(own).__name__}

    def __str__(self) -> str:
        return str(self.target) if self.module is None else f"module {self.path!r} ({type(self.module).__name__})"

    def called(self, site: int, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call, with `inputs` for its tensors."""
        call = self.calls[site]
        leaves = [inputs[leaf.position] if isinstance(leaf, _Position) else leaf for leaf in call.leaves]
        args, kwargs = pytree.tree_unflatten(leaves, call.spec)
        return args, kwargs

    def arguments(self, site: int, inputs: tuple[Any, ...], tensors: tuple[Any, ...]) -> dict[str, Any]:
        """Operands of a call by name: the names of the signature, then the module's own tensors."""
        args, kwargs = self.called(site, inputs)
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        named = {name: _tuples(value) for name, value in bound.arguments.items()}
        for name, value in zip(self.tensors, tensors, strict=True):
            name = operand_of(name)
            if name in named:
                raise RuleError(f"{self}: {name!r} is both an argument of forward and a parameter")
            named[name] = value
        parts = [] if self.module is None else self.module.modules()
        absent = (name for part in parts for name, p in own_tables(part)[0].items() if p is None)
        return {**dict.fromkeys(absent), **named}


@dataclass(frozen=True)
class _Position:
    position: int


@contextmanager
def opaque_calls(wrapped: nn.Module, rules: Rules) -> Iterator[dict[str, Opaque]]:
    """While active, each outermost submodule and each primitive with a rule runs as one op; yields them by op name."""
    found: dict[str, Opaque] = {}
    patched: list[tuple[nn.Module, Any]] = []
    primitives = [target for target in rules if isinstance(target, Primitive)]
    with operators(NAMESPACE) as library:
        try:
            for path, module in _outermost(wrapped, rules):
                name = _op_name(type(module).__name__, len(found))
                found[name] = Opaque(_target(path, module, rules), module.forward, signature_of(module), module, path)
                forward = _op(library, name, found[name])
                patched.append((module, module.__dict__.get("forward")))
                module.__dict__["forward"] = forward
            for primitive in primitives:
                name = _op_name(primitive.function.__name__, len(found))
                found[name] = Opaque(primitive, primitive.function, inspect.signature(primitive.function))
                primitive.stand_in = _op(library, name, found[name])
            yield found
        finally:
            for module, own in patched:
                _restore(module, own)
            for primitive in primitives:
                primitive.stand_in = None


def _target(path: str, module: nn.Module, rules: Rules) -> type[nn.Module]:
    """The class whose rule is that of the module."""
    target = rule_class(module, rules)
    assert target is not None
    if target.forward not in (type(module).forward, nn.Module.forward):
        raise RuleError(
            f"module {path!r} ({type(module).__name__}) has a forward of its own, but its rule would be that "
            f"of {target.__name__}: give {type(module).__name__} a rule"
        )
    return target


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by dotted name, one that is there twice under both names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def operand_of(dotted: str) -> str:
    """What a formula calls a parameter or a buffer of a module."""
    return dotted.replace(".", "_")


def rule_class(module: nn.Module, rules: Rules) -> type[nn.Module] | None:
    """The most derived class of the module that is a target of `rules`."""
    for cls in type(module).__mro__:
        if cls in rules and issubclass(cls, nn.Module):
            return cls
    return None


def _op_name(wanted: str, number: int) -> str:
    return re.sub(r"\W", "_", wanted, flags=re.ASCII) + f"_{number}"


def signature_of(module: nn.Module) -> inspect.Signature:
    """That of forward, or the module's own attribute where forward takes anything."""
    own = getattr(module, "signature", None)
    if isinstance(own, inspect.Signature):
        return own
    forward = inspect.signature(type(module).forward)
    return forward.replace(parameters=list(forward.parameters.values())[1:])


def _outermost(wrapped: nn.Module, rules: Rules) -> Iterator[tuple[str, nn.Module]]:
    """Modules with a rule that are inside no other such module, each once, with their path below the model."""
    inside: set[nn.Module] = set()
    for name, module in wrapped.named_modules():
        if module not in inside and rule_class(module, rules) is not None:
            inside.update(module.modules())
            yield name.removeprefix("model").removeprefix("."), module


def _op(library: torch.library.Library, name: str, opaque: Opaque) -> Callable[..., Any]:
    """Define the op; returns what is called instead of the function."""
    known = ref(opaque)  # torch keeps what is registered with it, and so would the model

    def run(inputs: list[Tensor], tensors: list[Tensor], site: int) -> Tensor:
        opaque = known()
        assert opaque is not None
        module = opaque.module
        args, kwargs = opaque.called(site, inputs)
        if module is None:
            output = opaque.function(*args, **kwargs)
        else:
            state = dict(zip(opaque.tensors, tensors, strict=True))
            patched = module.__dict__.pop("forward")
            try:
                with with_tensors(module, state):
                    output = opaque.function(*args, **kwargs)
            finally:
                module.__dict__["forward"] = patched
        # as the rule's value is: strides with the batch size in them may fix that
        output = check_output(str(opaque), output).contiguous()
        return output.clone() if any(output is t for t in (*inputs, *tensors)) else output

    library.define(f"{name}(Tensor[] inputs, Tensor[] tensors, int site) -> Tensor")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{name}", run, lib=library)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    compiling = get_ident()

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        if get_ident() != compiling:  # another thread only runs it
            return opaque.function(*args, **kwargs)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        inputs: list[Tensor] = []
        for k, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                leaves[k] = _Position(len(inputs))
                inputs.append(leaf)
        opaque.calls.append(OpaqueCall(leaves, spec))
        output: Tensor = op(inputs, list(opaque.tensors.values()), len(opaque.calls) - 1)
        return output

    return stand_in


def check_output(what: str, output: Any) -> Tensor:
    """What a rule describes: one tensor."""
    if not isinstance(output, Tensor):
        raise UnsupportedError(
            f"{what} has a rule but returns {type(output).__name__}: a rule describes one output tensor. Split it"
        )
    return output


def _restore(module: nn.Module, own: Any) -> None:
    if own is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = own


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value
