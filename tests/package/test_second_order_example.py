"""The optimiser of examples/second_order.py: its step against the dense formula, and what its script does."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from .. import oracle, oracle_second

EXAMPLE = runpy.run_path(str(Path(__file__).parent.parent.parent / "examples" / "second_order.py"), run_name="example")
RATE, DAMPING, L2 = 0.3, 0.05, 0.02
LOSS = nn.CrossEntropyLoss()


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return model, torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))


def step(quantity: tn.Quantity) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Parameters before and after one step, and the oracle's ∇L + η θ."""
    model, x, y = problem()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    gradient = {name: g + L2 * before[name] for name, g in oracle.grad(model, LOSS, x, y).items()}
    program = tn.compile(model, LOSS, (x, y), [tn.Grad(), quantity])
    EXAMPLE["Preconditioned"](model, quantity.name, RATE, DAMPING, L2).step(program(x, y))
    return before, {name: p.detach() for name, p in model.named_parameters()}, gradient


def damped(block: Tensor, gradient: Tensor) -> Tensor:
    """(block + (λ + η) I)⁻¹ g, dense."""
    shifted = block + (DAMPING + L2) * torch.eye(len(block), dtype=block.dtype)
    return torch.linalg.solve(shifted, gradient.flatten()).reshape(gradient.shape)


def test_step_with_a_diagonal() -> None:
    before, after, gradient = step(tn.DiagGGN())
    blocks = oracle_second.ggn_blocks(problem()[0], LOSS, *problem()[1:])
    for name, theta in before.items():
        diagonal = blocks[name].sum(0).diagonal().diag()
        torch.testing.assert_close(after[name], theta - RATE * damped(diagonal, gradient[name]), rtol=1e-10, atol=1e-12)


def test_step_with_kronecker_factors() -> None:
    """Each factor damped by its share: π = sqrt((tr A / dim A) / (tr B / dim B)), Martens & Grosse 2015, Sec. 6.3."""
    before, after, gradient = step(tn.KFLR())
    model, x, y = problem()
    for layer in ("0", "2"):
        factors = oracle_second.kronecker(model, layer, LOSS, x, y, reduce=False)
        A, B, total = factors.A, factors.B, (DAMPING + L2) ** 0.5
        pi = (A.diagonal().mean() / B.diagonal().mean()).sqrt()
        left = B + total / pi * torch.eye(len(B), dtype=B.dtype)
        right = A + total * pi * torch.eye(len(A), dtype=A.dtype)
        wanted = {
            f"{layer}.weight": torch.linalg.inv(left) @ gradient[f"{layer}.weight"] @ torch.linalg.inv(right),
            f"{layer}.bias": damped(B, gradient[f"{layer}.bias"]),
        }
        for name, direction in wanted.items():
            torch.testing.assert_close(after[name], before[name] - RATE * direction, rtol=1e-10, atol=1e-12)


def test_frozen_parameters_stay() -> None:
    model, x, y = problem()
    model[0].weight.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    program = tn.compile(model, LOSS, (x, y), [tn.Grad(), tn.KFLR()])
    EXAMPLE["Preconditioned"](model, "kflr", RATE, DAMPING).step(program(x, y))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"0.bias", "2.weight", "2.bias"}


@pytest.mark.slow
def test_every_method_lowers_the_loss(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three epochs and one seed: the train loss falls by a third, and the test accuracy is far from 10 %."""
    path = tmp_path / "plot.png"
    runs = EXAMPLE["main"](["--quick", "--output", str(path)])
    assert list(runs) == ["SGD", "Adam", "DiagGGN-MC", "KFAC", "KFLR", "KFRA"]
    for name, (history,) in runs.items():
        assert history.loss[-1] < history.loss[0] * 2 / 3, name
        assert history.accuracy[-1] > 50, name
        assert history.loss[0] == runs["SGD"][0].loss[0], "not the same initialisation"
        assert history.seconds == sorted(history.seconds) and history.steps[-1] == 51
    assert path.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*runs, "train loss", "plot.png"))


def test_a_plot_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plot.png"
    path.write_text("mine", encoding="utf-8")
    with pytest.raises(SystemExit):
        EXAMPLE["main"](["--quick", "--output", str(path)])
    assert "--force" in capsys.readouterr().err
    assert path.read_text(encoding="utf-8") == "mine"


def test_settings_are_from_the_grids() -> None:
    for method in EXAMPLE["METHODS"]:
        assert set(method.options) == set(method.grid)
        assert all(value in method.grid[key] for key, value in method.options.items()), method.name


@pytest.mark.slow
def test_a_run_that_diverges_is_no_candidate() -> None:
    """Tuning prefers anything to a step that is far too large."""
    method = EXAMPLE["METHODS"][4]
    assert method.name == "KFLR"
    wild = type(method)(method.name, method.kind, method.options, {"lr": (30.0, 0.03), "damping": (1e-4,)})
    options, loss = EXAMPLE["tune"](wild, EXAMPLE["digits"](), 1)
    assert options == {"lr": 0.03, "damping": 1e-4}
    assert 0 < loss < 2.3
