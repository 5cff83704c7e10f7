"""The layers of examples/layers.py: every quantity against the oracles, and how many lines each declaration takes."""

from __future__ import annotations

import ast
import runpy
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from .. import oracle, oracle_second
from ..cases import Case, Problem, classes, normal, seq
from ..second_order import DIFFERENT, TOLERANCE, assert_equal, error, products

SOURCE = Path(__file__).parent.parent.parent / "examples" / "layers.py"
EXAMPLE = runpy.run_path(str(SOURCE))
LAYERS, RULES = EXAMPLE["LAYERS"], EXAMPLE["RULES"]
LINES = 10
FIRST = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance())
SECOND = (tn.SqrtGGN(), tn.DiagGGN(), tn.DiagGGN("diag_ggn_per_sample", per_sample=True), tn.GGNTrace())


def problem_of(name: str, batch: int = 3, outputs: int = 3, classify: bool = True) -> Problem:
    """A linear layer before, so that the layer propagates as well, and one behind."""
    layer, shape = LAYERS[name]
    size = layer()(torch.zeros(1, *shape)).numel()

    def model() -> nn.Module:
        return seq(nn.Linear(shape[-1], shape[-1]), layer(), nn.Tanh(), nn.Flatten(), nn.Linear(size, outputs))

    if classify:
        return Case(name, model, shape, classes(outputs), nn.CrossEntropyLoss, batch).build()
    return Case(name, model, shape, normal, nn.MSELoss, batch).build()


@pytest.mark.thinned(9)
@pytest.mark.parametrize("name, classify", list(product(LAYERS, (True, False))))
def test_quantities(name: str, classify: bool) -> None:
    """One program with all of them, first and second order, at the compiled batch size and at another one."""
    problem = problem_of(name, classify=classify)
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), (*FIRST, *SECOND), rules=RULES)
    for batch in (3, 2):
        x, y = problem.x[:batch], problem.y[:batch]
        result = program(x, y)
        for quantity in FIRST:
            assert_equal(result[quantity.name], getattr(oracle, quantity.name)(problem.model, problem.loss, x, y), name)
        for quantity in SECOND[1:]:
            want = getattr(oracle_second, quantity.name)(problem.model, problem.loss, x, y)
            assert_equal(result[quantity.name], want, f"{quantity.name} of {name}")
        want = oracle_second.ggn_blocks(problem.model, problem.loss, x, y)
        assert_equal(products(result["sqrt_ggn"]), want, f"sqrt_ggn of {name}")


def rotated(layer: nn.Module, x: Tensor) -> Tensor:
    angle = layer.position[:, None] * layer.frequency
    first, second = x.chunk(2, -1)
    turned = (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin())
    return torch.cat(turned, -1)


def convolved(layer: nn.Module, x: Tensor) -> Tensor:
    windows = x.unfold(2, 2, 1).unfold(3, 2, 1)  # n, i, h, w, k, l
    return torch.einsum("ohwikl,nihwkl->nohw", layer.weight, windows) + layer.bias[:, None, None]


def multiplied(layer: nn.Module) -> Tensor:
    return torch.einsum("or,ir,jr->oij", layer.A, layer.B, layer.C)


def spread(layer: nn.Module, x: Tensor) -> Tensor:
    degree = torch.diag(layer.scale)
    torch.testing.assert_close(degree @ degree @ layer.graph.sum(1), torch.ones(len(degree), dtype=x.dtype))
    return degree @ layer.graph @ degree @ x @ layer.weight + layer.bias


WRITTEN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "cp_linear": lambda layer, x: x.flatten(1) @ multiplied(layer).flatten(1).T + layer.bias,
    "graph_convolution": spread,
    "locally_connected": convolved,
    "rotary": rotated,
}
"""The forwards of the formulas by hand, since the oracles take forwards as they are."""


@pytest.mark.parametrize("name", WRITTEN)
def test_forward(name: str) -> None:
    layer, shape = LAYERS[name][0]().double(), LAYERS[name][1]
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
        x = torch.randn(4, *shape, dtype=torch.float64)
        want = WRITTEN[name](layer, x)
        assert error(layer(x), want) <= TOLERANCE


EXACT = {
    "cp_linear": {"A": True, "B": True, "C": True, "bias": True},
    "Score": {"Q": False, "K": False},  # positions q and k
    "graph_convolution": {"weight": False, "bias": False},  # positions v
    "locally_connected": {"weight": False, "bias": False},  # a block for each h, w; positions h, w
    "rotary": {"frequency": False},  # positions t
    "GatedUnit": {"V": False, "G": False},  # positions s
}
"""Whether KFLR is the GGN block of a single sample."""


@pytest.mark.thinned(3)
@pytest.mark.parametrize("name", LAYERS)
def test_kronecker_of_one_sample(name: str) -> None:
    problem = problem_of(name, batch=1)
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.KFLR(), tn.KFAC()], rules=RULES)
    result = program(problem.x, problem.y, seed=0)
    want = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)
    assert set(result["kflr"]) == set(result["kfac"]) == set(want)
    for parameter, exact in EXACT[name].items():
        found = error(result["kflr"][f"1.{parameter}"].to_dense(), want[f"1.{parameter}"])
        assert found <= TOLERANCE if exact else found > DIFFERENT, f"{parameter} is off by {found:.3g}"


def test_kronecker_within_positions() -> None:
    """The locally connected layer has no shared weight: one sample is exact within each position h, w."""
    problem = problem_of("locally_connected", batch=1)
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.KFLR()], rules=RULES)
    got = program(problem.x, problem.y)["kflr"]["1.weight"].to_dense()
    want = oracle_second.ggn(problem.model, problem.loss, problem.x, problem.y)["1.weight"]
    shape = problem.model[1].weight.shape
    position = torch.arange(6).reshape(1, 2, 3, 1, 1, 1).expand(shape).reshape(-1)
    inside = (position[:, None] == position).to(got.dtype)
    assert error(got, want * inside) <= TOLERANCE
    assert error(got, want) > DIFFERENT


def declarations() -> dict[str, int]:
    """Lines of each declaration without its docstring and blank lines: a function, or a class and its row in RULES."""
    lines = SOURCE.read_text(encoding="utf-8").splitlines()
    found: dict[str, int] = {}
    for node in ast.parse("\n".join(lines)).body:
        own = set(range(node.lineno, (node.end_lineno or 0) + 1))
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name in LAYERS:
            assert ast.get_docstring(node)
            own -= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
            found[node.name] = sum(bool(lines[k - 1].strip()) for k in own)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "RULES":
            assert isinstance(node.value, ast.BinOp) and isinstance(node.value.right, ast.Dict)
            (target,) = node.value.right.keys
            found[ast.unparse(target)] += len(own)
    return found


def test_ten_lines() -> None:
    counted = declarations()
    assert set(counted) == set(LAYERS)
    assert max(counted.values()) <= LINES, counted
