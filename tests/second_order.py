"""What the second-order tests share: quantities by name, one run, comparison of mappings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import tnbackprop as tn

from .cases import Case, Problem, classes, seq

TOLERANCE = 1e-9
FLOOR = 1e-3  # errors are relative to the largest entry, but not to one below this: it may be exactly zero
DIFFERENT = 1e-3  # two things that are not equal differ at least by this
IMPRECISE = ("hardsigmoid",)  # torch's derivative keeps 1/6 in float32, and has no derivative of its own
Values = Mapping[str, Tensor]
Kinds = Mapping[str, tuple[str, dict[str, object]]]
"""Key -> class and options."""
ENUMS = {"sharing": "Sharing", "fisher": "Fisher", "bias": "Bias"}


def make(kind: str, **options: object) -> tn.Quantity:
    """tn.<kind>(**options); the enums by the name of their member: sharing="REDUCE"."""
    resolved = {key: getattr(getattr(tn, ENUMS[key]), str(o)) if key in ENUMS else o for key, o in options.items()}
    quantity: tn.Quantity = getattr(tn, kind)(**resolved)
    return quantity


def run(problem: Problem, kind: str, seed: int | None = None, **options: object) -> Mapping[str, Tensor]:
    """One quantity of a problem, in a program of its own."""
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [make(kind, name="wanted", **options)])
    seeded = {} if seed is None else {"seed": seed}
    return program(problem.x, problem.y, **seeded)["wanted"]


def dense(problem: Problem, kind: str, seed: int | None = None, **options: object) -> dict[str, Tensor]:
    """The same for a quantity of Kronecker factors, as dense matrices."""
    return {name: factors.to_dense() for name, factors in run(problem, kind, seed, **options).items()}


def error(got: Tensor, want: Tensor) -> float:
    """Largest deviation, relative to the largest entry."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    return float((got - want).abs().max() / want.abs().max().clamp(min=FLOOR)) if want.numel() else 0.0


def assert_equal(got: Mapping[str, Tensor], want: Mapping[str, Tensor], what: str, bound: float = TOLERANCE) -> None:
    """Same parameters, shapes and values."""
    assert list(got) == list(want), what
    for name, expected in want.items():
        assert torch.isfinite(got[name]).all(), f"{what} of {name} is not finite"
        found = error(got[name], expected)
        assert found <= bound, f"{what} of {name}: relative error {found:.3g}"


def products(roots: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """V [V, N, *p] -> sum_v V_vn V_vnᵀ, [N, P, P]: all that the definition of a root fixes."""
    flat = {name: V.reshape(*V.shape[:2], -1) for name, V in roots.items()}
    return {name: torch.einsum("vnp,vnq->npq", V, V) for name, V in flat.items()}


ALL: Kinds = {
    "diag": ("DiagGGN", {}),
    "trace": ("GGNTrace", {}),
    "sqrt": ("SqrtGGN", {}),
    "gram": ("GGNGram", {}),
    "hessian": ("HessianDiag", {}),
    "hesscale": ("HesScale", {}),
    "bl89": ("BL89", {}),
    "kflr": ("KFLR", {}),
    "kfra": ("KFRA", {}),
    "empirical": ("KFAC", {"fisher": "EMPIRICAL"}),
    "jacobians": ("Jacobians", {}),
    "ntk": ("NTK", {}),
}
"""Everything that draws nothing, by key."""


def mlp(loss: Callable[[], nn.Module] = nn.CrossEntropyLoss, batch: int = 3, outputs: int = 3) -> Case:
    model = lambda: seq(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, outputs))  # noqa: E731
    return Case("mlp", model, (3,), classes(outputs), loss, batch)


def compiled(problem: Problem, kinds: Kinds = ALL) -> tn.Program:
    """All of them in one program."""
    quantities = [make(kind, name=key, **options) for key, (kind, options) in kinds.items()]
    return tn.compile(problem.model, problem.loss, (problem.x, problem.y), quantities)


def everything_of(program: tn.Program, problem: Problem) -> dict[str, Values]:
    """What it gives; factors as dense blocks, roots as their products [N, P, P]."""
    result = program(problem.x, problem.y, seed=0)
    found = {key: tensors(result[key]) for key in program.quantities}
    return found | ({"sqrt": products(result["sqrt"])} if "sqrt" in found else {})


def everything(problem: Problem, kinds: Kinds = ALL) -> dict[str, Values]:
    return everything_of(compiled(problem, kinds), problem)


def tensors(values: Mapping[str, Tensor | tn.KroneckerFactors]) -> dict[str, Tensor]:
    return {name: v if isinstance(v, Tensor) else v.to_dense() for name, v in values.items()}
