"""Samplers of a user's: gradients of labels that torch code draws, for losses whose Hessian has no root."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

import tnbackprop as tn

from ..second_order import assert_equal

N, SEED = 5, 3


def nll(f: Tensor, y: Tensor) -> Tensor:
    """Of a normal distribution with its mean and the logarithm of its variance: its Hessian is indefinite."""
    return 0.5 * (f[:, 1] + (y - f[:, 0]) ** 2 * torch.exp(-f[:, 1])).mean()


def gaussian(f: Tensor, u: Tensor) -> Tensor:
    return f[:, 0] + torch.exp(0.5 * f[:, 1]) * 2**0.5 * torch.erfinv(2 * u - 1)


def wider(f: Tensor, u: Tensor) -> Tensor:
    return gaussian(f, u) * 1.3 + 0.2


def counts(f: Tensor, y: Tensor) -> Tensor:
    """Of a geometric distribution of whole numbers, with the logit of success."""
    return -(nn.functional.logsigmoid(f[:, 0]) + y.to(f.dtype) * nn.functional.logsigmoid(-f[:, 0])).sum()


def geometric(f: Tensor, u: Tensor) -> Tensor:
    return torch.floor(torch.log(u) / nn.functional.logsigmoid(-f[:, 0])).long()


def model(outputs: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs)).double()


def batch(whole: bool = False, count: int = N) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, dtype=torch.float64, generator=generator)
    return x, torch.randint(4, (count,)) if whole else torch.randn(count, dtype=torch.float64, generator=generator)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    "a mean": (nll, gaussian, 2), "a sum, of whole numbers": (counts, geometric, 1),
}  # fmt: skip


def columns(net: nn.Module, x: Tensor, loss: Callable[..., Tensor], draw: Callable[..., Tensor], k: int) -> Any:
    """V[v, n, *p] = Jᵀ s for the uniform numbers that a program draws with a seed."""
    noise = torch.rand(k, len(x), dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    J = jacrev(lambda p: functional_call(net, p, (x,)))(parameters)
    f, scale = net(x).detach(), 1 / len(x) if loss is nll else 1.0
    s = torch.stack([grad(loss)(f, draw(f, u)) for u in noise]) / (k * scale) ** 0.5
    return {name: torch.einsum("vnf,nf...->vn...", s, own) for name, own in J.items()}


@pytest.mark.slow
@pytest.mark.parametrize("draws", [1, 2, 70])
@pytest.mark.parametrize("name", CASES)
def test_columns_are_gradients_of_the_drawn_labels(name: str, draws: int) -> None:
    loss, draw, outputs = CASES[name]
    net, (x, y) = model(outputs), batch(loss is counts)
    root = tn.Draws(draws, sampler=draw)
    quantities = [
        tn.Grad(), tn.SqrtGGN(root=root), tn.DiagGGN(root=root), tn.GGNTrace(root=root), tn.KFLR(root=root),
        tn.DiagGGN("each", per_sample=True, root=root),
    ]  # fmt: skip
    program = tn.compile(net, loss, (x, y), quantities)
    result = program(x, y, seed=SEED)
    V = columns(net, x, loss, draw, draws)
    assert_equal(result["sqrt_ggn"], V, "sqrt")
    assert_equal(result["diag_ggn"], {n: v.square().sum((0, 1)) for n, v in V.items()}, "diag")
    assert_equal(result["each"], {n: v.square().sum(0) for n, v in V.items()}, "each")
    assert_equal(result["ggn_trace"], {n: v.flatten(2).square().sum((0, 2)) for n, v in V.items()}, "trace")
    B, A = result["kflr"]["2.bias"].factors[0], V["2.bias"]
    torch.testing.assert_close(B, torch.einsum("vni,vnj->ij", A, A))
    _, saved = program.forward(x)
    assert_equal(program.backward(saved, y, seed=SEED)["diag_ggn"], result["diag_ggn"], "halves")


def test_the_fisher_information_in_the_mean() -> None:
    """diag(1/σ², 1/2) at the output, where the loss's own Hessian is refused."""
    net, (x, y) = model(), batch()
    root = tn.compute(net, nll, (x, y), [tn.SqrtGGN(root=tn.Draws(4000, sampler=gaussian))], seed=0)
    V = root.flat("sqrt_ggn")
    f = net(x).detach()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    J = torch.cat([own.flatten(2) for own in jacrev(lambda p: functional_call(net, p, (x,)))(parameters).values()], 2)
    information = torch.diag_embed(torch.stack([torch.exp(-f[:, 1]), torch.full_like(f[:, 1], 0.5)], 1))
    want = torch.einsum("nap,nab,nbq->pq", J, information, J) / N
    assert (torch.einsum("vnp,vnq->pq", V, V) - want).norm() < 0.05 * want.norm()
    with pytest.raises(tn.InputError, match="the loss Hessian is indefinite"):
        tn.compute(net, nll, (x, y), [tn.DiagGGN()])


