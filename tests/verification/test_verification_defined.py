"""`tn.verify` of what is no derivative: an error is planted in every quantity, and the first wrong entry is told."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler.derive import averaged, columns, output
from tnbackprop.quantities import factors as approximate
from tnbackprop.quantities import kronecker, propagation
from tnbackprop.verification.quantities import ALL

from ..cases import seq
from ..models import Apply
from ..notation.test_declared_losses import MAHALANOBIS, ROOT, Mahalanobis
from ..verified import norm

Patch = pytest.MonkeyPatch
DRAWN = (tn.SqrtGGNMC(mc_samples=2), tn.DiagGGNMC(), tn.DiagGGNMC("each", per_sample=True), tn.KFAC())
FACTORS = (tn.KFLR(), tn.KFAC("two", mc_samples=2), tn.KFAC("gradients", fisher=tn.Fisher.EMPIRICAL), tn.KFRA())
LABELS = torch.tensor([0, 2, 1])


def positions() -> nn.Module:
    """A layer on two positions of a sample, then one on all of them."""
    return seq(nn.Linear(3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(4, 3))


def verify(*quantities: tn.Quantity, loss: Any = None, y: torch.Tensor = LABELS) -> tn.Verification:
    return tn.verify(positions(), (3, 2, 3), y, loss=loss or nn.CrossEntropyLoss(), quantities=quantities)


# ---------------------------------------------------------------- planted errors


def _other_sharing(patch: Patch) -> None:
    """Expand for reduce."""
    right = kronecker.kronecker
    wrong = {tn.Sharing.EXPAND: tn.Sharing.REDUCE, tn.Sharing.REDUCE: tn.Sharing.EXPAND}
    patch.setattr(kronecker, "kronecker", lambda J, g, sharing, *rest: right(J, g, wrong[sharing], *rest))


def _twice_each_factor(patch: Patch) -> None:
    """As where a size is forgotten."""
    right = approximate._Rules._paired
    patch.setattr(approximate._Rules, "_paired", lambda *args: right(*args) * 2)


def _twice(kind: type[tn.Quantity]) -> Callable[[Patch], None]:
    """A result that is twice as large."""

    def plant(patch: Patch) -> None:
        right = kind.extract
        patch.setattr(kind, "extract", lambda self, J, g: right(self, J, g) * 2)

    return plant


def _twice_the_loss(patch: Patch) -> None:
    """The scale of the loss twice."""
    right = kronecker.kronecker
    patch.setattr(kronecker, "kronecker", lambda J, g, sharing, scale, *rest: right(J, g, sharing, 2 * scale, *rest))


def _sum_of_samples(patch: Patch) -> None:
    """KFRA's matrix is a sum, not a mean."""
    patch.setattr(averaged, "_mean", lambda diagram: diagram.products)


def _jacobian_once(patch: Patch) -> None:
    """J for J∘J."""
    patch.setattr(propagation, "squared", lambda jacobian: jacobian)


def _no_residual(patch: Patch) -> None:
    """No second derivatives of the layers: the diagonal of a Gauss-Newton matrix."""
    patch.setattr(columns, "residual_diagonal", lambda *_: None)


def _outputs_mix(patch: Patch) -> None:
    """BL89 from the diagonal of the exact Hessian, as HesScale."""
    patch.setattr(output, "elementwise_root", lambda root: root)


PLANTED: dict[str, tuple[tn.Quantity, Callable[[Patch], None], str]] = {
    "KFLR, sharing": (tn.KFLR(), _other_sharing, "kflr of '0.weight'"),
    "KFLR, reduce": (tn.KFLR(sharing=tn.Sharing.REDUCE), _other_sharing, "kflr of '0.weight'"),
    "KFLR, sizes": (tn.KFLR(), _twice_each_factor, r"kflr of '0.weight'[^§]*wrong factor: every entry is 4 times"),
    "KFLR, joined": (tn.KFLR(bias=tn.Bias.JOINED), _other_sharing, "kflr of '0.weight'"),
    "KFAC, scale": (tn.KFAC(), _twice_the_loss, r"kfac of '0.weight'[^§]*every entry is 2 times"),
    "empirical": (tn.KFAC(fisher=tn.Fisher.EMPIRICAL), _twice_the_loss, r"kfac of '0.weight'[^§]*2 times"),
    "KFRA, mean": (tn.KFRA(), _sum_of_samples, r"kfra of '0.weight'"),
    "HesScale, J": (tn.HesScale(), _jacobian_once, "hesscale of"),
    "HesScale, residual": (tn.HesScale(per_sample=True), _no_residual, "hesscale of '0.weight'"),
    "BL89, start": (tn.BL89(), _outputs_mix, "bl89 of"),
    "SqrtGGNMC": (tn.SqrtGGNMC(), _twice(tn.SqrtGGNMC), r"sqrt_ggn_mc of '0.weight'[^§]*every entry is 2 times"),
    "DiagGGNMC": (tn.DiagGGNMC(mc_samples=2), _twice(tn.DiagGGN), r"diag_ggn_mc of '0.weight'[^§]*2 times"),
}


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str, monkeypatch: Patch) -> None:
    quantity, plant, text = PLANTED[name]
    plant(monkeypatch)
    with pytest.raises(tn.VerificationError, match=text):
        verify(quantity)


