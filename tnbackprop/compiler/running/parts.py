"""Operators that are made of others, as they are called while a model is exported: by their parts at once.

What torch.export finds afterwards it takes apart, too, but has to trace the whole graph again for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...table import Composite, Rules
from ..translate.torch_internals import arguments_of, name_of
from .torch_versions import overload_called

FUNCTIONS = (torch, torch.nn.functional, torch.Tensor)
"""Where torch has functions that are operators."""


class Parts(TorchFunctionMode):
    """While active, a function of torch that is such an operator calls what its row has in its place."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.known: dict[Any, tuple[str, dict[str, Any]]] = {}
        for target, row in rules.items():
            if isinstance(row, Composite) and row.function is not None:
                name, overload = name_of(target)
                for function in {getattr(place, name, None) for place in FUNCTIONS} - {None}:
                    self.known.setdefault(function, (name, {}))[1][overload] = target, row.function

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        known, kwargs = self.known.get(func), kwargs or {}
        if known is None:
            return func(*args, **kwargs)
        name, rows = known
        found = rows.get(overload_called(name, args, kwargs))
        if found is None:
            return func(*args, **kwargs)
        target, function = found
        positional, named = _ordered(target, args, kwargs)
        return function(*positional, **named)


def _ordered(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as the operator's schema has them: by their places, and by name where it says so."""
    placed = [argument for argument in arguments_of(target) if not argument.kwarg_only]
    known = {argument.name for argument in placed}
    given = {name if name in known or name != "input" else "self": value for name, value in kwargs.items()}
    ordered = list(args)
    last = max((k for k, argument in enumerate(placed) if argument.name in given), default=-1)
    for argument in placed[len(args) : last + 1]:
        ordered.append(given.pop(argument.name, argument.default_value))
    return ordered, given
