"""Where in the user's code an error was."""

from __future__ import annotations

import contextlib
import functools
import linecache
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from .foreign import PACKAGE

TORCH = str(Path(torch.__file__).parent)
BETWEEN = (contextlib.__file__, functools.__file__, "<string>")
"""Code that runs between that of the user, other than torch's and this package's."""


@dataclass(frozen=True)
class Place:
    """What was running.

    loss  the loss was, not the model
    path  dotted, of the innermost submodule of the model or of the loss; "" for the model or the loss itself
    kind  of that submodule
    line  the innermost line of the user's own code, on a line of its own; "" where there is none
    """

    loss: bool
    path: str
    kind: str
    line: str

    @property
    def whole(self) -> str:
        return "loss" if self.loss else "model"

    @property
    def within(self) -> str:
        """Where in it."""
        return f", in module {self.path!r} ({self.kind})" if self.path else ""


def place(wrapped: nn.Module, trace: TracebackType | None) -> Place:
    """Of an exception in a forward of `wrapped`, whose submodules are `model` and `loss`, which `loss_of` calls."""
    names = {id(module): name for name, module in wrapped.named_modules()}
    loss, started, found, line = False, False, "", ""
    for frame, number in traceback.walk_tb(trace):
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        started |= owner is wrapped
        loss |= owner is wrapped and code.co_name == "loss_of"
        if code.co_name == "forward" and id(owner) in names:
            found = names[id(owner)]
        if started and not code.co_filename.startswith((PACKAGE, TORCH)) and code.co_filename not in BETWEEN:
            text = linecache.getline(code.co_filename, number).strip()
            line = f"\n  {code.co_filename}, line {number}" + (f": {text}" if text else "")
    whole, _, path = found.partition(".")
    known = whole == ("loss" if loss else "model")
    return Place(loss, path if known else "", type(wrapped.get_submodule(found)).__name__, line)
