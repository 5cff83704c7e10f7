"""`tnbackprop generate`: a file with a layer's or a model's quantities, that runs without this library."""

from __future__ import annotations

import argparse

import torch

import tnbackprop as tn

from .loading import batch_of, free, load, loss_of, model_of, quantities_of, target_for


def run(arguments: argparse.Namespace) -> int:
    """0. Raises `InputError` where the file or the quantity is not there, or the output is."""
    torch.manual_seed(0)
    free(arguments.output, arguments.force)
    loaded = load(arguments.target)
    wanted = quantities_of(arguments.quantity, ("batch_grad",), loaded)
    model, rules = model_of(loaded), getattr(loaded.file, "RULES", None)
    x, y = batch_of(loaded, model, arguments.input)
    if arguments.model:
        loss = loss_of(loaded, arguments.loss, y)
        y = target_for(loaded, model, loss, x, y)
        made = tn.generate(model, wanted, tn.Target.MODEL, example=(x, y), loss=loss, rules=rules)
    else:
        made = tn.generate(model, wanted, tn.Target(arguments.kind), example=x, rules=rules)
    print(made.save(arguments.output, force=arguments.force))
    return 0
