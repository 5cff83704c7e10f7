"""Which parameters a program is of, other tensors in their place, and several programs of one capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call

import tnbackprop as tn
from tnbackprop import compiler

from ..second_order import assert_equal


class Tied(nn.Module):
    """An embedding whose weight is the head's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(torch.tanh(self.body(self.embed(x)).mean(1) + self.shift))
        return found


def problem() -> tuple[Tied, nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return Tied().double(), nn.CrossEntropyLoss(), torch.randint(7, (5, 3)), torch.randint(7, (5,))


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "parameters, names",
    [
        ("body.*", ["body.weight", "body.bias"]),
        (["body.bias"], ["body.bias"]),
        ("head.*", ["embed.weight"]),
        (["*.bias", "embed.weight"], ["embed.weight", "body.bias"]),
        (lambda name: "weight" in name, ["embed.weight", "body.weight"]),
    ],
)
def test_which(parameters: Any, names: list[str]) -> None:
    model, loss, x, y = problem()
    quantities = [tn.BatchGrad(), tn.DiagGGN(), tn.Total()]
    program = tn.compile(model, loss, (x, y), quantities, parameters=parameters)
    whole = tn.compile(model, loss, (x, y), quantities)
    result, every = program(x, y), whole(x, y)
    assert list(result["batch_grad"]) == names and all(p.requires_grad for p in model.parameters())
    for key in ("batch_grad", "diag_ggn"):
        assert_equal(result[key], {name: every[key][name] for name in names}, key)
    norms = sum(G.flatten(1).square().sum(1) for G in result["batch_grad"].values())
    torch.testing.assert_close(result["batch_l2_total"]["all"], norms)


def test_the_rest_costs_what_frozen_ones_cost() -> None:
    model, loss, x, y = problem()
    program = tn.compile(model, loss, (x, y), [tn.BatchGrad()], parameters="body.bias", check=False)
    for name, p in model.named_parameters():
        p.requires_grad_(name == "body.bias")
    assert program.source == tn.compile(model, loss, (x, y), [tn.BatchGrad()], check=False).source


def test_compute_tells_selections_apart() -> None:
    model, loss, x, y = problem()
    for chosen in ("body.*", None, "body.bias", "body.*"):
        result = tn.compute(model, loss, (x, y), [tn.Grad()], parameters=chosen)
        assert len(result["grad"]) == {"body.*": 2, None: 3, "body.bias": 1}[chosen]


@pytest.mark.parametrize(
    "parameters, message",
    [
        ("nothing*", r"'nothing\*' fits no trainable parameter of the model: there are embed.weight, body.weight"),
        ("body", r"'body' fits no trainable parameter of the model: write 'body\.\*' for those inside"),
        (nn.Linear(1, 1), r"parameters is a Linear: give names or patterns"),
        (3, r"parameters=3: give names or patterns"),
        ([3], r"parameters=\[3\]: give names or patterns"),
        (lambda name: False, "selects no trainable parameter"),
    ],
)
def test_what_selects_nothing(parameters: Any, message: str) -> None:
    model, loss, x, y = problem()
    with pytest.raises(tn.InputError, match=message):
        tn.compile(model, loss, (x, y), [tn.Grad()], parameters=parameters)


def test_attach_wants_all_of_them() -> None:
    model, loss, x, y = problem()
    program = tn.compile(model, loss, (x, y), [tn.Grad()], parameters="body.*", check=False)
    with pytest.raises(tn.InputError, match=r"is not of 'embed\.weight', which requires grad and would get none"):
        tn.attach(program)


# -- other tensors


def test_other_parameters() -> None:
    """As functional_call has it; the model stays what it is, and names of tied parameters are one."""
    model, loss, x, y = problem()
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.BatchL2()])
    before = program(x, y)
    other = {n: torch.randn_like(p) for n, p in model.named_parameters()} | {"shift": torch.ones(4).double()}
    result = program(x, y, parameters=other)

    def value(theta: dict[str, torch.Tensor]) -> torch.Tensor:
        found: torch.Tensor = loss(functional_call(model, theta | {"shift": other["shift"]}, x), y)
        return found

    theta = {n: other[n].clone().requires_grad_() for n, _ in model.named_parameters()}
    wanted = torch.autograd.grad(value(theta), list(theta.values()))
    assert_equal(result["grad"], dict(zip(theta, wanted, strict=True)), "grad")
    tied = program(x, y, parameters={"head.weight": other["embed.weight"]})
    assert_equal(tied["grad"], program(x, y, parameters={"embed.weight": other["embed.weight"]})["grad"], "tied")
    assert_equal(program(x, y)["grad"], before["grad"], "before")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ([1], "parameters is list: give"),
        ({"body": torch.zeros(4)}, "no parameter or buffer 'body' that the program reads"),
        ({"body.bias": torch.zeros(3).double()}, r"parameters: 'body.bias' has shape \[3\], the model's \[4\]"),
        ({"body.bias": torch.zeros(4)}, "parameters: 'body.bias' has dtype torch.float32, the model's"),
        ({"body.bias": 0.0}, "'body.bias' is float, not a tensor"),
    ],
)
def test_other_parameters_are_checked(parameters: Any, message: str) -> None:
    model, loss, x, y = problem()
    program = tn.compile(model, loss, (x, y), [tn.Grad()], check=False)
    with pytest.raises(tn.InputError, match=message):
        program(x, y, parameters=parameters)


# -- several programs


def test_many_of_one_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    capture = compiler.capture

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return capture(*args)

    monkeypatch.setattr(compiler, "capture", counted)
    model, loss, x, y = problem()
    lists = [[tn.Grad()], [tn.Grad(), tn.KFAC()], [tn.HessianDiag()]]
    programs = tn.compile_many(model, loss, (x, y), (each for each in lists))  # type: ignore[arg-type]
    assert count == 1
    for program, quantities in zip(programs, lists, strict=True):
        alone = tn.compile(model, loss, (x, y), quantities, check=False)
        assert program.source == alone.source and list(program.quantities) == [q.name for q in quantities]
    with pytest.raises(tn.InputError, match="give lists of quantities"):
        tn.compile_many(model, loss, (x, y), [tn.Grad()])  # type: ignore[list-item]
