"""What a call of the model hands in, in the structure that the program was compiled for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..compiler.capture.export import plain
from ..compiler.program.inputs import specs_of
from ..errors import InputError
from ..runtime.given import in_order
from ..runtime.program import Program

OPTIONS = (bool, int, float, complex, str, bytes, torch.dtype, torch.device)
"""What says how, and is no tensor."""


def as_compiled(program: Program, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The x of a call: arguments have names and places, and those that are as by default may be left out.

    Raises `InputError` for an option that is not as by default: a program has that of its example.
    """
    first, *_ = specs_of(program.compiled.graph)
    plainly = kwargs or (args[0] if len(args) == 1 else args)
    if not (args and kwargs) and pytree.tree_structure(given := in_order(plain(plainly), first)) == first:
        return given
    signature = inspect.signature(program.model.forward)
    bound = signature.bind(*args, **kwargs)
    for each in _ways(bound, signature.parameters):
        given = in_order(plain(each), first)
        if given is not None and pytree.tree_structure(given) == first:
            return given
    for name, value in bound.arguments.items():
        default = signature.parameters[name].default
        if isinstance(value, OPTIONS) and not _same(value, default):
            than = "" if default is inspect.Parameter.empty else f", not {default!r} as by default"
            raise InputError(
                f"attach: the model is called with {name}={value!r}{than}, and a program is of tensors alone: set "
                "options on the model, or bind them to it, before tn.compile"
            )
    return plainly


def _ways(bound: inspect.BoundArguments, parameters: Mapping[str, inspect.Parameter]) -> Iterator[Any]:
    """By name and by place, without what is as by default, and with it."""

    def left(name: str, value: Any) -> bool:
        return value is None or (name in parameters and _same(value, parameters[name].default))

    yield {name: each for name, each in bound.arguments.items() if not left(name, each)}
    yield {name: each for name, each in bound.arguments.items() if each is not None}
    yield dict(bound.arguments)
    if all(left(name, each) for name, each in bound.kwargs.items()):
        places, names = list(bound.args), list(parameters)
        while places and left(names[min(len(places), len(names)) - 1], places[-1]):
            places.pop()
        yield from places if len(places) == 1 else ()
        yield tuple(places)
        yield bound.args


def _same(value: Any, default: Any) -> bool:
    """Whether an option is as by default."""
    return isinstance(value, OPTIONS) and type(value) is type(default) and bool(value == default)
