"""Every program proves itself: what is compared, what is said of it, and what nothing is left of."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop import api
from tnbackprop.proof.proof import prove

CE = nn.CrossEntropyLoss()
FIRST = (tn.Grad, tn.BatchGrad, tn.BatchL2, tn.BatchDot, tn.SecondMoment, tn.Variance)
SECOND = (tn.DiagGGN, tn.SqrtGGN, tn.GGNTrace, tn.GGNGram, tn.HessianDiag, tn.Jacobians, tn.NTK)
ALL = [quantity() for quantity in (*FIRST, *SECOND)]


class Net(nn.Module):
    """forward is f(self, *inputs)."""

    def __init__(self, f: Callable[..., Any], **parts: nn.Module) -> None:
        super().__init__()
        self.f = f
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.f(self, *inputs, **named)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def batch(n: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(n, 3, dtype=dtype), torch.arange(n) % 2


def checked(model: nn.Module, x: Any, y: Any, quantities: Any = None, loss: Any = CE, **options: Any) -> str:
    """What the check of a program says."""
    return tn.compile(model, loss, (x, y), quantities or [tn.Grad(), tn.BatchL2()], **options).checked


# ---------------------------------------------------------------- what is said


def test_it_is_the_default_and_said() -> None:
    program = tn.compile(mlp(), CE, batch(), [tn.Grad(), tn.KFLR(), tn.DiagGGNMC()])
    said = program.explain().split("Check\n=====\n")[1]
    assert said.splitlines() == program.checked.splitlines()
    assert said.startswith("checked on 2 samples against autograd: the output, the loss, grad of 4 parameters")
    assert "not compared: diag_ggn_mc, drawn" in said


def test_without() -> None:
    assert checked(mlp(), *batch(), check=False) == "not checked: check=False"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_every_quantity_is_compared(dtype: torch.dtype) -> None:
    said = checked(mlp().to(dtype), *batch(dtype=dtype), ALL)
    assert all(f"{quantity.name} of 4 parameters" in said for quantity in ALL), said
    assert "not compared" not in said


# ---------------------------------------------------------------- what is found


class Bent(api.Program):
    """A program with one wrong number in one value, or with nothing else."""

    all = False
    key = "grad"
    name = "0.weight"

    def __call__(self, *args: Any, **options: Any) -> tn.Result:
        result = super().__call__(*args, **options)
        value = result[self.key][self.name]
        if self.all:
            value *= 1.01
        else:
            value[torch.unravel_index(value.abs().argmax(), value.shape)] *= 1.01
        return result


@lru_cache(2)
def right(dtype: torch.dtype) -> tuple[api.Program, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    example = batch(dtype=dtype)
    return tn.compile(mlp().to(dtype), CE, example, ALL, check=False), example


@pytest.mark.thinned(5)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
@pytest.mark.parametrize("quantity", ALL, ids=lambda quantity: quantity.name)
def test_a_wrong_number_is_found(quantity: tn.Quantity, name: str, dtype: torch.dtype) -> None:
    program, example = right(dtype)
    bent = type("Bent", (Bent,), {"key": quantity.name, "name": name})(program.model, program.compiled, CE, ALL)
    where = rf"(?s){quantity.name}.* of parameter '{name}' of module '{name[0]}' \(Linear\).*Likely: .*tn\.verify\("
    with pytest.raises(tn.VerificationError, match=where):
        prove(bent, example, tn.RULES)


WIDE = [tn.DiagGGN(), tn.DiagGGN("each", per_sample=True), tn.SqrtGGN()]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("quantity", WIDE, ids=lambda quantity: quantity.name)
def test_many_columns(quantity: tn.Quantity, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some entries, by products with the Jacobian."""
    x, y = batch()
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 50))
    assert "diag_ggn of 4 parameters, each of 4 parameters, sqrt_ggn of 4" in checked(model, x, y, WIDE)
    found = type("Bent", (Bent,), {"key": quantity.name, "name": "0.bias", "all": True})
    monkeypatch.setattr(api, "Program", found)
    with pytest.raises(tn.VerificationError, match=rf"{quantity.name} \(entries.*\) of parameter '0.bias'"):
        checked(model, x, y, WIDE)


