"""Capturing is a pure function of what a model is, not of its numbers: what is compiled again is not captured again.

As for `tn.compute`, values of parameters, buffers and the example are free: a graph reads none of them. Tensors that a
model or a loss holds without registering them are known by identity.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from tnbackprop.compiler.translate.graph import Graph
from tnbackprop.compiler.translate.torch_internals import peek_interpreter_stack
from tnbackprop.rules import RULES
from tnbackprop.runtime.fingerprint import Fingerprint, fingerprint

Capture = Callable[[nn.Module, Any, Any, Any], Graph]
KEPT = 256


class Captures:
    """The latest graphs, by what they were captured from.

    hits  how often one was there
    """

    def __init__(self, capture: Capture) -> None:
        self.capture, self.hits = capture, 0
        self._kept: OrderedDict[object, list[tuple[Fingerprint, Graph]]] = OrderedDict()

    def __call__(self, model: nn.Module, loss: Any, example: Any, rules: Any) -> Graph:
        added = [row for row in rules.items() if RULES.get(row[0]) is not row[1]]
        own = fingerprint(model, loss, len(rules), added) if isinstance(model, nn.Module) else None
        if own is None:
            return self.capture(model, loss, example, rules)
        kept = self._kept.setdefault(tensors := (_around(), _tensors(model, example)), [])
        self._kept.move_to_end(tensors)
        for other, graph in kept:
            if other.matches(own):
                self.hits += 1
                return graph
        graph = self.capture(model, loss, example, rules)
        if all(call.module is None for call in graph.calls):
            kept.append((own, graph))
        if len(self._kept) > KEPT:
            self._kept.popitem(last=False)
        return graph


def _around() -> object:
    """What torch does around a compilation: it is captured anew in every other mode."""
    modes = torch._C._len_torch_function_stack(), torch._C._len_torch_dispatch_stack(), peek_interpreter_stack()
    casts = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    return *modes, *casts, torch.is_grad_enabled(), torch.is_inference_mode_enabled()


def _tensors(model: nn.Module, example: Any) -> object:
    """What every tensor is, but for its numbers."""
    leaves, spec = pytree.tree_flatten(example)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers()), **dict(enumerate(leaves))}
    return str(spec), *((name, _kind(value)) for name, value in tensors.items())


def _kind(value: Any) -> object:
    if not isinstance(value, torch.Tensor):
        return repr(value)
    return value.dtype, value.device, tuple(value.shape), value.stride(), value.requires_grad
