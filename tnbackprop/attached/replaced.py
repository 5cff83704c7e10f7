"""What a module runs while a program is attached to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..compiler.running.torch_calls import call_of, replace_call
from ..errors import InputError


def check_detached(model: nn.Module) -> None:
    """Raises `InputError` for a model that a program is attached to."""
    if isinstance(call_of(model), Replaced):
        raise InputError("the model is attached to a program: leave the block `with tn.attach(…)`, and compile then")


@dataclass(eq=False)
class Replaced:
    """What a module runs in the block, where hooks are part of the program; and what it ran before."""

    call: Callable[..., Any]
    before: Any
    plain: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)


def taken_away(module: nn.Module, mine: Replaced) -> None:
    """Also from below what was attached later to the same module and is left later: a loss may be of two models."""
    top = call_of(module)
    if top is mine:
        replace_call(module, mine.before)
        return
    while isinstance(top, Replaced):
        if top.before is mine:
            top.before, top.plain = mine.before, mine.plain
        top = top.before
