"""What torch.export says when it fails: where in the user's code it was, and nothing besides the error."""

from __future__ import annotations

import contextlib
import functools
import io
import linecache
import logging
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from .foreign import PACKAGE

TORCH = str(Path(torch.__file__).parent)
BETWEEN = (contextlib.__file__, functools.__file__, "<string>")
"""Code that runs between that of the user, beside torch's and this package's."""


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


class Quiet:
    """What torch logs and prints about an example that does not fit is said by the error."""

    def __init__(self) -> None:
        self.logger, self.guards = logging.getLogger(_EXAMPLE), logging.getLogger(_GUARDS)
        self.before, self.printed = self.logger.disabled, io.StringIO()
        self.redirected = contextlib.redirect_stderr(self.printed)

    def __enter__(self) -> None:
        self.logger.disabled = True
        self.guards.addFilter(_is_news)
        self.redirected.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.redirected.__exit__(kind, error, trace)
        self.logger.disabled = self.before
        self.guards.removeFilter(_is_news)
        graph = getattr(error, "partial_fx_graph", None)
        printed = self.printed.getvalue()
        sys.stderr.write(printed if graph is None else printed.replace(f"{graph}\n", ""))


_EXAMPLE, _GUARDS = "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Unable to find user code")
