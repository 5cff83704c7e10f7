"""States of torch in which its numbers are the ones that are meant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd.forward_ad import unpack_dual
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedError


def own_dtypes(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: everything is computed in the dtypes that the tensors have."""
    kind = device.type
    known = torch.amp.autocast_mode.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if known and torch.is_autocast_enabled(kind) else nullcontext()


def check_plain(name: str, tensor: Tensor) -> None:
    """Refuse a tensor by which torch.func or forward-mode AD would differentiate what does not follow it."""
    if is_functorch_wrapped_tensor(tensor):
        what = "inside a torch.func transform (grad, vjp, jvp, jacrev, vmap, …)"
    elif unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
        what = "with a tangent (torch.autograd.forward_ad)"
    else:
        return
    raise UnsupportedError(
        f"{name} comes {what}: a program is not differentiated or vectorised, its results would have no derivative by "
        "it.\n  Ask for what you need as a quantity, transform loss(model(x), y) itself, or call the program outside."
    )


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """In place of kernels whose second derivative is missing (attention) or wrong (weight norm), ones that have it."""
    with sdpa_kernel(SDPBackend.MATH), _Plain():
        yield


class _Plain(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        function = _weight_norm if func is torch._weight_norm else func
        return function(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """g v / ‖v‖ with the norm over all axes but `dim`. The fused kernel takes ‖v‖ for a constant the second time."""
    return v * (g / torch.norm_except_dim(v, 2, dim))
