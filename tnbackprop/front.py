"""The public face: compile and compute."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.utils import _pytree as pytree

from .compiler import Compiled, compile_program
from .compiler.capture import check_trainable
from .declare import Declaration, identity, resolve
from .errors import InputError, check_member
from .quantities import Quantity, check_quantities
from .runtime import Indefinite, Program, Result

Loss = Callable[..., torch.Tensor]


def compile(
    model: torch.nn.Module,
    loss: Loss | None,
    example: tuple[Any, Any],
    quantities: Sequence[Quantity],
    *,
    rules: Mapping[Any, Declaration] | None = None,
    memory_limit: float | str | None = None,
    indefinite: Indefinite = Indefinite.REFUSE,
) -> Program:
    """Compile a model with its loss and quantities to a program.

    model         any module that torch.export can capture; it is not changed. Its parameters' dtypes are those of the
                  program: torch.autocast has no effect on it
    loss          ``loss(output, y)`` -> scalar, a sum or mean over samples
    example       a batch ``(x, y)``; shapes other than the batch size are fixed by it
    quantities    what to compute: ``[tn.BatchL2(), tn.Variance()]``
    rules         from target to rule: ``tn.RULES | {MyLayer: my_rule}`` adds your own; None: the built-in rules and
                  those that `tn.rule` registered
    memory_limit  bytes (or "2GiB") that intermediate values may take at the example's batch size
    indefinite    a loss Hessian with negative eigenvalues has no square root: refuse, or clip them to zero

    Raises `InputError`, `UnsupportedError` and `RuleError`.
    """
    check_quantities(quantities)
    check_member("indefinite", indefinite, Indefinite)
    check_trainable(model, quantities)
    compiled = compile_program(model, loss, example, list(quantities), resolve(rules), _bytes(memory_limit))
    return Program(model, compiled, loss, quantities, indefinite)


def compute(
    model: torch.nn.Module,
    loss: Loss | None,
    batch: tuple[Any, Any],
    quantities: Sequence[Quantity],
    *,
    rules: Mapping[Any, Declaration] | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
) -> Result:
    """Compile (once per model, loss, quantities, rules and shapes) and run; `seed` and `generator` as for a `Program`.

    A model whose parameters, modes (train, eval) or trainable flags changed is compiled again; one whose layers
    changed otherwise is not noticed: use `compile` there. Rows of `rules` are told apart by identity: define them once.
    """
    check_quantities(quantities)
    check_trainable(model, quantities)
    key = _signature(model, loss, batch, quantities), identity(rules)
    programs = _PROGRAMS.setdefault(model, {})
    if key not in programs:
        resolved = resolve(rules)
        compiled = compile_program(model, loss, batch, list(quantities), resolved)
        programs[key] = compiled, (dict(rules or {}), resolved)
    return Program(model, programs[key][0], loss, quantities)(*batch, seed=seed, generator=generator)


_PROGRAMS: WeakKeyDictionary[torch.nn.Module, dict[Hashable, tuple[Compiled, object]]] = WeakKeyDictionary()
"""What `compute` has compiled, with the rows that its key names by identity; forgotten with the model."""


def _signature(
    model: torch.nn.Module, loss: Loss | None, batch: tuple[Any, Any], quantities: Sequence[Quantity]
) -> Hashable:
    """Everything that a compilation depends on, the batch size apart."""
    leaves, spec = pytree.tree_flatten(batch)
    inputs = tuple(
        (leaf.shape[1:], leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
    )
    state = tuple((name, p.shape, p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters())
    modes = tuple(module.training for module in model.modules())
    return loss, tuple(quantities), inputs, str(spec), state, modes


def _bytes(limit: float | str | None) -> int | None:
    """A number of bytes from a number or a text like "2GiB"."""
    if limit is None:
        return None
    amount: float = 0
    if isinstance(limit, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|[kMGT]i?B)\s*", limit)):
        unit = match[2].rstrip("B")
        amount = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** " kMGT".index(unit[:1] or " ")
    elif isinstance(limit, int | float) and not isinstance(limit, bool):
        amount = limit
    if not 1 <= amount < math.inf:
        raise InputError(
            f"memory_limit={limit!r} is no amount of memory: write bytes, or text like '500MB' or '2GiB'; "
            "None is no limit"
        )
    return int(amount)
