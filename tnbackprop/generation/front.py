"""`generate`: from a layer or a model to the source of one file."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..compiler.capture.export import batch_size, plain
from ..declare import Declaration, resolve
from ..errors import InputError
from ..notation.rule import Rule
from ..notation.syntax import nearest
from ..quantities import Quantity
from .autograd import autograd_quantities, autograd_source
from .backpack import as_backpack_scales, backpack_source
from .generated import Generated, Target
from .layer_file import layer_file, torch_source
from .layer_functions import prepare, refuse_for_layers
from .model_file import model_source
from .quantities import named
from .stand_in import stand_in


def generate(
    what: torch.nn.Module | Rule | str,
    quantities: Sequence[Quantity | str] | str,
    target: Target | str | None = None,
    *,
    example: Any,
    loss: Callable[..., torch.Tensor] | None = None,
    rules: Mapping[Any, Declaration] | None = None,
) -> Generated:
    """The source of one file with derivative quantities, that runs without this library.

    what        a module, or a rule (its text, or a `Rule`) for a layer on its own; with `loss` a whole model
    quantities  what to compute, as objects or keys: [tn.BatchGrad(), tn.KFLR()], or "batch_grad,kflr"
    target      `Target.TORCH` (the default for a layer): a function for each quantity and parameter.
                `Target.BACKPACK`: the same as module extensions of BackPACK 1.7.1. `Target.AUTOGRAD`: a
                torch.autograd.Function. `Target.MODEL` (the default with a loss): the whole program
    example     a layer's input, or a tuple of inputs; for a rule {operand: shape}, where "input" has the batch first
                and all others are parameters; for a model the batch (x, y)
    loss        of a whole model: ``loss(output, y)`` -> scalar
    rules       as for `compile`

    The file prints what it is, checks itself with ``--check``, and is the same every time for the same rule and shapes.
    A layer's functions get the cotangent of its output and columns [V, N, *output] of a root of the loss's
    Hessian as the loss scales them: L = Σ_n ℓ_n. Quantities that read operands, come in phases or are totals are those
    of a model's file: its ``compute(model, x, y, operands)`` is handed what they read.
    Raises `InputError`, `RuleError` and `UnsupportedError`.
    """
    found = named(quantities)
    aim = _target(target, loss)
    table = resolve(rules)
    if aim is Target.MODEL:
        if not isinstance(what, torch.nn.Module) or loss is None:
            raise InputError("Target.MODEL is a whole model: give a torch.nn.Module, loss= and example=(x, y)")
        return Generated(*model_source(what, loss, example, found, table))
    refuse_for_layers(found)
    if isinstance(what, Rule | str):
        what, example, table = stand_in(what, example, table)
    if not isinstance(what, torch.nn.Module):
        raise InputError(f"cannot generate from {type(what).__name__}: give a module, a rule, or a rule's text")
    inputs = [leaf for leaf in pytree.tree_leaves(plain(example)) if leaf is not None]
    batch_size((example, None))
    title = textwrap.shorten(repr(what).splitlines()[0].rstrip("("), 76, placeholder=" …")
    if aim is Target.BACKPACK:
        found = as_backpack_scales(found)
    if aim is Target.AUTOGRAD:
        found = autograd_quantities(found)
    file = layer_file(prepare(what, example, found, table), inputs)
    write = {Target.TORCH: torch_source, Target.BACKPACK: backpack_source, Target.AUTOGRAD: autograd_source}[aim]
    return Generated(write(file, title), aim, title, tuple(each.name for each in file.all))


def _target(target: Target | str | None, loss: object) -> Target:
    if target is None:
        return Target.TORCH if loss is None else Target.MODEL
    known = {each.value: each for each in Target}
    found = target if isinstance(target, Target) else known.get(target)
    if found is None:
        raise InputError(f"unknown target {target!r}: {nearest(str(target), known)}")
    if (found is Target.MODEL) != (loss is not None):
        need = "needs loss=" if loss is None else "takes no loss: it is a layer on its own"
        raise InputError(f"target {found.value!r} {need}; with a loss the target is 'model'")
    return found


