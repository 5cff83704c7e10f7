"""The program that `explain` and `draw` look at."""

from __future__ import annotations

import argparse

import torch

import tnbackprop as tn

from .loading import batch_of, load, loss_of, model_of, quantities_of, target_for


def compiled(arguments: argparse.Namespace, default: tuple[str, ...]) -> tn.Program:
    """Compile what ``path.py:Name`` stands for with the quantities that were asked for."""
    torch.manual_seed(0)
    loaded = load(arguments.target)
    wanted = quantities_of(arguments.quantity, default, loaded)
    if isinstance(loaded.value, tn.Program) and not arguments.quantity:
        return loaded.value
    model = model_of(loaded)
    x, y = batch_of(loaded, model, arguments.input)
    loss = loss_of(loaded, arguments.loss, y)
    y = target_for(loaded, model, loss, x, y)
    return tn.compile(model, loss, (x, y), wanted, rules=getattr(loaded.file, "RULES", None))