class Cube(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x**3


@pytest.mark.parametrize(
    "rule,message",
    [
        (tn.Rule("output[*s] = x[*s]**3", jacobian={"x": "2*x[*s]**2"}), "grad of parameter '0.weight'"),
        (tn.Rule("output[*s] = x[*s]**2"), "the output differs"),
    ],
    ids=["jacobian", "formula"],
)
def test_a_wrong_rule_is_named(rule: tn.Rule, message: str) -> None:
    model = nn.Sequential(nn.Linear(3, 2), Cube())
    with pytest.raises(tn.VerificationError, match=rf"(?s){message}.*Rules of your own: Cube in module '1' \(Cube\)"):
        checked(model, *batch(), rules=tn.RULES | {Cube: rule})


def test_a_parameter_that_only_a_rule_reaches() -> None:
    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach().sign()

    rule = tn.Rule("output[*s] = x[*s]", forward="{x}.sign()", jacobian={"x": "1"})
    model = nn.Sequential(nn.Linear(3, 4), Step(), nn.Linear(4, 2))
    said = checked(model, *batch(), rules=tn.RULES | {Step: rule})
    assert "grad of 2 parameters" in said
    assert "not compared: '0.weight', only a rule of your own has a derivative by it" in said


# ---------------------------------------------------------------- which samples


def test_samples() -> None:
    assert "on 1 sample against" in checked(mlp(), *batch(1))
    assert "on 2 samples" in checked(mlp(), *batch(5))
    assert "on 5 samples" in checked(mlp(), *batch(5), memory_limit="1GiB")


def test_a_model_that_takes_four_or_more() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and x.shape[0] < 4:
            raise ValueError("too few")
        return m.l(x)

    assert "on 5 samples" in checked(Net(forward, l=nn.Linear(3, 2)), *batch(5))


def test_trees() -> None:
    x, y = batch()
    by_name = Net(lambda m, a, b: {"out": m.l(a + b)}, l=nn.Linear(3, 2))
    assert "batch_l2 of 2" in checked(by_name, {"a": x, "b": x}, {"y": y}, loss=lambda f, t: CE(f["out"], t["y"]))
    two = Net(lambda m, a, b: (m.l(a), m.l(b)), l=nn.Linear(3, 2))
    assert "batch_l2 of 2" in checked(two, (x, x), y, loss=lambda f, t: CE(f[0], t) + CE(f[1], t))


# ---------------------------------------------------------------- no false alarm


def test_a_gradient_that_cancels() -> None:
    """Of a bias in front of a normalisation it is rounding, in float32 relative to nothing."""
    model = nn.Sequential(nn.Linear(3, 16), nn.LayerNorm(16), nn.Linear(16, 2))
    model[0].weight.data *= 1e3
    with torch.no_grad():
        model[1].weight.zero_().add_(1)
    assert "grad of 6 parameters" in checked(model, *batch(), [tn.Grad(), tn.Variance(), tn.DiagGGN()])


def test_a_loss_that_cancels() -> None:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return ((f + 1e4).square() - (f - 1e4).square()).mean()

    x, _ = batch()
    assert "the loss, grad" in checked(mlp(), x, x, loss=loss)


def test_the_same_masks() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).train()
    assert "grad of 4" in checked(model, *batch())


def test_short_dtypes() -> None:
    model = nn.Sequential(nn.Linear(3, 64), nn.GELU(), nn.Linear(64, 2)).bfloat16()
    assert "grad of 4" in checked(model, *batch(dtype=torch.bfloat16))


def test_a_singular_matrix_of_the_batch() -> None:
    """An error of the batch, when it is called and when it is the example. All numbers in it are exact."""
    model, loss, x, y = nn.Linear(4, 2, bias=False), nn.MSELoss(reduction="sum"), torch.ones(6, 4), torch.ones(6, 2)
    nn.init.zeros_(model.weight)
    quantity = tn.NaturalGradientSMW(damping=1e-30)
    program = tn.compile(model, loss, (torch.eye(3, 4), y[:3]), [quantity])
    for called in (lambda: program(x, y), lambda: tn.compile(model, loss, (x, y), [quantity])):
        with pytest.raises(tn.InputError, match=r"natural_gradient.*singular"):
            called()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x))


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_that_is_rounding_alone(seed: int) -> None:
    """That of the bias of keys is 0."""
    torch.manual_seed(seed)
    x, y = torch.randn(2, 3, 5, 16).bfloat16()
    assert "grad of 6" in checked(Attention().bfloat16(), x, y)


# ---------------------------------------------------------------- nothing is left


def test_nothing_is_left() -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        m.calls += 1
        return m.l(F.dropout(m.norm(x), 0.5, m.training))

    model = Net(forward, l=nn.Linear(3, 2), norm=nn.BatchNorm1d(3).eval())
    model.calls = 0
    model.l.bias.requires_grad_(False)
    handles = [each.register_forward_hook(lambda *_: None) for each in (model, model.l)]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    own, modes = dict(model.named_parameters()), [m.training for m in model.modules()]
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert "checked on" in checked(model, *batch_of(7))
    torch.manual_seed(7)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.calls == 0 and modes == [m.training for m in model.modules()]
    assert all(p is own[name] and p.grad is None for name, p in model.named_parameters())
    assert not model.l.bias.requires_grad and model.l.weight.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert len(model._forward_hooks) == 1 and len(handles) == 2


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(5, 3, generator=source), torch.arange(5) % 2