@pytest.mark.slow
def test_right() -> None:
    """All of them, with nothing planted; the report says what they were compared with."""
    diagonals = (tn.HesScale(), tn.BL89(), tn.HesScale("of_samples", per_sample=True))
    report = verify(*DRAWN, *FACTORS, *diagonals, tn.KFLR("joined", bias=tn.Bias.JOINED))
    assert report.ok and not report.left_out, report
    names = {q.name for q in (*DRAWN, *FACTORS, *diagonals)} | {"joined", "drawn columns"}
    assert names <= {row.what for row in report.rows}
    assert max(row.error for row in report.rows if row.what != "drawn columns") < 1e-12
    text = str(report)
    assert re.search(r"kfra: compared with its recursion over the torch\.func Jacobians", text)
    assert re.search(r"drawn columns: compared with the Hessian of the loss: .* over 1000 draws", text)


# ---------------------------------------------------------------- columns and their law

SAMPLES = {
    "right": ROOT.sample,
    "too long": ROOT.sample.replace("2 *", "4 *"),
    "one sign": "torch.ones_like({noise}) @ {factor} / {input}.shape[0]**0.5",
    "transposed": ROOT.sample.replace("{factor}", "{factor}.T"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SAMPLES)
def test_the_law_of_what_a_rule_draws(name: str) -> None:
    """The loss's gradient, Hessian and root are right; what it samples is not, but for one."""
    y, quantities = torch.randn(3, 3), (tn.DiagGGN(), tn.DiagGGNMC())
    rule = tn.Rule(MAHALANOBIS, root=tn.Root(ROOT.columns, ROOT.code, SAMPLES[name]))
    message = r"drawn columns[^§]*the mean of the draws is .* it must be [^§]*drawn with another law"
    with tn.registered({Mahalanobis: rule}):
        if name == "right":
            assert verify(*quantities, loss=Mahalanobis(), y=y).ok
            return
        with pytest.raises(tn.VerificationError, match=message):
            verify(*quantities, loss=Mahalanobis(), y=y)


@pytest.mark.slow
def test_a_loss_without_a_rule(monkeypatch: Patch) -> None:
    """Its columns are not unique: the mean over many seeds is compared, and says so."""
    quantities = (tn.SqrtGGNMC(mc_samples=2), tn.DiagGGNMC(mc_samples=2), tn.KFAC(mc_samples=2))
    loss = lambda f, y: F.mse_loss(f, y) + f.logsumexp(-1).mean()  # noqa: E731
    y = torch.randn(3, 3)
    report = verify(*quantities, loss=loss, y=y)
    assert report.ok and not report.left_out
    assert all("200 seeds" in row.how for row in report.rows if row.what in {q.name for q in quantities})
    _twice(tn.DiagGGN)(monkeypatch)
    with pytest.raises(tn.VerificationError, match=r"diag_ggn_mc of[^§]*over all entries the mean is [12]\.\d+ times"):
        verify(tn.DiagGGNMC(mc_samples=2), loss=loss, y=y)


# ---------------------------------------------------------------- what is said where there is less to say


def test_every_quantity_is_compared_by_default() -> None:
    """Nothing of tnbackprop's own is left out for a chain of usual layers."""
    classes = {type(quantity) for quantity in ALL}
    own = {value for value in vars(tn).values() if isinstance(value, type) and issubclass(value, tn.Quantity)}
    assert own - {tn.Quantity} == classes


def test_lines_of_a_rule() -> None:
    """A rule of four lines: the recursion goes through each of them."""
    report = tn.verify(norm, module=nn.LayerNorm(3), x=(2, 3), quantities=(tn.HesScale(),))
    assert report.ok and {"'weight'", "'bias'", "'input'"} <= {row.of for row in report.rows if row.what == "hesscale"}


@pytest.mark.parametrize("shape, left_out", [((1, 3), False), ((3, 3), True)])
def test_three_factors(shape: tuple[int, ...], left_out: bool) -> None:
    """A bilinear form has three: known from the forward alone for one sample without positions."""
    model = seq(Apply(lambda t: torch.cat([t, t.sin()], -1)), Bilinear())
    report = tn.verify(model, shape, quantities=(tn.KFLR(),))
    found = [note for note in report.left_out if note.what == "kflr of '1.form.weight'"]
    assert report.ok and bool(found) == left_out
    assert all("3 factors" in note.why for note in found)
    assert any(row.what == "kflr" and row.of == "'1.form.weight'" for row in report.rows)


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.form = nn.Bilinear(3, 3, 2)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.form(input[:, :3], input[:, 3:])


def test_another_quantity_is_left_out() -> None:
    class Mine(tn.Grad):
        pass

    report = tn.verify(nn.Linear(3, 2), (2, 3), quantities=(Mine(),))
    assert {note.why for note in report.left_out} == {"Mine is not one of tnbackprop's: nothing says what it must be"}
