"""The net under what was once wrong: each remedy is taken out again, and the program is refused by its own proof.

What it cannot find, because there is no program, or not yet one that differs: products of curvature with vectors; what
changes after a compile (ties, attributes, closures: `test_compute_changes`), tensors that results have in common
(`test_owned`), a derivative of a program (`test_differentiated`), a branch on one sample where the example has more
(`compiler/capture/test_states`), a hook on a parameter, which autograd has not on a copy, and a formula whose own
module computes it badly (`rules/test_precision`): there PyTorch gives what the program gives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.compiler.capture import export, rehearse
from tnbackprop.compiler.derive import fallback
from tnbackprop.compiler.derive.trial import Way, Ways
from tnbackprop.compiler.emit import naming
from tnbackprop.compiler.sweep import sweep
from tnbackprop.compiler.translate.graph import Graph
from tnbackprop.diagram import regroup
from tnbackprop.rules import moves

from .test_check import Net

CE, MSE = nn.CrossEntropyLoss(), nn.MSELoss()
aten = torch.ops.aten
Patch = Callable[[pytest.MonkeyPatch], object]


@dataclass(frozen=True)
class Fault:
    """remove   takes the remedy out
    named    what the message says: the first parameter that is wrong, or "the output"
    """

    remove: Patch
    forward: Callable[..., Any]
    x: Tensor
    parts: Mapping[str, Callable[[], Any]]
    named: str
    quantities: tuple[tn.Quantity, ...] = (tn.Grad(), tn.BatchGrad())
    loss: Any = MSE
    y: Tensor | None = None
    rules: Mapping[Any, Any] = field(default_factory=dict)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def lin(*shape: int) -> Callable[[], nn.Module]:
    return lambda: nn.Linear(*shape)


def par(value: Tensor) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(value.clone())


# ---------------------------------------------------------------- what takes a remedy out


def unrehearsed(patch: pytest.MonkeyPatch) -> None:
    """The example does not run, and its graph is not compared."""
    patch.setattr(export, "rehearse", lambda *_: rehearse.Seen((), frozenset()))
    patch.setattr(export, "least_batch", lambda *_: 1)


def rolled_once(patch: pytest.MonkeyPatch) -> None:
    """Of shifts along one axis that is there twice the last one counts."""
    patch.setitem(tn.RULES, aten.roll.default, _last_roll)


def _last_roll(call: Any) -> tn.Rule:
    shifts = dict(zip(call.dims, call.shifts, strict=True))
    return moves._sourced(call, {dim: f"{moves._places(call, dim)}.roll({by})" for dim, by in shifts.items()})


def mapped_always(patch: pytest.MonkeyPatch) -> None:
    """vmap over the VJP of an operator without a rule is taken to be right."""
    patch.setattr(fallback, "ways_of", lambda *_: Ways(Way.MAPPED, total=False))


def any_loss_sums(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sweep, "_varies", lambda *_: False)


def met_anywhere(patch: pytest.MonkeyPatch) -> None:
    """Columns of the Hessian meet where only one of two branches passes."""
    patch.setattr(Graph, "is_bottleneck", lambda *_: True)


def same_names(patch: pytest.MonkeyPatch) -> None:
    """Values with nearly the same hint have the same name."""
    fresh = naming.Scope.fresh
    other = {"p__fc_weight": "p_fc_weight"}
    patch.setattr(naming.Scope, "fresh", lambda self, hint: other.get(hint) or fresh(self, hint))


def untied(patch: pytest.MonkeyPatch) -> None:
    """A leg that is split in one place keeps its meaning in no other."""
    patch.setattr(regroup, "counted", lambda image, digits: regroup.Delta((image, image)))


# ---------------------------------------------------------------- models


def function(name: str, **methods: Any) -> Any:
    return type(name, (torch.autograd.Function,), {key: staticmethod(method) for key, method in methods.items()})


StraightThrough = function("StraightThrough", forward=lambda ctx, x: x.sign(), backward=lambda ctx, g: g)
Reversal = function("Reversal", forward=lambda ctx, x: x.clone(), backward=lambda ctx, g: -3 * g)


def doubled(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if h.requires_grad:
        h.register_hook(lambda g: 2 * g)
    found: Tensor = m.b(h)
    return found


def hooked() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer.register_full_backward_hook(lambda module, into, out: tuple(None if g is None else 3 * g for g in into))
    return layer


POINTS = randn(3, 2, seed=5)
AB = {"a": lin(3, 4), "b": lin(4, 2)}
FAULTS: Mapping[str, Fault] = {
    "function": Fault(unrehearsed, lambda m, x: m.b(StraightThrough.apply(m.a(x))), randn(5, 3), AB, "'a.weight'"),
    "reversal": Fault(unrehearsed, lambda m, x: m.b(Reversal.apply(m.a(x))), randn(5, 3), AB, "'a.weight'"),
    "tensor hook": Fault(unrehearsed, doubled, randn(5, 3), AB, "'a.weight'"),
    "module hook": Fault(
        unrehearsed, lambda m, x: m.b(m.l(m.a(x))), randn(5, 3), {"a": lin(3, 4), "l": hooked, "b": lin(4, 2)},
        "'a.weight'",
    ),
    "branch on one sample": Fault(
        unrehearsed, lambda m, x: m.l(x) * (3 if x.shape[0] == 1 else 1), randn(1, 3), {"l": lin(3, 2)}, "the output"
    ),
    "gradient of one sample": Fault(
        unrehearsed, lambda m, x: m.b(m.a(x).detach() if x.shape[0] == 1 else m.a(x)), randn(1, 3), AB, "'a.weight'"
    ),
    "roll": Fault(
        rolled_once, lambda m, x: m.l(x).roll((1, 1), (1, 1)).flatten(1), randn(2, 4, 3), {"l": lin(3, 2)}, "'l.weight'"
    ),
    "cdist": Fault(
        mapped_always, lambda m, x: torch.cdist(m.l(x), POINTS).flatten(1), randn(3, 4, 2),
        {"l": lin(2, 2)}, "'l.weight'", (tn.DiagGGN(),),
    ),
    "logsumexp of samples": Fault(
        any_loss_sums, lambda m, x: m.l(x), randn(4, 3), {"l": lin(3, 2)}, "'l.weight'", (tn.HessianDiag(),),
        lambda f, y: F.cross_entropy(f, y, reduction="none").logsumexp(0), torch.arange(4) % 2,
    ),
    "two towers": Fault(
        met_anywhere, lambda m, x: F.softplus(m.a(x)) + torch.exp(-(m.b(x) ** 2)), randn(4, 2),
        {"a": lin(2, 1), "b": lin(2, 1)}, "'a.weight'", (tn.HessianDiag(),),
    ),
    "names": Fault(
        same_names, lambda m, x: m.fc(x) * m._fc(x), randn(5, 4), {"fc": lin(4, 3), "_fc": lin(4, 3)}, "the output"
    ),
    "groupings": Fault(
        untied, lambda m, x: x * m.p + m.p.flatten().sum(), randn(4, 3, 4), {"p": par(randn(3, 4))}, "'p'"
    ),
    "several values for one place": Fault(
        lambda _: None, lambda m, x: aten.index_put(x, [None, torch.zeros(2, dtype=torch.int64)], m.l(x)), randn(4, 3),
        {"l": lin(3, 2)}, "'l.weight'",
    ),
    "softplus": Fault(
        lambda _: None, lambda m, x: m.act(m.l(x)), randn(4, 3) * 1e4, {"l": lin(3, 2), "act": nn.Softplus},
        "the output", rules={nn.Softplus: "output[*s] = log(1 + exp(input[*s]))"},
    ),
}  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", FAULTS)
def test_refused_without_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = FAULTS[name]
    model = Net(fault.forward, **{key: part() for key, part in fault.parts.items()}).double().eval()
    y = torch.randn_like(model(fault.x)) if fault.y is None else fault.y
    fault.remove(monkeypatch)
    rules = {**tn.RULES, **fault.rules}
    with pytest.raises(tn.VerificationError, match=rf"(?s){fault.named}.*Likely: "):
        tn.compile(model, fault.loss, (fault.x, y), list(fault.quantities), rules=rules)


def test_a_loss_with_one_derivative() -> None:
    """That torch has no second one is no fault of the program."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(5, 3).double(), torch.randn(5, 2).double()
    loss = lambda f, y: torch.cdist(f[:, None], y[:, None]).mean()  # noqa: E731
    said = "(?s)root of the loss Hessian: .*'_cdist_backward' .* a first derivative of that only.*square"
    with pytest.raises(tn.UnsupportedError, match=said):
        tn.compile(model, loss, (x, y), [tn.DiagGGN()])
    assert "grad" in tn.compute(model, loss, (x, y), [tn.Grad()])
