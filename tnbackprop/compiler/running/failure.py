"""Where in the user's code an error was."""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch
from torch import nn
from torch.fx import Node

from ..translate.foreign import PACKAGE

TORCH = str(Path(torch.__file__).parent)
STANDARD = Path(linecache.__file__).parent
"""Python's own library: it runs between the user's code, as do torch and this package, and code without a file."""


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
        if started and _of_user(code.co_filename):
            line = _line(code.co_filename, number)
    whole, _, path = found.partition(".")
    known = whole == ("loss" if loss else "model")
    return Place(loss, path if known else "", type(wrapped.get_submodule(found)).__name__, line)


def line_here() -> str:
    """The innermost line of the user's own code that a forward is at, on a line of its own; "" where there is none."""
    return line_at(frame_here())


def line_at(frame: FrameType | None) -> str:
    """The line that a frame is at."""
    return "" if frame is None else _line(frame.f_code.co_filename, frame.f_lineno)


def frame_here() -> FrameType | None:
    """The innermost frame of the user's own code in a forward; None where there is none."""
    for frame, _ in traceback.walk_stack(sys._getframe(1)):
        code = frame.f_code
        if _of_user(code.co_filename):
            return frame
        if code.co_filename.startswith(PACKAGE) and code.co_name in ("forward", "loss_of"):
            break
    return None


def line_of(node: Node) -> str:
    """The innermost line of the user's own code that a node of a graph is from, on a line of its own, or "".

    It is that of an operand where torch made the node itself.
    """
    for each in (node, *node.all_input_nodes):
        found = re.findall(r'File "(.+)", line (\d+), in', each.meta.get("stack_trace") or "")
        for file, number in reversed(found):
            if _of_user(file):
                return _line(file, int(number))
    return ""


def _of_user(file: str) -> bool:
    """Not of torch, which signs what it makes with a path that begins with its own name."""
    others = (PACKAGE, TORCH, "<string>", "<eval_with_key>", "torch/")
    return not file.startswith(others) and Path(file).parent != STANDARD


def _line(file: str, number: int) -> str:
    text = linecache.getline(file, number).strip()
    return f"\n  {file}, line {number}" + (f": {text}" if text else "")


def lacks_derivative(error: BaseException | None) -> bool:
    """Whether it is what torch raises where an operator has no derivative, or none of its derivative."""
    return isinstance(error, RuntimeError) and "is not implemented" in str(error)
