"""Verify: a rule, a model or a program against torch.func in float64, up to the first wrong entry."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..declare import Declaration, resolve, row_of
from ..definitions.report import LeftOut, Row, Verification, message
from ..errors import InputError, VerificationError
from ..notation.rule import Rule
from ..quantities import Quantity, check_quantities
from ..runtime import Program
from .models import Batch, try_model, try_program
from .rules import Finding
from .trials import tried_with, try_rule


def verify(
    what: Declaration | type[nn.Module] | nn.Module | Program,
    x: Any = None,
    y: Any = None,
    *,
    module: type[nn.Module] | nn.Module | Sequence[nn.Module] | None = None,
    loss: Callable[..., Tensor] | None = None,
    quantities: Sequence[Quantity] | None = None,
    rules: Mapping[Any, Declaration] | None = None,
    seed: int = 0,
    check: bool = True,
) -> Verification:
    """Compare a rule, a model or a program with torch.func on the plain forward, in float64.

    what        a rule (a `Rule`, its text, or a function of the module) with its `module`; a module class that has a
                rule; a model; a `Program`
    x, y        a batch, or only the shape of x: (8, 3, 32, 32); drawn where None (not for a model)
    module      for a rule: its class, of which modules are drawn (every option changed once), or modules to try
    loss        for a model: the loss of its quantities; where None, mean squared error to a random target, or the mean
                squares of all tensors that a model returns, added up
    quantities  what is compared; where None, all (of a program: its own)
    rules       as for `compile`: where None, the built-in and the registered ones
    check       raise `VerificationError` at the first wrong entry; False: return the report

    Compared are, for every call with a rule: forward code, formula, Jacobians, native VJPs; then every quantity of
    every parameter, and, for a rule, of the inputs, second derivatives among them. Kronecker factors, approximate
    diagonals and what is drawn have their definitions, made of torch.func Jacobians of single lines; the report says
    which. Shapes are drawn: N = 1, axes of size 1, further axes where the text has `*s`. Parameters get noise, in a
    copy.

    Raises `VerificationError`, which names the first wrong entry and the likely cause; `RuleError` and
    `UnsupportedError` where a text is wrong; `InputError` where there is nothing to try it with.
    """
    if quantities is not None:
        check_quantities(quantities)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # not where tensors are made by default
        torch.manual_seed(seed)
        subject, findings = _findings(what, (x, y), module, loss, quantities, rules)
        report = _collected(subject, findings)
    if not report.rows:
        raise InputError(f"{report}\n  Nothing could be compared.")
    if check and report.first_wrong is not None:
        raise VerificationError(message(subject, report.first_wrong))
    return report


def _findings(
    what: Any,
    batch: Batch,
    module: Any,
    loss: Any,
    quantities: Sequence[Quantity] | None,
    rules: Mapping[Any, Declaration] | None,
) -> tuple[str, Iterator[Finding]]:
    if isinstance(what, Program):
        return f"the program of {type(what.model).__name__}", try_program(what, batch, quantities)
    if isinstance(what, nn.Module):
        return f"the model {type(what).__name__}", try_model(what, batch, loss, quantities, rules)
    table = resolve(rules)
    if isinstance(what, type) and what in table:
        what, module = table[what], module or what
    if isinstance(what, Rule | str) or (callable(what) and not isinstance(what, type)):
        made, left_out = tried_with(module)
        target = type(made[0].module)
        row = row_of(what, target)
        return f"the rule of {target.__name__}", try_rule(row, target, made, left_out, batch[0], quantities, table)
    shown = what.__name__ if isinstance(what, type) else type(what).__name__
    raise InputError(f"cannot verify {shown}: verify takes a rule with its module=, a model with x, or a Program")


def _collected(subject: str, findings: Iterator[Finding]) -> Verification:
    rows: list[Row] = []
    left_out: list[LeftOut] = []
    for finding in findings:
        if isinstance(finding, LeftOut):
            left_out.append(finding)
            continue
        rows.append(finding)
        if not finding.ok:
            break
    return Verification(subject, tuple(rows), tuple(left_out))
