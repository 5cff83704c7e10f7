"""tn.compute: compiled once per model, loss, quantities and shapes; compiled again where one of them changed."""

from __future__ import annotations

import gc
import inspect
from typing import Any

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop import api as front

from .. import oracle


def test_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    original = front.compile_program

    def counted(*args: object, **options: object) -> object:
        compiled.append(1)
        return original(*args, **options)

    monkeypatch.setattr(front, "compile_program", counted)
    model, loss = nn.Sequential(nn.Linear(3, 4), nn.Dropout(), nn.Linear(4, 2)).double().eval(), nn.MSELoss()
    for batch in (5, 2, 5):
        x, y = torch.randn(batch, 3).double(), torch.randn(batch, 2).double()
        got = tn.compute(model, loss, (x, y), [tn.BatchL2()])["batch_l2"]
        for name, want in oracle.batch_l2(model, loss, x, y).items():
            torch.testing.assert_close(got[name], want)
    assert len(compiled) == 1
    model[0].bias.requires_grad_(False)
    assert "0.bias" not in tn.compute(model, loss, (x, y), [tn.BatchL2()])["batch_l2"]
    model.train()
    tn.compute(model, loss, (x, y), [tn.BatchL2()])
    assert len(compiled) == 3


@pytest.mark.slow
def test_forgotten_with_the_model() -> None:
    gc.collect()
    before = len(front._PROGRAMS)
    model = nn.Linear(3, 2)
    tn.compute(model, nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), [tn.Grad()])
    assert len(front._PROGRAMS) == before + 1
    del model
    gc.collect()
    assert len(front._PROGRAMS) == before


def test_two_of_a_name() -> None:
    with pytest.raises(tn.InputError, match="two quantities are called 'grad'"):
        tn.compute(nn.Linear(3, 2), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), [tn.Grad(), tn.Grad()])


def test_a_graph_needs_a_cuda_device() -> None:
    """What it does there is in tests/test_cuda.py."""
    model, x, y = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.BatchL2()])
    with pytest.raises(tn.InputError, match=r"needs a CUDA device, and the model is on the cpu: call the program"):
        program.graphed(x, y)


def test_a_seed() -> None:
    """The same numbers for the same seed or generator, as of the program; others for another."""
    model, loss, batch = nn.Linear(3, 4), nn.CrossEntropyLoss(), (torch.randn(6, 3), torch.randint(4, (6,)))
    draw = lambda **how: tn.compute(model, loss, batch, [tn.SqrtGGNMC()], **how)["sqrt_ggn_mc"]["weight"]  # noqa: E731
    want = tn.compile(model, loss, batch, [tn.SqrtGGNMC()])(*batch, seed=3)["sqrt_ggn_mc"]["weight"]
    assert torch.equal(draw(seed=3), want) and not torch.equal(draw(seed=4), want)
    assert torch.equal(draw(generator=torch.Generator().manual_seed(3)), want)


def test_autocast_has_no_effect() -> None:
    """Everything is in the dtype of the parameters, when a program is compiled and when it is called."""
    model = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    batch, quantities = (torch.randn(5, 3), torch.randint(3, (5,))), [tn.DiagGGN(), tn.HessianDiag(), tn.BatchGrad()]
    want = tn.compile(model, nn.CrossEntropyLoss(), batch, quantities)(*batch)
    products = tn.hessian_product(model, nn.CrossEntropyLoss(), batch).to_dense()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(batch[0]).dtype == torch.bfloat16
        found = tn.compile(model, nn.CrossEntropyLoss(), batch, quantities)(*batch)
        assert torch.equal(tn.hessian_product(model, nn.CrossEntropyLoss(), batch).to_dense(), products)
    for quantity, by in want.items():
        for name, value in by.items():
            assert torch.equal(found[quantity][name], value), (quantity, name)


def test_autocast_has_no_effect_on_a_handed_cotangent() -> None:
    """Which has the dtype of the program's output, not of what the model would give."""
    model, x, y = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(5, 3), torch.randint(3, (5,))
    want = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        program = tn.compile(model, tn.HANDED, x, [tn.Grad()])
        with tn.attach(program) as attached:
            nn.functional.cross_entropy(model(x), y).backward()
    torch.testing.assert_close(tuple(attached.result["grad"].values()), want)


def test_a_result_is_a_mapping() -> None:
    result = tn.compute(nn.Linear(3, 2), nn.MSELoss(), (torch.randn(4, 3), torch.randn(4, 2)), [tn.Grad()])
    assert "grad" in result and "kfac" not in result
    assert result.get("kfac") is None and result.get("grad") is result["grad"]
    with pytest.raises(tn.InputError, match="no quantity 'kfac' in this result; it has: grad"):
        result["kfac"]


def test_every_option_of_compile_is_one_of_compute() -> None:
    """With the same default; what a call of a program takes comes on top."""
    ours, others = (inspect.signature(f).parameters for f in (tn.compute, tn.compile))
    assert list(ours) == ["batch" if name == "example" else name for name in others] + ["seed", "generator", "operands"]
    many = inspect.signature(tn.compile_many).parameters
    assert list(many) == list(others) and all(many[n].default == others[n].default for n in others)
    assert all(ours[name] == others[name] for name in ours.keys() & others.keys())


def test_lowerings_count() -> None:
    """They are tried, and a program that was compiled without them is not taken for one with."""
    tried: list[object] = []

    def lowering(store: object, product: object, legs: object) -> list[Any]:
        tried.append(product)
        return []

    model, batch = nn.Linear(3, 2), (torch.randn(4, 3), torch.randn(4, 2))
    want = tn.compute(model, nn.MSELoss(), batch, [tn.BatchGrad()])["batch_grad"]["weight"]
    assert not tried
    got = tn.compute(model, nn.MSELoss(), batch, [tn.BatchGrad()], lowerings=[lowering])["batch_grad"]["weight"]
    assert torch.equal(got, want) and tried


def test_parametrized_tensors_that_are_kept() -> None:
    """Inside of `parametrize.cached()` a program and a product read what the parameters are, and nobody else's."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), nn.CrossEntropyLoss()
    nn.utils.parametrizations.weight_norm(model[0])
    batch = torch.randn(6, 4).double(), torch.randint(3, (6,))
    named = dict(model.named_parameters())
    want = dict(zip(named, torch.autograd.grad(loss(model(batch[0]), batch[1]), list(named.values())), strict=True))
    dense = tn.hessian_product(model, loss, batch).to_dense()
    with nn.utils.parametrize.cached():
        before = loss(model(batch[0]), batch[1])
        found = tn.compute(model, loss, batch, [tn.Grad()])["grad"]
        torch.testing.assert_close(tn.hessian_product(model, loss, batch).to_dense(), dense)
        (before + loss(model(batch[0]), batch[1])).backward()
    for name, value in want.items():
        torch.testing.assert_close(found[name], value)
        torch.testing.assert_close(named[name].grad, 2 * value)


def test_another_default_device() -> None:
    """Tensors are made where the model is."""
    model, loss, batch = nn.Linear(4, 3), nn.CrossEntropyLoss(), (torch.randn(6, 4), torch.randint(3, (6,)))
    torch.set_default_device("meta")
    try:
        program = tn.compile(model, loss, batch, [tn.Sketch(size=2), tn.DirectionalGrad(), tn.DiagGGN(), tn.KFAC()])
        assert all(p.device.type == "cpu" for each in tn.projections(program).values() for p in each.values())
        assert tn.verify(model, *batch, loss=loss, quantities=[tn.DiagGGN()]).rows
    finally:
        torch.set_default_device("cpu")
