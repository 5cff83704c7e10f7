"""Quantities of some samples: as if the batch had no others, beside those of all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.drawing import quantity
from tnbackprop.results import Merger

from ..cases import CASES, Problem
from ..second_order import assert_equal

SOME, FEW = (2, 0), (1,)
NAMES = ("linear_rank3", "mlp_sum", "tied_names", "position_table", "time_first", "reused_convolution")


def problems() -> list[Any]:
    known = {case.name: case for case in CASES}
    return [pytest.param(known[name], id=name) for name in NAMES]


def quantities(samples: tuple[int, ...] | None) -> list[tn.Quantity]:
    own: dict[str, Any] = {} if samples is None else {"samples": samples}
    return [
        tn.BatchGrad(**own), tn.SecondMoment(**own), tn.DiagGGN(**own), tn.KFLR(**own), tn.KFAC(mc_samples=2, **own),
        tn.Total(tn.BatchL2(**own)), tn.GGNTrace(**own), tn.SqrtGGNMC(**own), tn.ClippedGrad(max_norm=0.1, **own),
    ]  # fmt: skip


def taken(problem: Problem, samples: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    index = torch.tensor(samples)
    return problem.x[index], problem.y[index]


def flat(value: Any) -> Any:
    return {name: v.to_dense() if isinstance(v, tn.KroneckerFactors) else v for name, v in value.items()}


@pytest.mark.slow
@pytest.mark.parametrize("case", problems())
def test_as_if_the_batch_had_no_others(case: Any) -> None:
    problem = case.build()
    batch = problem.x, problem.y
    asked = [tn.Grad(), tn.Variance(), *quantities(SOME), tn.DiagGGN("one", samples=FEW)]
    program = tn.compile(problem.model, problem.loss, batch, asked)
    result = program(*batch, seed=3)
    wanted = tn.compute(problem.model, problem.loss, taken(problem, SOME), quantities(None), seed=3)
    for key in wanted:
        assert_equal(flat(result[key]), flat(wanted[key]), key)
    one = tn.compute(problem.model, problem.loss, taken(problem, FEW), [tn.DiagGGN()])
    assert_equal(result["one"], one["diag_ggn"], "one")
    whole = tn.compute(problem.model, problem.loss, batch, [tn.Grad(), tn.Variance()])
    assert_equal(result["grad"], whole["grad"], "grad")
    assert_equal(result["variance"], whole["variance"], "variance")
    torch.testing.assert_close(result.loss, whole.loss)
    _, saved = program.forward(problem.x)
    halved = program.backward(saved, problem.y, seed=3)
    assert list(halved) == list(result)
    for key in result:
        assert_equal(flat(halved[key]), flat(result[key]), f"halves: {key}")


def net() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    return model, nn.CrossEntropyLoss(), torch.randn(6, 3).double(), torch.randint(3, (6,))


def test_merged_and_kept() -> None:
    """Of the same places of every batch, with their own count; and as a dict of tensors."""
    model, loss, x, y = net()
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.DiagGGN(samples=SOME), tn.BatchGrad(samples=FEW)])
    batches = [(x, y), (x[:4].flip(0), y[:4].flip(0))]
    whole = tn.over(program, batches)
    one, two = (program(*batch) for batch in batches)
    both = one.merge(two)
    index = torch.tensor(SOME)
    rows = torch.cat([batch[0][index] for batch in batches]), torch.cat([batch[1][index] for batch in batches])
    wanted = tn.compute(model, loss, rows, [tn.DiagGGN()])["diag_ggn"]
    for found in (whole, both, tn.Result.from_state_dict(both.state_dict()), both.to(dtype=torch.float64)):
        assert found.count == 10 and {k: v.count for k, v in found.some.items()} == {SOME: 4, FEW: 2}
        assert_equal(found["diag_ggn"], wanted, "merged")
        assert found["batch_grad"]["0.weight"].shape == (2, 4, 3)
    assert_equal(one["diag_ggn"], program(x, y)["diag_ggn"], "unchanged")
    other = tn.compile(model, loss, (x, y), [tn.Grad(), tn.DiagGGN(samples=FEW), tn.BatchGrad(samples=FEW)])(x, y)
    before = both.flat("grad").clone()
    with pytest.raises(tn.InputError, match=r"of samples \[\(2, 0\), \(1,\)\] and \[\(1,\)\]"):
        both.merge(other)
    assert torch.equal(both.flat("grad"), before)
    merger = Merger(one)
    some = {**two.some, FEW: two.some[FEW].to(dtype=torch.float32)}
    with pytest.raises(tn.InputError, match="convert one"):
        merger.add(two.with_values(two.loss, two.output, two.own, two.batch, some))
    assert_equal(merger.result()["diag_ggn"], one["diag_ggn"], "nothing is half merged")


def test_operands_seeds_and_other_parameters() -> None:
    model, loss, x, y = net()
    asked = [tn.WeightedGrad(), tn.DirectionalGrad(samples=SOME), tn.WeightedGrad("some", samples=SOME)]
    program = tn.compile(model, loss, (x, y), asked)
    assert set(program.operands) == {"weights", "direction"}
    operands = program.some_operands(x, y)
    moved = {"0.bias": torch.randn(4).double()}
    result = program(x, y, operands=operands, parameters=moved)
    index = torch.tensor(SOME)
    own = {"direction": operands["direction"], "weights": operands["weights"][index]}
    alone = tn.compile(model, loss, (x[index], y[index]), [tn.DirectionalGrad(), tn.WeightedGrad("some")])
    wanted = alone(x[index], y[index], operands=own, parameters=moved)
    for key in wanted:
        assert_equal(result[key], wanted[key], key)
    with pytest.raises(tn.InputError, match="operands has nothing for 'direction'"):
        program(x, y, operands={"weights": operands["weights"]})
    with pytest.raises(tn.InputError, match="operands has 'else', which nothing reads"):
        program(x, y, operands={**operands, "else": x})


def test_clients_find_it() -> None:
    """attach, compute, verify, explain, draw, copies: as for any program."""
    model, loss, x, y = net()
    asked = [tn.Grad(), tn.DiagGGN(samples=SOME)]
    program = tn.compile(model, loss, (x, y), asked)
    wanted = program(x, y)["diag_ggn"]
    with tn.attach(program) as attached:
        loss(model(x), y).backward()
    assert_equal(attached.result["diag_ggn"], wanted, "attach")
    for _ in range(2):
        assert_equal(tn.compute(model, loss, (x, y), asked)["diag_ggn"], wanted, "compute")
    assert tn.verify(program, x, y).ok
    assert "Of samples 2, 0\n" in program.explain() and "of samples (2, 0)" in repr(program)
    assert tn.draw(quantity(program, "diag_ggn", "0.weight")).svg.startswith("<svg")
    with torch.no_grad():
        model[0].weight.mul_(2)
    moved = program(x, y)["diag_ggn"]
    assert not torch.equal(moved["0.weight"], wanted["0.weight"])


def random_model() -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    model, *rest = net()
    return nn.Sequential(model, nn.Dropout(0.5)), *rest


@pytest.mark.parametrize("samples", ["ab", [], [1, 1], [-1], 3, [True], [0.5]])
def test_no_samples(samples: Any) -> None:
    with pytest.raises(tn.InputError, match=r"DiagGGN: samples=.*: give places in a batch, each once"):
        tn.DiagGGN(samples=samples)
    model, loss, x, y = net()
    with pytest.raises(tn.InputError, match=r"ClippedGrad: samples=.*: give places in a batch, each once"):
        tn.compile(model, loss, (x, y), [tn.ClippedGrad(samples=samples)])


def test_refused() -> None:
    model, loss, x, y = net()
    some = tn.DiagGGN(samples=(1, 5))
    with pytest.raises(tn.InputError, match=r"samples=\(1, 5\): the batch has 4 samples, numbered from 0"):
        tn.compile(model, loss, (x[:4], y[:4]), [some])
    program = tn.compile(model, loss, (x, y), [tn.Grad(), some])
    with pytest.raises(tn.InputError, match=r"samples=\(1, 5\): the batch has 5 samples"):
        program(x[:5], y[:5])
    with pytest.raises(tn.UnsupportedError, match="samples= with a cotangent that is handed in"):
        tn.compile(model, tn.HANDED, (x, None), [tn.BatchGrad(samples=(0,))])
    dropping, *rest = random_model()
    with pytest.raises(tn.UnsupportedError, match=r"samples= with a model that draws random numbers \(.*dropout"):
        tn.compile(dropping, rest[0], (x, y), [some])
    with pytest.raises(tn.UnsupportedError, match=r"is of samples .* alone, and this is for all of a batch"):
        tn.generate(model, [some], "model", example=(x, y), loss=loss)
    with pytest.raises(tn.UnsupportedError, match=r"is of samples .* alone, and this is for all of a batch"):
        tn.generate(nn.Linear(3, 2), [tn.BatchGrad(samples=(0,))], example=x.float())
    other = tn.compile(model, loss, (x, y), [tn.Grad()])
    with pytest.raises(tn.InputError, match="this program's own forward"):
        program.backward(other.forward(x)[1], y)


def test_memory_holds_the_results_of_all() -> None:
    """Those of one program are there while the next one runs."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    x, y, loss = torch.randn(64, 64), torch.randint(10, (64,)), nn.CrossEntropyLoss()
    quantities = [tn.Grad(), tn.KFLR(samples=range(8))]
    program = tn.compile(model, loss, (x, y), quantities)
    result, peak = program(x, y), program.peak_bytes
    factors = [factor for K in result["kflr"].values() for factor in K.factors]
    assert peak > sum(each.nbytes for each in (*result["grad"].values(), *factors))
    assert tn.compile(model, loss, (x, y), quantities, memory_limit=peak).peak_bytes <= peak
    for limit in (0.95 * peak, 0.2 * peak):
        with pytest.raises(tn.UnsupportedError, match=r"memory_limit=.* cannot be met"):
            tn.compile(model, loss, (x, y), quantities, memory_limit=limit)
