"""Models in float16 and bfloat16: what torch's kernels compute in float32 inside, programs do, too."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

D = 32
OPERATIONS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "layer norm": lambda: nn.LayerNorm(D),
    "layer norm without weights": lambda: nn.LayerNorm(D, elementwise_affine=False),
    "RMS norm": lambda: nn.RMSNorm(D),
    "RMS norm, eps": lambda: nn.RMSNorm(D, eps=1e-6),
    "group norm": lambda: nn.GroupNorm(4, D),
    "instance norm": lambda: nn.Sequential(nn.Unflatten(1, (4, 8)), nn.InstanceNorm1d(4, affine=True), nn.Flatten()),
    "norm": lambda: lambda x: x.norm(dim=-1, keepdim=True) / 64,
    "normalize": lambda: lambda x: F.normalize(x, dim=-1),
    "deviation": lambda: lambda x: x.std(-1, keepdim=True) / 64,
    "hypot": lambda: lambda x: torch.hypot(x, x.flip(-1)) / 64,
}  # fmt: skip


class Around(nn.Module):
    """A scale in front of an operation, and a linear layer after it."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.scale, self.operation = nn.Parameter(torch.ones(D)), operation
        self.head = nn.LazyLinear(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.operation(x * self.scale))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [0.001, 1.0, 300.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_large_and_small(name: str, size: float, dtype: torch.dtype) -> None:
    """As near to autograd in float64 as autograd in the narrow dtype is, or nearly, and in the narrow dtype."""
    torch.manual_seed(0)
    model, x, y = Around(OPERATIONS[name]()), size * torch.randn(4, D), torch.randn(4, 3)
    model(x)
    model, x, y = model.to(dtype), x.to(dtype), y.to(dtype)

    def slope(as_dtype: torch.dtype) -> Tensor:
        own = model.to(as_dtype)
        loss = F.mse_loss(own(x.to(as_dtype)), y.to(as_dtype))
        return torch.autograd.grad(loss, own.scale)[0].double()

    want = slope(torch.float64)
    error = (slope(dtype) - want).norm() / want.norm()
    model.to(dtype)
    result = tn.compute(model, F.mse_loss, (x, y), [tn.Grad(), tn.BatchGrad()])
    assert {each.dtype for each in result["grad"].values()} == {dtype}
    for found in (result["grad"]["scale"], result["batch_grad"]["scale"].sum(0)):
        assert (found.double() - want).norm() / want.norm() <= 4 * error + 8 * torch.finfo(dtype).eps
