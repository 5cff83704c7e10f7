"""Output and loss of a model as functions of its trainable parameters, on one batch."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..api import Loss
from ..compiler.capture.export import batch_size, check_instances, check_shapes, model_arguments, plain, takes_names
from ..compiler.running.torch_versions import WholeHeads
from ..compiler.translate.torch_modes import Random, own_dtypes, twice_differentiable
from ..errors import InputError, UnsupportedError
from ..runtime.fingerprint import fingerprint
from ..runtime.second_derivatives import ClosedForm
from .parts import Parts

Linear = Callable[[Any], Any]


class Reads(TorchFunctionMode):
    """While active, what is computed of parameters by themselves is refused: a product is of functions of theta."""

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        read = [self.names[id(leaf)] for leaf in pytree.tree_leaves((args, kwargs)) if id(leaf) in self.names]
        if read and any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in pytree.tree_leaves(made)):
            raise UnsupportedError(
                f"the loss itself reads {read[0]!r}, and a product has the derivatives by the model's output alone.\n"
                "  Let the model compute what it reads it for (the logits), or detach() it."
            )
        return made


class Problem:
    """Output and loss as functions of the trainable parameters, on one batch of `size` samples."""

    def __init__(self, model: nn.Module, loss: Loss, batch: tuple[Any, Any], named: bool | None = None) -> None:
        check_instances(model, loss)
        if not isinstance(model, nn.Module):
            raise InputError(f"model is {type(model).__name__}, not a torch.nn.Module")
        check_shapes(model)
        if not callable(loss):
            raise InputError(f"loss is {type(loss).__name__}: pass a function (output, y) -> scalar, or a module")
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise InputError("the batch must be the pair (x, y)")
        # Copies: what is kept of them for the products would change with the buffer that the next batch is read into.
        self.batch = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), tuple(map(plain, batch)))
        x, self.y = self.batch
        self.model, self.given_loss, self.size = model, loss, batch_size((x, self.y))
        self.named = takes_names(model, batch[0]) if named is None else named
        self.args, self.kwargs = model_arguments(model, x, self.named)
        self.theta = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        self.buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
        self.seen = partial(fingerprint, model, loss, pytree.tree_leaves(self.batch))
        self.state = self.seen()
        if not self.theta:
            raise InputError("the model has no trainable parameter: requires_grad_(True) on those of the matrix")
        for name, p in self.theta.items():
            if p.is_complex():
                raise UnsupportedError(f"{name!r} is complex: complex tensors are not supported")
        self.random = Random.of(next(iter(self.theta.values())).device)
        self.reads = Reads({id(p): name for name, p in model.named_parameters() if p.requires_grad})

    def output(self, theta: dict[str, Tensor]) -> Any:
        """The model's output. Buffers are copies; kernels are used that have second derivatives."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        with twice_differentiable():
            output = functional_call(self.model, theta | buffers, self.args, self.kwargs)
        for leaf in pytree.tree_leaves(output):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
                raise UnsupportedError(f"the model's output has a {kind} in it: return floating point tensors only")
        return output

    def own_dtypes(self) -> AbstractContextManager[object]:
        """Whatever autocast says, as a program."""
        return own_dtypes(next(iter(self.theta.values())).device)

    def loss(self, output: Any) -> Tensor:
        return self._loss_of(output, self.y)

    def _loss_of(self, output: Any, y: Any) -> Tensor:
        with WholeHeads(), twice_differentiable(), ClosedForm(), self.reads:
            value = self.given_loss(output, y)
        if not isinstance(value, Tensor) or value.ndim or not value.is_floating_point():
            shown = f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise InputError(
                f"the loss returns {shown}: it must be a floating point scalar. Take the mean or the sum over the batch"
            )
        return value

    def linearise(self) -> tuple[Any, Linear, Linear]:
        """The output, v -> Jv, u -> Jᵀu."""
        output, pull = vjp_of(self.output, self.theta)
        ones = pytree.tree_map(lambda leaf: leaf.new_ones(()).expand_as(leaf), output)
        _, push = vjp_of(pull, ones)  # any point: some kernels have none at zero
        return output, push, pull

    def parts(self) -> Parts | None:
        """The samples with the model's output, by one more forward; None where they are not on axis 0 of everything."""
        with self.random.again(), self.own_dtypes(), torch.no_grad():
            values = self.output(self.theta), self.y
        if not all(isinstance(t, Tensor) and t.shape[:1] == (self.size,) for t in pytree.tree_leaves(values)):
            return None
        return Parts(values, self._plain_loss, self.size)

    def _plain_loss(self, output: Any, y: Any) -> Tensor:
        with self.random.again(), self.own_dtypes():
            return self._loss_of(output, y)

    def recipe(self, label: str) -> tuple[Any, ...]:
        """What the product is made from, for pickle. Raises `TypeError` where that is gone, or cannot be pickled."""
        now = self.seen()
        if self.state is None or now is None or not self.state.matches(now):
            raise TypeError(
                f"{label}: model or loss changed since the product was made, or hide what they hold:\n"
                "  pickle the product before they change, or model, loss and batch instead"
            )
        try:
            functions = pickle.dumps((self.model, self.given_loss))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"{label}: a product is pickled as its model and loss, and one of them is not: {error}.\n"
                "  Define functions and classes in a module, not inside a function; no lambda"
            ) from error
        return functions, self.batch, self.named, self.theta, self.buffers, self.random


def vjp_of(function: Callable[[Any], Any], primal: Any) -> tuple[Any, Linear]:
    """The value and u -> Jᵀu, for a function of one tree of tensors."""
    value, pull = vjp(function, primal)[:2]
    return value, lambda u: pull(u)[0]
