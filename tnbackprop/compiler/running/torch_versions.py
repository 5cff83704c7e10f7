"""What older versions of torch do otherwise, so that one compiler serves all that it is for: a fact each, in one place.

Each is told by what the installed torch has, or holds for all; none goes by the number of a version.
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decompositions
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import sym_node
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from ..translate.torch_internals import alone

COMPARED: dict[str, Any] | None = getattr(sym_node, "alternate_impl_if_hinted_methods", None)
"""How `min` and `max` of sizes ask which is less in torch 2.7, so that a graph is of a range; None: they are sizes."""


BUILT_IN = frozenset({list, tuple, dict, set, str, frozenset, bytes, range})


@contextmanager
def sizes_by_builtins() -> Iterator[None]:
    """While active, `len` of a tensor is a size, as are `min` and `max` of two numbers of which one is.

    Python itself takes no more than an int from `__len__`. For other threads they are what they were.
    """
    with alone():
        own = {name: getattr(builtins, name) for name in ("len", "min", "max")}
        compared = dict(COMPARED or {})
        builtins.len = _length(builtins.len)
        if COMPARED is not None:
            builtins.min, builtins.max = partial(_of_sizes, min, torch.sym_min), partial(_of_sizes, max, torch.sym_max)
            COMPARED.clear()
        try:
            yield
        finally:
            vars(builtins).update(own)
            if COMPARED is not None:
                COMPARED.update(compared)


def _length(own: Callable[[Any], int]) -> Callable[[Any], int]:
    """It is called ten thousand times while a small model is exported."""

    def length(of: Any, /) -> int:
        return of.shape[0] if type(of) not in BUILT_IN and isinstance(of, Tensor) and of.ndim else own(of)

    return length


def _of_sizes(own: Callable[..., Any], symbolic: Callable[[Any, Any], Any], *args: Any, **options: Any) -> Any:
    sizes = len(args) == 2 and not options and any(isinstance(value, torch.SymInt | torch.SymFloat) for value in args)
    return symbolic(*args) if sizes else own(*args, **options)


@contextmanager
def lstm_states() -> Iterator[None]:
    """While active, the last states that an LSTM is traced with are [layers, N, H]; torch 2.7 has [layers, 1, N, H].

    It then removes the wrong axis in its decomposition, from which the shapes are known.
    """
    with alone():
        own = decompositions.one_layer_lstm
        decompositions.one_layer_lstm = partial(_one_layer, own)
        try:
            yield
        finally:
            decompositions.one_layer_lstm = own


def _one_layer(own: Callable[..., Any], inp: Tensor, hidden: tuple[Tensor, Tensor], *args: Any, **options: Any) -> Any:
    output, last = own(inp, hidden, *args, **options)
    return output, tuple(a[0] if a.ndim > first.ndim else a for a, first in zip(last, hidden, strict=True))


HEADS = getattr(F, "linear_cross_entropy", None)
"""A linear map and the cross-entropy of it in one function of Python; None before torch 2.13."""


class WholeHeads(TorchFunctionMode):
    """While active, `F.linear_cross_entropy` is its two operators, also where it is asked to work in chunks.

    Those have a backward pass of their own, without second derivatives; the numbers are the same.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **{**(kwargs or {}), **({"options": None} if func is HEADS else {})})


def asked_by_checkpoint() -> bool:
    """Whether `torch.utils.checkpoint` has just called a mode: in torch 2.7 it reads `grad_fn`, for itself."""
    frame = sys._getframe(1)
    while frame.f_code.co_name == "__torch_function__" and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code.co_filename == checkpoint.__file__


def refuse_valueless(program: torch.export.ExportedProgram) -> None:
    """A constant without values, as `.data` makes one, which newer versions refuse. Raises `RuntimeError`."""
    if any(isinstance(constant, FakeTensor) for constant in program.constants.values() if isinstance(constant, Tensor)):
        raise RuntimeError("a tensor is made past the operators that can be followed")


def overload_called(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The overload of one of torch's own operators that a call with these arguments is of; "" where there is none."""
    try:
        return str(torch._C._jit_resolve_packet(f"aten::{name}", *args, **kwargs))
    except RuntimeError:  # what functions call input may be self in the schema
        named = {"self" if key == "input" else key: value for key, value in kwargs.items()}
        return overload_called(name, args, named) if named.keys() != kwargs.keys() else ""
