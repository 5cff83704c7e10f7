"""Checks of values, `assert good` and `if bad: raise …`: they ask a tensor for a bool, which no graph has.

The example has passed them, for it ran. While the model is exported each gives what it gave then; the program leaves
them out, and says so. `torch.distributions` has such checks in every constructor and every `log_prob`.
"""

from __future__ import annotations

import ast
import linecache
import math
import os
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

Place = tuple[str, int, int]
"""File, line, and which of its instructions."""
ASKS = Tensor.__bool__
"""What a mode sees where a tensor is asked for a bool."""


def place_of_check() -> Place | None:
    """Where the code stands that has just asked, if it only raises for the answer, or hands it to who does."""
    found = place_called_from()
    return found if found is not None and (found[0] == constraints.__file__ or found[1] in _checks(found[0])) else None


def place_called_from() -> Place | None:
    """Where the code stands that calls a function of torch, asked by a mode."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_name == "__torch_function__" or _is_ours(frame.f_code.co_filename)):
        frame = frame.f_back
    if frame is None:
        return None
    return frame.f_code.co_filename, frame.f_lineno, _firsts(frame.f_code)[frame.f_lasti // 2]


@lru_cache(1024)
def _firsts(code: CodeType) -> tuple[int, ...]:
    """For each instruction the first of those in a row for one piece of the source.

    A call is two in Python 3.11, of which it runs the second no longer once a function is warm.
    """
    pieces = list(code.co_positions())
    firsts: list[int] = []
    for k, piece in enumerate(pieces):
        firsts.append(firsts[-1] if k and piece == pieces[k - 1] else k)
    return tuple(firsts)


@lru_cache(256)
def _is_ours(file: str) -> bool:
    return os.path.dirname(file) == os.path.dirname(__file__)


@lru_cache(256)
def _checks(file: str) -> frozenset[int]:
    """The lines of the conditions of all checks in a file."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return frozenset()
    tests = [test for node in ast.walk(tree) if (test := _test_of(node)) is not None]
    return frozenset(line for test in tests for line in range(test.lineno, (test.end_lineno or test.lineno) + 1))


def _test_of(node: ast.AST) -> ast.expr | None:
    """The condition of a check."""
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) and not node.orelse:
        return node.test
    return node.test if isinstance(node, ast.Assert) else None


class Answering(TorchFunctionMode):
    """While active, checks of values give what `known` says, and losses are what they are in formulas.

    left_out  the checks that were asked
    """

    def __init__(self, known: dict[Place, bool]) -> None:
        super().__init__()
        self.known, self.left_out = known, set[Place]()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        place = place_of_check() if func is ASKS else None
        if place in self.known:
            self.left_out.add(place)
            return self.known[place]
        return FORMULAS.get(func, func)(*args, **(kwargs or {}))

    @property
    def lines(self) -> tuple[str, ...]:
        """What is left out, for people."""
        places = sorted({(file, line) for file, line, _ in self.left_out})
        return tuple(f"{file}, line {line}: {linecache.getline(file, line).strip()}" for file, line in places)


def _gaussian_nll(
    input: Tensor,
    target: Tensor,
    var: Tensor | float,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> Tensor:
    """½ (log v + (input - target)² / v) with v = max(var, eps); the derivative takes it for var, as torch does."""
    var = var if isinstance(var, Tensor) else torch.full_like(input, var)
    var = var.unsqueeze(-1) if var.ndim == input.ndim - 1 else var
    var = var + (var.clamp(min=eps) - var).detach()
    each = (var.log() + (input - target) ** 2 / var + (math.log(2 * math.pi) if full else 0)) / 2
    return each if reduction == "none" else each.mean() if reduction == "mean" else each.sum()


def _instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """With the running statistics it is batch norm, which writes to none; torch 2.7 writes back what it read."""
    if use_input_stats:
        own = (input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
        return F.instance_norm(*own)
    return F.batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)


READING: dict[Any, Callable[..., Any]] = {F.instance_norm: _instance_norm}
"""Functions that write where they should only read."""
FORMULAS: dict[Any, Callable[..., Any]] = {**READING, F.gaussian_nll_loss: _gaussian_nll}
"""And those that write with derivatives switched off, which no graph of formulas shows."""
