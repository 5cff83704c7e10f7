"""Operators that are made of others, as they are called while a model is exported: by their parts at once.

What torch.export finds afterwards it takes apart, too, but has to trace the whole graph again for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import get_ident
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ...table import Composite, Rules
from ..translate.torch_internals import OpOverload, alone, arguments_of, name_of
from .torch_versions import overload_called

FUNCTIONS = (torch, F, torch.Tensor)
"""Where torch has functions that are operators."""


@contextmanager
def in_parts(rules: Rules) -> Iterator[None]:
    """While active, this thread's calls of such operators are calls of what their rows have in their place.

    A mode sees those that a model makes, and not those inside of functions of `torch.nn.functional`.
    """
    mode, thread = Parts(rules), get_ident()
    own = {name: function for name, function in vars(F).items() if _known(function, mode)}

    def called(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made_of = mode.parts(function, args, kwargs) if get_ident() == thread else None
        return function(*args, **kwargs) if made_of is None else made_of()

    with alone(), mode:
        try:
            vars(F).update({name: partial(called, function) for name, function in own.items()})
            yield
        finally:
            vars(F).update(own)


def _known(function: Any, mode: Parts) -> bool:
    return isinstance(function, BuiltinFunctionType) and function in mode.known


class Parts(TorchFunctionMode):
    """While active, a function of torch that is such an operator calls what its row has in its place."""

    def __init__(self, rules: Rules) -> None:
        super().__init__()
        self.known: dict[Any, tuple[str, dict[str, Any]]] = {}
        for target, row in rules.items():
            if isinstance(row, Composite) and row.function is not None:
                name, overload = name_of(target)
                own = getattr(torch.linalg, name.removeprefix("linalg_"), None) if name.startswith("linalg_") else None
                for function in {own, *(getattr(place, name, None) for place in FUNCTIONS)} - {None}:
                    if not isinstance(function, FunctionType):  # in Python: another signature
                        self.known.setdefault(function, (name, {}))[1][overload] = target, row.function

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made_of = self.parts(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if made_of is None else made_of()

    def parts(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Callable[[], Any] | None:
        """What a call of a function is, by its row; None where it has none."""
        name, rows = self.known.get(func, ("", {}))
        found = rows.get(overload_called(name, args, kwargs)) if rows else None
        if found is None:
            return None
        target, function = found
        positional, named = _ordered(target, args, kwargs)
        return partial(function, *positional, **named)


def _in_real_numbers(scatter: OpOverload, input: Tensor, source: Tensor, *places: Any, **named: Any) -> Any:
    """A complex slice, row or diagonal that is written, as two real ones, of which torch has derivatives."""
    if not input.is_complex():
        return NotImplemented  # it stays as it is
    own = (each.to(input.dtype) + 0 for each in (input, source))  # the sum is not conjugate, as a view of others may be
    whole, part = (torch.view_as_real(each).unbind(-1) for each in own)
    return torch.complex(*(scatter(a, b, *places, **named) for a, b in zip(whole, part, strict=True)))


aten = torch.ops.aten
WRITES = {
    scatter: partial(_in_real_numbers, scatter)
    for scatter in (aten.slice_scatter.default, aten.select_scatter.default, aten.diagonal_scatter.default)
}
"""What writing in place becomes in a graph, where torch knows no derivative of it for complex numbers."""


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
