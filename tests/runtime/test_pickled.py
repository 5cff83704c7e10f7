"""What can be pickled and saved is, with its values; what cannot says what to do."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn

X, Y = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 1, 0, 1])
CE = nn.CrossEntropyLoss()
MAKE: dict[str, Callable[..., tn.CurvatureProduct]] = {
    "ggn": tn.ggn_product,
    "blocks": lambda *given: tn.ggn_product(*given, blocks=tn.Blocks.PARAMETER),
    "hessian": tn.hessian_product,
    "drawn": tn.fisher_product,
    "empirical": lambda *given: tn.fisher_product(*given, fisher=tn.Fisher.EMPIRICAL),
}


def drawing() -> nn.Sequential:
    """A model that draws masks and has buffers that its forward pass changes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Tanh(), nn.Linear(4, 2)).double()


def saved(value: Any) -> Any:
    """Written by torch.save, and read by torch.load as it is by default."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file)


@pytest.mark.thinned(3)
@pytest.mark.parametrize("read", [saved, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_results(read: Callable[[Any], Any]) -> None:
    quantities = [tn.Grad(), tn.KFLR(), tn.KFLR("joined", bias=tn.Bias.JOINED), tn.BatchL2()]
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    result = tn.compute(model, CE, (X, Y), quantities)
    again = read(result)
    assert torch.equal(again.loss, result.loss) and torch.equal(again.output, result.output)
    for quantity, by in result.items():
        assert list(again[quantity]) == list(by)
        for name, value in by.items():
            got = again[quantity][name]
            if isinstance(value, tn.KroneckerFactors):
                assert repr(got) == repr(value) and got.places == value.places
                value, got = value.inverse(0.1).to_dense(), got.inverse(0.1).to_dense()
            assert torch.equal(got, value)
    assert torch.equal(read(dict(result["kflr"]))["0.weight"].to_dense(), result["kflr"]["0.weight"].to_dense())


def test_factors_of_every_kind() -> None:
    """A diagonal factor, a block-diagonal leg, a layout, an eigendecomposition and an exact inverse."""
    embedding = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2)).double()
    image = nn.Sequential(nn.ConvTranspose2d(2, 4, 2, groups=2), nn.Flatten(), nn.Linear(36, 2)).double()
    for model, x in ((embedding, torch.arange(10).reshape(5, 2) % 5), (image, torch.randn(5, 2, 2, 2).double())):
        factors = tn.compute(model, CE, (x, Y), [tn.KFLR()])["kflr"]["0.weight"]
        v = torch.randn(factors.shape).double()
        for K in (factors, factors.inverse(0.1), factors.inverse(0.1, tn.Damping.EXACT)):
            torch.testing.assert_close(saved(K) @ v, K @ v)
        torch.testing.assert_close(saved(factors.eigh()).logdet(0.1), factors.logdet(0.1))


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", MAKE)
def test_products(name: str) -> None:
    """The same matrix, masks and drawn columns included, also after the parameters changed in place."""
    model = drawing()
    G = MAKE[name](model, CE, (X, Y))
    want = G.to_dense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    state = torch.get_rng_state()
    again = pickle.loads(pickle.dumps(G))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(again.to_dense(), want)
    torch.testing.assert_close(pickle.loads(pickle.dumps(again)).to_dense(), want)
    assert repr(again) == repr(G) and copy.deepcopy(G) is G


def test_products_with_statistics() -> None:
    """Running statistics that changed since."""
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double().eval()
    G = tn.ggn_product(model, CE, (X, Y))
    model.train()(X)
    model.eval()
    torch.testing.assert_close(pickle.loads(pickle.dumps(G)).to_dense(), G.to_dense())


def test_products_that_are_not_pickled() -> None:
    model, x = drawing(), X.clone()
    of_a_lambda = tn.ggn_product(model, lambda output, y: F.cross_entropy(output, y), (X, Y))
    with pytest.raises(TypeError, match=r"(?s)GGN: a product is pickled as its model and loss.*lambda.*in a module"):
        pickle.dumps(of_a_lambda)
    for change in (
        lambda: model.eval(),
        lambda: model.__setitem__(2, nn.ReLU()),
    ):
        G = tn.ggn_product(model, CE, (x, Y))
        pickle.dumps(G)
        change()
        with pytest.raises(TypeError, match=r"(?s)GGN: model or loss changed since.*pickle the product before"):
            pickle.dumps(G)
    G = tn.ggn_product(model, CE, (x, Y))
    before = G.to_dense()
    x.mul_(2)  # the product has a copy
    assert torch.equal(pickle.loads(pickle.dumps(G)).to_dense(), before)


def test_vectors_are_not_differentiated_through() -> None:
    """vmap over a product is several products; torch.func.grad through one is refused, for it would be half of it."""
    G = tn.ggn_product(nn.Linear(3, 2).double(), CE, (X, Y))
    v = torch.randn(3, 8, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(torch.func.vmap(G)(v), torch.stack([G(u) for u in v]))
    for run in (lambda u: u @ G(u), lambda u: torch.func.vmap(G)(torch.stack([u, u])).sum()):
        with pytest.raises(tn.UnsupportedError, match=r"GGN: .*torch\.func\.grad"):
            torch.func.grad(run)(v[0])


def with_zeros(h: Tensor) -> Tensor:
    """The first entry is 0, and has a derivative."""
    return torch.cat([h[:, :1] - h[:, :1].detach(), h[:, 1:]], 1)


TWICE: dict[str, Callable[[Tensor], Tensor]] = {
    "logcumsumexp": lambda h: h.logcumsumexp(1),
    "logcumsumexp_first": lambda h: torch.logcumsumexp(h, dim=-1)[:, :2],
    "logcumsumexp_relu": lambda h: h.logcumsumexp(dim=0 - 1).relu(),
    "logcumsumexp_cancelled": lambda h: (lambda s: torch.cat([s, -s], 1))(h.logcumsumexp(1)),
    "logcumsumexp_rows": lambda h: h.reshape(-1, 2, 2).logcumsumexp(1).flatten(1),
    "std_of_a_constant": lambda h: (h - h).std(1, keepdim=True) + h,
    "std": lambda h: torch.std(h, dim=1, keepdim=True, correction=0),
    "norm_at_zero": lambda h: (h - h).norm(dim=1, keepdim=True) + h,
    "norm_3_at_zero": lambda h: h.relu().norm(p=3, dim=1, keepdim=True),
    "prod_with_zeros": lambda h: with_zeros(h).prod(1, keepdim=True),
    "cumprod_with_zeros": lambda h: with_zeros(h).cumprod(1),
    "logsumexp_with_infinity": lambda h: h.masked_fill(h > 0.5, -torch.inf).logsumexp(1, keepdim=True),
    "pow_at_zero": lambda h: h.relu() ** 2,
    "scatter_prod": lambda h: torch.ones_like(h).scatter_reduce(1, torch.zeros_like(h).long(), with_zeros(h), "prod"),
    "hypot_at_zero": lambda h: torch.hypot(h.relu() + 1, h.flip(1).relu()),
}


class Through(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.function = nn.Linear(3, 4).double(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_at_zero(name: str) -> None:
    """Jᵀ H J with J by rows of autograd, which takes no second derivative."""
    model = Through(TWICE[name])
    output, theta = model(X), list(model.parameters())
    y = torch.randn(output.shape, generator=torch.Generator().manual_seed(2)).double()
    rows = [torch.autograd.grad(o, theta, retain_graph=True, materialize_grads=True) for o in output.flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    want = 2 / output.numel() * J.mT @ J
    assert torch.isfinite(want).all() and want.any()
    torch.testing.assert_close(tn.ggn_product(model, nn.MSELoss(), (X, y)).to_dense(), want)
