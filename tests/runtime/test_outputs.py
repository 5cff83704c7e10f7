"""Models whose output is inside a dictionary or a tuple: of one tensor there is curvature, of several it is refused."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

QUANTITIES = [
    tn.DiagGGN(), tn.GGNTrace(), tn.DiagGGNMC(), tn.HessianDiag(), tn.HesScale(), tn.BL89(), tn.GGNGram(), tn.NTK(),
    tn.Jacobians(), tn.KFLR(), tn.KFRA(), tn.KFAC(),
]  # fmt: skip


class Shaped(nn.Module):
    """A network whose output goes through `shape`."""

    def __init__(self, shape: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.shape = shape

    def forward(self, x: Tensor) -> Any:
        return self.shape(self.body(x))


SHAPES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "dictionary": (lambda t: {"logits": t}, lambda o: o["logits"]),
    "with None": (lambda t: {"loss": None, "logits": t}, lambda o: o["logits"]),
    "tuple": (lambda t: (t,), lambda o: o[0]),
    "nested": (lambda t: {"out": [(t,)]}, lambda o: o["out"][0][0]),
    "twice": (lambda t: (t, t), lambda o: o[1]),
}
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "by rule": F.cross_entropy,
    "by torch.func": lambda f, y: (f.logsumexp(1) - f.gather(1, y[:, None])[:, 0]).mean(),
}


@pytest.mark.thinned(9)
@pytest.mark.parametrize("name, loss", list(product(SHAPES, LOSSES)))
def test_one_tensor(name: str, loss: str) -> None:
    """The numbers of the model that returns the tensor itself; the result's output is what the model returns."""
    shape, take = SHAPES[name]
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 1, 0])
    plain = tn.compute(Shaped(lambda t: t), LOSSES[loss], (x, y), QUANTITIES, seed=0)
    shaped = tn.compute(Shaped(shape), lambda o, y: LOSSES[loss](take(o), y), (x, y), QUANTITIES, seed=0)
    torch.testing.assert_close(take(shaped.output), plain.output)
    for key, values in plain.items():
        for parameter, want in values.items():
            got = shaped[key][parameter]
            if isinstance(want, tn.KroneckerFactors):
                got, want = got.to_dense(), want.to_dense()
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)


class Several(Shaped):
    """Logits, and what is computed of them."""

    def __init__(self) -> None:
        super().__init__(lambda t: {"logits": t, "hidden": (t.tanh(),)})

    @staticmethod
    def loss(o: Any, y: Tensor) -> Tensor:
        return F.cross_entropy(o["logits"] + o["hidden"][0], y)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["HessianDiag", "DiagGGN", "KFLR", "KFRA", "BL89"])
def test_several_tensors(kind: str) -> None:
    """Those of a model that returns them side by side."""
    beside = Shaped(lambda t: torch.cat([t, t.tanh()], 1))
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3
    got = tn.compute(Several(), Several.loss, (x, y), [getattr(tn, kind)()])
    want = tn.compute(beside, lambda o, y: F.cross_entropy(o[:, :3] + o[:, 3:], y), (x, y), [getattr(tn, kind)()])
    for values, wanted in zip(got.values(), want.values(), strict=True):
        for name, value in values.items():
            pair = value, wanted[name]
            torch.testing.assert_close(*(v.to_dense() if isinstance(v, tn.KroneckerFactors) else v for v in pair))


def test_jacobians_of_several_tensors() -> None:
    """The message has what was asked for, the outputs and what to do; products take them."""
    model, loss = Several(), Several.loss
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.arange(5) % 3
    message = (
        r"is needed for Jacobians, and the loss reads 2: \['logits'\] \[N, 3\], \['hidden'\]\[0\] "
        r"\[N, 3\]\.\n  Wrap it in a module .* torch.cat .* tn.ggn_product"
    )
    with pytest.raises(tn.UnsupportedError, match=message):
        tn.compile(model, loss, (x, y), [tn.Jacobians()])
    assert tn.ggn_product(model, loss, (x, y)).shape == (31, 31)
    assert list(tn.compute(model, loss, (x, y), [tn.BatchL2()])) == ["batch_l2"]