def test_draws_go_on() -> None:
    """What torch draws after a compilation is what it would have drawn."""
    x, y = batch_of(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train()
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    checked(model, x, y, [tn.Grad(), tn.KFAC()])
    assert torch.equal(torch.rand(3), want)


def test_what_autograd_rounds_to_zero_is_not_compared() -> None:
    """A softmax that is sure of its class: the Hessian of the loss is zero in autograd, and tiny in the program."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        model.weight.mul_(1e4)
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.Grad(), tn.DiagGGN()])
    first, second = program.checked.splitlines()
    assert first.endswith("grad of 2 parameters")
    assert second == "not compared: diag_ggn, which autograd has as zero everywhere"


@pytest.mark.slow
def test_derivatives_that_are_rounding() -> None:
    """The cosine of two numbers is 1 or -1: its derivatives are zero, and what is left of them is no difference."""
    torch.manual_seed(0)
    model, y = nn.Linear(4, 1).double(), torch.randn(4, 1).double()
    for _ in range(8):
        x = torch.randn(4, 4).double()
        cosine = lambda f, y: (1 - nn.functional.cosine_similarity(f + 2, y, dim=1)).mean()  # noqa: E731
        program = tn.compile(model, cosine, (x, y), [tn.Grad(), tn.HessianDiag()])
        assert program.checked.startswith("checked on 2 samples")


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 4, 12, 22])
def test_rounding_of_small_denominators(seed: int) -> None:
    """The same of outputs near zero: what is left of the second derivative is larger than the spacing of numbers."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 1).double()
    cosine = lambda f, y: (1 - nn.functional.cosine_similarity(f, y, dim=1)).mean()  # noqa: E731
    assert checked(model, x, y, [tn.HessianDiag()], cosine).startswith("checked on 2 samples")


@pytest.mark.thinned(3)
@pytest.mark.parametrize("quantity", [tn.Grad(), tn.HessianDiag(), tn.DiagGGN()], ids=lambda quantity: quantity.name)
def test_a_tiny_wrong_number_is_found(quantity: tn.Quantity) -> None:
    """It is no rounding: autograd has it, too, of parameters that differ in their last digits."""
    torch.manual_seed(0)
    example, loss = batch(dtype=torch.float64), lambda f, y: 1e-12 * CE(f, y)
    program = tn.compile(mlp().double(), loss, example, [quantity])
    bent = type("Bent", (Bent,), {"key": quantity.name, "name": "2.bias"})
    with pytest.raises(tn.VerificationError, match=rf"{quantity.name} of parameter '2.bias'"):
        prove(bent(program.model, program.compiled, loss, [quantity]), example, tn.RULES)


def cast(m: nn.Module, x: Tensor) -> Tensor:
    """A model of float64 whose output is what a cast on the way rounds off: so are its derivatives."""
    turned = m.gone.roll(1, 0)
    return m.a(x) @ (turned.float().double() - turned)


@pytest.mark.slow
def test_casts_that_cancel() -> None:
    """They are rounded in autograd, too, sample by sample or not: float64 without the casts says what is exact."""
    torch.manual_seed(0)
    x, y = batch(dtype=torch.float64)
    for _ in range(8):
        model = Net(cast, a=nn.Linear(3, 2)).double()
        model.gone = nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
        said = checked(model, x, y, [tn.Grad(), tn.BatchGrad(), tn.Jacobians()])
        assert said.startswith("checked on")


def test_a_wrong_number_behind_a_cast_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net(lambda m, x: m.a(x).float().double(), a=nn.Linear(3, 2)).double()
    monkeypatch.setattr(api, "Program", type("Bent", (Bent,), {"name": "a.weight"}))
    with pytest.raises(tn.VerificationError, match=r"grad of parameter 'a\.weight'"):
        checked(model, *batch(dtype=torch.float64))


class Field(nn.Module):
    """The gradient of an energy by the position (Greydanus et al. 2019): torch.func inside of the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda z: self.energy(z).sum())(x)


def test_what_autograd_saves_is_counted_under_torch_func() -> None:
    x, y = torch.rand(2, 3, 4).double()
    program = tn.compile(Field().double(), nn.MSELoss(), (x, y), [tn.Grad()])
    assert program.checked == "checked on 2 samples against autograd: the output, the loss, grad of 4 parameters"
    assert program.saved_by_autograd is not None and program.saved_by_autograd >= 3 * 6 * 8  # of tanh, at least
    assert "autograd saves 0.00054 MB" in program.explain()


@pytest.mark.parametrize("power", [0.5, 2])
def test_another_power_of_the_batch_size(power: float) -> None:
    """What is made of ∇ℓ_n is compared with the s of the formula, L = s Σ ℓ_n."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2).double(), torch.randn(6, 3).double(), torch.randn(6, 2).double()
    quantities = [tn.BatchL2(scale=tn.Scale.UNSCALED), tn.Variance(), tn.SecondMoment()]
    program = tn.compile(model, lambda f, y: (f - y).square().sum() / len(f) ** power, (x, y), quantities)
    assert "not checked" not in program.checked


def test_squares_that_are_lost_in_a_short_dtype() -> None:
    """What helps is said, and helps."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 3).half(), torch.randn(8, 4).half(), torch.randn(8, 3).half()

    def small(f: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return 1e-4 * F.mse_loss(f, y)

    with pytest.raises(tn.VerificationError, match=r"squares in torch.float16 .* 0: accumulate=torch.float32"):
        tn.compile(model, small, (x, y), [tn.SecondMoment()])
    program = tn.compile(model, small, (x, y), [tn.SecondMoment()], accumulate=torch.float32)
    assert "second_moment of 2 parameters" in program.checked