@pytest.mark.slow
def test_batches_of_other_sizes_and_dtypes() -> None:
    net, (x, y) = model(), batch(count=12)
    quantity = tn.DiagGGN(root=tn.Draws(2, sampler=gaussian))
    program = tn.compile(net, nll, (x[:4], y[:4]), [quantity])
    V = columns(net, x, nll, gaussian, 2)
    found = program(x, y, seed=SEED)["diag_ggn"]
    assert_equal(found, {n: v.square().sum((0, 1)) for n, v in V.items()}, "12 samples")
    limited = tn.compile(net, nll, (x, y), [quantity], memory_limit=program.peak_bytes * 3)(x, y, seed=SEED)
    assert_equal(limited["diag_ggn"], found, "limited")
    for dtype in (torch.float32, torch.bfloat16):
        small = model().to(dtype)
        with_it = tn.compute(small, nll, (x.to(dtype), y.to(dtype)), [quantity], seed=SEED)["diag_ggn"]
        assert all(value.dtype == dtype and value.isfinite().all() for value in with_it.values())


class Two(nn.Module):
    """Mean and logarithm of the variance as two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        f = self.net(x)
        return {"mean": f[:, 0], "log_variance": f[:, 1:]}


def test_the_sampler_is_given_what_the_model_gives() -> None:
    """Several outputs, and one that the loss reads moved."""
    net, (x, y) = Two(), batch()

    def joined(f: dict[str, Tensor]) -> Tensor:
        return torch.cat([f["mean"].unsqueeze(1), f["log_variance"]], 1)

    def draw(f: dict[str, Tensor], u: Tensor) -> Tensor:
        return gaussian(joined(f), u)

    quantity = tn.DiagGGN(root=tn.Draws(2, sampler=draw))
    found = tn.compute(net, lambda f, y: nll(joined(f), y), (x, y), [quantity], seed=SEED)["diag_ggn"]
    V = columns(net.net, x, nll, gaussian, 2)
    got = {n.removeprefix("net."): v for n, v in found.items()}
    assert_equal(got, {n: v.square().sum((0, 1)) for n, v in V.items()}, "two")

    def moved(f: Tensor, y: Tensor) -> Tensor:
        return nn.functional.mse_loss(f.flatten(), y.flatten(), reduction="sum")

    def unit(f: Tensor, u: Tensor) -> Tensor:
        return f + torch.erfinv(2 * u - 1)

    plain = model()
    labels = torch.randn(N, 2).double()
    root = tn.Draws(500, sampler=unit)
    drawn = tn.compute(plain, moved, (x, labels), [tn.DiagGGN(root=root)], seed=0)["diag_ggn"]
    exact = tn.compute(plain, moved, (x, labels), [tn.DiagGGN()])["diag_ggn"]
    for name, value in exact.items():
        assert (drawn[name] - value).norm() < 0.2 * value.norm()


def test_uniform_numbers_are_never_zero() -> None:
    def smallest(f: Tensor, u: Tensor) -> Tensor:
        return (u * 0).clamp(min=0) + u.log()

    net, (x, y) = model(), batch()
    program = tn.compile(net, nll, (x, y), [tn.DiagGGN(root=tn.Draws(1, sampler=smallest))])
    tensors = program.tensors(x, y) | {name: torch.zeros(1, N).double() for name in program.compiled.plan.noises}
    namespace: dict[str, Any] = {}
    exec(program.source, namespace)
    values = namespace["program"](tensors)[2]["diag_ggn"]
    assert all(value.isfinite().all() for value in values.values())


@pytest.mark.slow
def test_verify_compares_it_and_finds_another_distribution() -> None:
    net, (x, y) = model(), batch()
    root = tn.Draws(2, sampler=gaussian)
    quantities = [
        tn.SqrtGGN(root=root), tn.DiagGGN(root=root), tn.GGNTrace(root=root), tn.GGNGram(root=root), tn.KFLR(root=root),
        tn.DirectionalRoot(root=root), tn.DirectionalCurvature(root=root), tn.RotatedSecondMoment(root=root),
        tn.SqrtGGN("of labels", root=tn.Labels()), tn.GGNGram("their gram", root=tn.Labels()),
    ]  # fmt: skip
    report = tn.verify(net, x, y, loss=nll, quantities=quantities)
    assert report.ok and not report.left_out
    assert {quantity.name for quantity in quantities} <= {row.what for row in report.rows}
    with pytest.raises(tn.VerificationError, match=r"labels of wider(.|\n)*another distribution"):
        tn.verify(net, x, y, loss=nll, quantities=[tn.DiagGGN(root=tn.Draws(1, sampler=wider))])


def test_it_is_told() -> None:
    net, (x, y) = model(), batch()
    program = tn.compile(net, nll, (x, y), [tn.DiagGGN(root=tn.Draws(2, sampler=gaussian))])
    assert "the gradients of 2 labels at layer_2, drawn by gaussian" in program.explain()
    assert "# gradients of the labels that gaussian draws" in program.source
    first = program(x, y)
    other = tn.compile(net, nll, (x, y), [tn.DiagGGN(root=tn.Draws(2, sampler=wider))])(x, y)
    with pytest.raises(tn.InputError, match=r"gaussian.* in one result and .*wider"):
        first.merge(other)
    assert first.merge(program(x, y)).count == 2 * N


def pair_loss(f: Tensor, y: tuple[Tensor, Tensor]) -> Tensor:
    return nll(f, y[0]) + nll(f, y[1])


def over_positive(f: Tensor, y: Tensor) -> Tensor:
    kept = (y > 0).to(f.dtype)
    return ((y - f[:, 0]) ** 2 * kept).sum() / kept.sum()


def by_rand(f: Tensor, u: Tensor) -> Tensor:
    return f[:, 0] + torch.randn_like(u)


BAD: dict[str, tuple[Any, Any, str]] = {
    "no function": (nll, 3, r"sampler=3: give a function \(output, uniform\) -> y"),
    "shape": (nll, lambda f, u: f, r"draws torch.float64 \[N, 2\], and y is torch.float64 \[N\]: return labels"),
    "dtype": (nll, lambda f, u: u.long(), r"draws torch.int64 \[N\], and y is .*\.to\(torch.float64\)"),
    "no tensor": (nll, lambda f, u: (u, u), "returns tuple: return labels, one tensor"),
    "its own numbers": (nll, by_rand, "sampler by_rand draws random numbers"),
    "fails": (nll, lambda f, u: f.mean_of(u), "sampler <lambda> fails: AttributeError"),
    "a value": (nll, lambda f, u: u if f.sum() > 0 else -u, "depends on the values of what it is given"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_samplers(name: str) -> None:
    loss, sampler, message = BAD[name]
    with pytest.raises((tn.InputError, tn.UnsupportedError), match=message):
        tn.compile(model(), loss, batch(), [tn.DiagGGN(root=tn.Draws(1, sampler=sampler))])


def test_labels_that_cannot_be_drawn() -> None:
    net, (x, y) = model(), batch()
    quantity = tn.DiagGGN(root=tn.Draws(1, sampler=gaussian))
    with pytest.raises(tn.InputError, match=r"must be one tensor, and it is torch.float64 .*, torch.float64"):
        tn.compile(net, pair_loss, (x, (y, y)), [quantity])
    with pytest.raises(tn.UnsupportedError, match="the loss divides by what it keeps of the labels"):
        tn.compile(net, nn.CrossEntropyLoss(), (x, torch.zeros(N, dtype=torch.long)), [quantity])
    with pytest.raises(tn.UnsupportedError, match="the loss divides by what it keeps of the labels"):
        tn.compile(net, over_positive, (x, y), [quantity])
    with pytest.raises(tn.UnsupportedError, match="need a loss"):
        tn.compile(net, None, (x, None), [quantity])


@pytest.mark.slow
def test_a_generated_file_checks_itself(tmp_path: Path) -> None:
    two, one = (tn.Draws(k, sampler=gaussian) for k in (2, 1))
    quantities = [tn.Grad(), tn.DiagGGN(root=two), tn.KFLR(root=one)]
    made = tn.generate(model(), quantities, "model", example=batch(), loss=nll)
    file = tmp_path / "made.py"
    file.write_text(made.source, encoding="utf-8")
    ran = subprocess.run([sys.executable, str(file), "--check"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
