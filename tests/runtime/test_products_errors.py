"""Products that cannot be, and vectors that do not fit: each message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnbackprop as tn

from ..cases import seq
from ..models import Apply, frozen
from .test_products import BY_NAME, NOT_TWICE, draw, product

TIED = BY_NAME["tied_names"].build()
V = draw(TIED)
VECTORS: dict[str, tuple[Any, str]] = {
    "missing": ({k: v for k, v in V.items() if k != "first.bias"}, "GGN: the vector has no 'first.bias'.*or zeros"),
    "unknown": (V | {"third": V["first.bias"]}, "'third' is no parameter of the model.*product.names"),
    "tied": (V | {"second.weight": V["first.weight"]}, "'second.weight' is tied to 'first.weight'"),
    "shape": (V | {"first.bias": torch.ones(4).double()}, r"'first.bias' has shape \[4\]: give \[3\]"),
    "rank": (V | {"first.weight": torch.ones(9).double()}, r"'first.weight' has shape \[9\]: give \[3, 3\]"),
    "dtype": ({k: v.float() for k, v in V.items()}, r"'first.weight' is torch.float32 .* torch.float64 .*\.to\("),
    "number": (V | {"first.bias": 1.0}, "'first.bias' is float, not a tensor"),
    "leading axes": (V | {"first.bias": torch.ones(2, 3).double()}, r"'first.bias' has the leading axes \[2\].* \[\]"),
    "list": (list(V.values()), "the vector is list: give a tensor or"),
    "flat size": (torch.ones(14).double(), r"the vector has shape \[14\]: give \[15\] or \[15, K\]"),
    "flat rows": (torch.ones(2, 15).double(), r"the vector has shape \[2, 15\]: give \[15\] or \[15, K\]"),
    "flat rank": (torch.ones(15, 1, 1).double(), r"the vector has shape \[15, 1, 1\]"),
    "flat dtype": (torch.ones(15), "is torch.float32"),
}


@pytest.mark.parametrize("what", VECTORS)
def test_vectors_that_do_not_fit(what: str) -> None:
    vector, message = VECTORS[what]
    with pytest.raises(tn.InputError, match=message):
        product("ggn", TIED)(vector)


def test_frozen_parameters_have_no_entry() -> None:
    problem = BY_NAME["frozen_weight"].build()
    v = {name: p.detach() for name, p in problem.model.named_parameters()}
    with pytest.raises(tn.InputError, match=r"'0\.weight' is frozen: give the vector for product\.names"):
        product("hessian", problem)(v)


def build(**changes: Any) -> Callable[[], tn.CurvatureProduct]:
    """A product of a linear model with something else in it."""
    given: dict[str, Any] = {
        "model": nn.Linear(3, 2),
        "loss": nn.MSELoss(),
        "x": torch.ones(4, 3),
        "y": torch.ones(4, 2),
    }
    given |= changes
    make = given.pop("make", tn.ggn_product)
    x, y = given.pop("x"), given.pop("y")
    return lambda: make(given.pop("model"), given.pop("loss"), (x, y), **given)


BUILDS: dict[str, tuple[type[tn.TnError], str, Callable[[], tn.CurvatureProduct]]] = {
    "model": (tn.InputError, "model is function, not a torch.nn.Module", build(model=F.relu)),
    "no loss": (tn.InputError, "loss is NoneType: pass a function", build(loss=None)),
    "batch": (tn.InputError, r"the pair \(x, y\)", lambda: tn.ggn_product(nn.Linear(1, 1), F.mse_loss, torch.ones(3))),
    "batch sizes": (tn.InputError, "batch size 4 but y has 5", build(y=torch.ones(5, 2))),
    "empty": (tn.InputError, "the example batch is empty", build(x=torch.ones(0, 3), y=torch.ones(0, 2))),
    "all frozen": (tn.InputError, "no trainable parameter", build(model=frozen(nn.Linear(3, 2), "weight", "bias"))),
    "unreduced": (tn.InputError, r"float32 \[4, 2\]: .*mean or the sum", build(loss=nn.MSELoss(reduction="none"))),
    "complex": (tn.UnsupportedError, "'weight' is complex", build(model=nn.Linear(3, 2, dtype=torch.complex64))),
    "whole numbers": (
        tn.UnsupportedError,
        "the model's output has a torch.int64 in it: return floating point tensors only",
        build(model=seq(nn.Linear(3, 2), Apply(lambda t: (t, t.argmax(1))))),
    ),
    "blocks": (tn.InputError, "blocks='layer': give one of tn.Blocks.FULL, tn.Blocks.PARAMETER", build(blocks="layer")),
    "fisher": (tn.InputError, "fisher='mc': give one of tn.Fisher.MC", build(make=tn.fisher_product, fisher="mc")),
    "no samples": (tn.InputError, "mc_samples=0: draw at least one", build(make=tn.fisher_product, mc_samples=0)),
    "merged samples": (
        tn.UnsupportedError,
        r"the 4 samples on axis 0, and the model gives \[8, 1\]: reshape it in the loss",
        build(make=tn.fisher_product, model=seq(nn.Linear(3, 2), Apply(lambda t: t.reshape(-1, 1)))),
    ),
    "no sum over samples": (
        tn.UnsupportedError,
        "not a sum over samples|not linear",
        build(make=tn.fisher_product, fisher=tn.Fisher.EMPIRICAL, loss=lambda f, y: F.mse_loss(f, y).sqrt()),
    ),
    "concave": (
        tn.InputError,
        "the loss Hessian is indefinite",
        build(make=tn.fisher_product, loss=lambda f, y: -((f - y) ** 2).exp().log().mean()),
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BUILDS)
def test_products_that_cannot_be(what: str) -> None:
    kind, message, make = BUILDS[what]
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
def test_no_second_derivative(kind: str) -> None:
    """Refused by name, not answered with zeros."""
    problem = BY_NAME[NOT_TWICE].build()
    with pytest.raises(tn.UnsupportedError, match=r"aten::hardsigmoid_backward is not implemented. Write that"):
        product(kind, problem)(draw(problem))
