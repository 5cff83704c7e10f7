"""What torch has no public name for: calls of modules, lists of what is traced, what a backward pass is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from ..translate.torch_internals import alone


@contextmanager
def lists_as(told: Callable[[Callable[[Tensor], Any], Tensor], Any]) -> Iterator[None]:
    """While active, `tolist` of a tensor that is traced is this, of torch's own and the tensor: no mode sees a call."""
    with alone():
        own = {traced: traced.tolist for traced in (FakeTensor, FunctionalTensor)}
        for traced, function in own.items():
            traced.tolist = partialmethod(_asked, told, function)  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            for traced, function in own.items():
                traced.tolist = function  # type: ignore[method-assign]


def _asked(tensor: Tensor, told: Callable[..., Any], own: Callable[[Tensor], Any]) -> Any:
    return told(own, tensor)


def call_of(module: nn.Module) -> Any:
    """What calling a module runs in the place of its forward and hooks; None: those."""
    return vars(module).get("_compiled_call_impl")


def replace_call(module: nn.Module, call: Any) -> None:
    """Calling the module runs this, hooks and all; None: its own again. Copies and files of it have their own."""
    if call is None:
        vars(module).pop("_compiled_call_impl", None)
    else:
        vars(module)["_compiled_call_impl"] = call


def called(module: nn.Module, before: Any) -> Callable[..., Any]:
    """What calling the module ran when `call_of` gave that."""
    whole: Callable[..., Any] = module._call_impl if before is None else before
    return whole


def keeps_graph() -> bool:
    """Whether the backward pass that runs was asked to leave its graph, with retain_graph=True."""
    kept: bool = torch._C._autograd._get_current_graph_task_keep_graph()
    return kept


def is_one(cotangent: Tensor | None) -> bool:
    """Whether it is no batch of many, which autograd sends through one graph as if it were one."""
    keys = None if cotangent is None else torch._C._dispatch_keys(cotangent)
    return keys is None or not keys.has("Batched")
