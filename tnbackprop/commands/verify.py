"""`tnbackprop verify`: a rule, a model or a program of a user's file against torch.func."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

import tnbackprop as tn

from .loading import Loaded, batch_of, load, loss_of, model_of, quantities_of, required, target_for


def run(arguments: argparse.Namespace) -> int:
    """0: it agrees; 1: it is wrong, or its text is."""
    torch.manual_seed(arguments.seed)
    loaded = load(arguments.target)
    wanted = quantities_of(arguments.quantity, (), loaded) if arguments.quantity else None
    rule = _rule(loaded)
    try:
        if rule is not None:
            report = _verify_rule(arguments, loaded, rule, wanted)
        else:
            report = _verify_model(arguments, loaded, wanted)
    except (tn.RuleError, tn.UnsupportedError) as error:
        print(f"{arguments.target}: {error}", file=sys.stderr)
        return 1
    print(report)
    return 0 if report.ok else 1


def _rules(loaded: Loaded) -> Mapping[Any, Any] | None:
    """The file's own table; without one, what it registered when it was imported."""
    rules = getattr(loaded.file, "RULES", None)
    if rules is not None and not isinstance(rules, Mapping):
        raise tn.InputError(f"RULES of {loaded.file.__file__} is {type(rules).__name__}, not a mapping of rules")
    return rules


def _table(loaded: Loaded) -> Mapping[Any, Any]:
    return _rules(loaded) or tn.RULES | tn.REGISTRY


def _rule(loaded: Loaded) -> Any:
    """The rule that the name stands for: itself, or that of the class; None for a model."""
    value = loaded.value
    if isinstance(value, type) and issubclass(value, nn.Module):
        return _table(loaded).get(value)
    if isinstance(value, tn.Rule | str):
        return value
    row = callable(value) and not isinstance(value, nn.Module | tn.Program | type)
    return value if row and required(value) else None


def _verify_rule(
    arguments: argparse.Namespace, loaded: Loaded, rule: Any, wanted: list[tn.Quantity] | None
) -> tn.Verification:
    module: Any = loaded.named(arguments.module) if arguments.module else loaded.value
    if not isinstance(module, nn.Module | type):
        rows = _table(loaded).items()
        module = next((target for target, row in rows if row is rule and isinstance(target, type)), None)
        if module is None:
            raise tn.InputError(
                f"nothing says which module {loaded.place} is the rule of\n"
                "  Name its class or an instance: --module MyLayer; or enter it in the file's RULES."
            )
    x = batch_of(loaded, nn.Identity(), arguments.input)[0] if arguments.input else None
    return tn.verify(rule, x, module=module, quantities=wanted, rules=_rules(loaded), seed=arguments.seed, check=False)


def _without_loss(loaded: Loaded, wanted: list[tn.Quantity] | None) -> list[tn.Quantity]:
    """The quantities of a model without a loss: derivatives of its output. Raises `InputError` for others."""
    own: list[tn.Quantity] = [tn.Jacobians(), tn.NTK()]
    need = [q.name for q in wanted or () if any(each.needs_loss for each in q.propagations)]
    if need:
        raise tn.InputError(
            f"{', '.join(need)} of {loaded.place} need{'s' * (len(need) == 1)} a loss, and it has none\n"
            f"  Give --loss cross_entropy or mse, or ask for {' or '.join(q.name for q in own)}."
        )
    return wanted or own


def _verify_model(arguments: argparse.Namespace, loaded: Loaded, wanted: list[tn.Quantity] | None) -> tn.Verification:
    if isinstance(loaded.value, tn.Program):
        return tn.verify(loaded.value, quantities=wanted, seed=arguments.seed, check=False)
    model = model_of(loaded)
    x, y = batch_of(loaded, model, arguments.input)
    loss = loss_of(loaded, arguments.loss, y)
    if loss is None:
        wanted = _without_loss(loaded, wanted)
    y = target_for(loaded, model, loss, x, y)
    return tn.verify(model, x, y, loss=loss, quantities=wanted, rules=_rules(loaded), seed=arguments.seed, check=False)
