"""States of torch in which its numbers are the ones that are meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ...errors import UnsupportedError
from .torch_internals import (
    TorchDispatchMode,
    alone,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    is_gradtrackingtensor,
    weight_norm,
)


def device_of_module(module: nn.Module) -> torch.device:
    """That of its first parameter; without any, the CPU."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def own_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: everything is computed in the dtypes that the tensors have."""
    kind = device.type
    known = torch.amp.autocast_mode.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known and torch.is_autocast_enabled(kind) else nullcontext()


class InFloat64(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What is cast to a shorter dtype stays in float64: a model in float64 that casts on the way has exact numbers."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*map(_longest, args), **{name: _longest(value) for name, value in (kwargs or {}).items()})


def _longest(argument: Any) -> Any:
    return torch.float64 if isinstance(argument, torch.dtype) and argument.is_floating_point else argument


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuse a tensor by which torch.func or forward-mode AD would differentiate what does not follow it."""
    wrapped = is_functorch_wrapped_tensor(tensor)
    if not wrapped and unpack_dual(tensor).tangent is None:  # type: ignore[no-untyped-call]
        return
    what = "inside a torch.func transform (grad, vmap, …)" if wrapped else "with a tangent (torch.autograd.forward_ad)"
    raise UnsupportedError(
        f"{name} comes {what}: a program is not differentiated or vectorised, its results would have no derivative by "
        "it.\n  Ask for what you need as a quantity, transform loss(model(x), y) itself, or call the program outside."
    )


def check_constant(name: str, vector: Tensor) -> None:
    """Refuse the vector of a product by which torch.func or forward-mode AD takes a derivative; vmap may have it."""
    tensor = vector
    while is_functorch_wrapped_tensor(tensor) and not is_gradtrackingtensor(tensor):
        tensor = get_unwrapped(tensor)
    if is_gradtrackingtensor(tensor) or unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        raise UnsupportedError(
            f"{name} is differentiated by torch.func.grad, jvp or the like, and a product is not.\n"
            "  It is linear and symmetric: its derivative along u is the product with u"
        )


@dataclass(frozen=True)
class Random:
    """The states of torch's own generators from which a forward pass draws."""

    cpu: Tensor
    cuda: Tensor | None
    device: int | None

    @classmethod
    def of(cls, device: torch.device) -> Random:
        """As they are now."""
        if device.type != "cuda":
            return cls(torch.get_rng_state(), None, None)
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device), device.index)

    @contextmanager
    def again(self) -> Iterator[None]:
        """While it is open torch draws what it drew then; afterwards it goes on as if nothing had happened."""
        with torch.random.fork_rng([] if self.device is None else [self.device]):
            torch.set_rng_state(self.cpu)
            if self.cuda is not None:
                torch.cuda.set_rng_state(self.cuda, self.device or 0)
            yield


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """In place of kernels whose second derivative is missing (attention) or wrong (`_TWICE`), ones that have it."""
    with alone(), sdpa_kernel(SDPBackend.MATH), _Plain():  # which kernels there are is the same for all threads
        yield


class _Plain(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _TWICE.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖ with the norm over all axes but `dim`. The fused kernel takes ‖v‖ for a constant the second time."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _logcumsumexp(input: Tensor, dim: int) -> Tensor:
    """log Σ_{j ≤ i} exp(x_j). torch takes the logarithm of the cotangent, which has no derivative where that is 0."""
    x = input.movedim(dim, -1) if input.ndim else input.reshape(1)
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    sums = x.unsqueeze(-2).masked_fill(later, -torch.inf).logsumexp(-1)
    return sums.movedim(-1, dim) if input.ndim else sums.reshape(())


def _std(input: Tensor, *args: Any, **options: Any) -> Tensor:
    """The square root of the variance, with derivative 0 where that is 0, as torch has it the first time only."""
    variance = torch.var(input, *args, **options)
    return torch.where(variance == 0, variance, torch.where(variance == 0, 1, variance).sqrt())


_TWICE: dict[Any, Callable[..., Any]] = {
    weight_norm: _weight_norm,
    torch.logcumsumexp: _logcumsumexp,
    Tensor.logcumsumexp: _logcumsumexp,
    torch.std: _std,
    Tensor.std: _std,
}
