"""A loss that moves, cuts or sums the output before it reads it has the root of torch's loss, not one by torch.func."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev
from torch.nn import functional as F

import tnbackprop as tn

Loss = Callable[[Tensor, Tensor], Tensor]
MOVED: dict[str, Loss] = {
    "flattened": lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten()),
    "classes on axis 1": lambda f, y: F.cross_entropy(f.transpose(1, 2), y),
    "next word": lambda f, y: F.cross_entropy(f[:, :-1].reshape(-1, 4), y[:, 1:].reshape(-1)),
    "last word": lambda f, y: F.cross_entropy(f[:, -1], y[:, -1], label_smoothing=0.1),
    "mean over positions": lambda f, y: F.cross_entropy(f.mean(1), y[:, 0], reduction="sum"),
    "temperature": lambda f, y: F.cross_entropy(f.flatten(0, 1) / 2.5, y.flatten()),
    "ignored": lambda f, y: F.cross_entropy(f.flatten(0, 1), y.masked_fill(y == 1, -100).flatten()),
    "squeezed": lambda f, y: F.mse_loss(f[..., :1].squeeze(-1), y.to(f)),
    "binary": lambda f, y: F.binary_cross_entropy_with_logits(f[..., 0].reshape(-1), (y > 1).to(f).reshape(-1)),
    "in parts": lambda f, y: -F.log_softmax(f.transpose(1, 2), 1).gather(1, y[:, None]).mean(),
}
OTHERWISE: dict[str, Loss] = {
    "read twice": lambda f, y: F.cross_entropy(f.flatten(0, 1), y.flatten()) + f.square().mean(),
    "more elements": lambda f, y: F.mse_loss(f.repeat(1, 2, 1).flatten(1), y.repeat(1, 8).to(f)),
    "not linear": lambda f, y: F.mse_loss(f.tanh()[..., 0], y.to(f)),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", [*MOVED, *OTHERWISE])
def test_curvature(name: str) -> None:
    """Both against J^T H J and the Hessian by torch.func, in float64; the root by rule wherever there is one."""
    loss = (MOVED | OTHERWISE)[name]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x, y = torch.randn(3, 5, 3, dtype=torch.float64), torch.randint(0, 4, (3, 5))
    program = tn.compile(model, loss, (x, y), [tn.DiagGGN(), tn.HessianDiag()])
    result = program(x, y)
    parameters = {key: p.detach() for key, p in model.named_parameters()}
    apply: Callable[..., Tensor] = lambda p: functional_call(model, p, (x,))  # noqa: E731
    output = apply(parameters)
    curvature = hessian(lambda f: loss(f, y))(output).reshape(output.numel(), -1)
    jacobian, second = jacrev(apply)(parameters), hessian(lambda p: loss(apply(p), y))(parameters)
    for key, p in parameters.items():
        columns = jacobian[key].reshape(output.numel(), -1)
        ggn = torch.einsum("ai,ab,bi->i", columns, curvature, columns)
        torch.testing.assert_close(result["diag_ggn"][key], ggn.reshape(p.shape))
        torch.testing.assert_close(
            result["hessian_diag"][key], second[key][key].reshape(p.numel(), -1).diagonal().reshape(p.shape)
        )
    assert ("torch.func.vmap" in program.source) == (name in OTHERWISE)
