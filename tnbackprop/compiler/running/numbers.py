"""Numbers of sizes: while a model is exported, `int` and `float` of a batch size are sizes where Python's fix it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

from ..translate.torch_internals import alone


class _Numbers(type):
    """Of `int` and `float` that leave a size what it is."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, cls.__mro__[1])

    def __call__(cls, *args: Any, **options: Any) -> Any:
        own: type = cls.__mro__[1]
        if len(args) != 1 or not isinstance(args[0], torch.SymInt | torch.SymFloat):
            return own(*args, **options)
        return SYMBOLIC[own](args[0])


SYMBOLIC: dict[type, Callable[[Any], Any]] = {int: torch.sym_int, float: torch.sym_float}
NUMBERS = {"int": _Numbers("int", (int,), {}), "float": _Numbers("float", (float,), {})}


def reads_numbers(frame: FrameType) -> bool:
    """Whether its code calls one of them."""
    return bool(NUMBERS.keys() & set(frame.f_code.co_names))


@contextmanager
def numbers_of_sizes(modules: Sequence[dict[str, Any]]) -> Iterator[None]:
    """While active, `int` and `float` of a size are sizes in these modules: Python's take the number of the example."""
    with alone():
        added = [(own, name) for own in modules for name in NUMBERS if name not in own]
        for own, name in added:
            own[name] = NUMBERS[name]
        try:
            yield
        finally:
            for own, name in added:
                own.pop(name, None)
