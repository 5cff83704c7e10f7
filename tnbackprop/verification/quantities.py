"""Every quantity of a program against torch.func: what must be found, by class of quantity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..compiler.running.failure import lacks_derivative
from ..definitions import oracle
from ..definitions.defined import EXPECTED as LINE_BY_LINE
from ..definitions.defined import Defined, explained
from ..definitions.handed import HANDED, expected
from ..definitions.oracle import Problem, Values
from ..definitions.report import LeftOut, NotDefined, Row, deviation, wrong_entries
from ..definitions.rooted import FORMULAS, rooted
from ..linalg import KroneckerFactors
from ..phased import ClippedGrad, NaturalGradientSMW
from ..quantities import (
    BL89,
    KFAC,
    KFLR,
    KFRA,
    NTK,
    AxisMoments,
    BatchDot,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagGGNMC,
    DirectionalCurvature,
    DirectionalGrad,
    DirectionalRoot,
    Fisher,
    GGNGram,
    GGNTrace,
    Grad,
    HesScale,
    HessianDiag,
    InputGrad,
    Jacobians,
    Labels,
    ProjectedFactors,
    Quantity,
    RotatedSecondMoment,
    Scale,
    SecondMoment,
    Sketch,
    SqrtGGN,
    SqrtGGNMC,
    Total,
    Variance,
    WeightedGrad,
)
from ..quantities.factors import Sharing
from ..runtime import Program
from .diagnose import likely
from .drawn import check_law, check_mean, is_drawn
from .rules import LIMIT, Finding, first_entry

Expected = Callable[[Problem, Any], Values]
"""What torch.func finds, for a problem and a quantity with its options."""

ALL: tuple[Quantity, ...] = (
    Grad(), InputGrad(), BatchGrad(), BatchL2(), BatchDot(), SecondMoment(), Variance(), SqrtGGN(), DiagGGN(),
    DiagGGN("diag_ggn_per_sample", per_sample=True), GGNTrace(), GGNGram(), HessianDiag(),
    HessianDiag("hessian_diag_per_sample", per_sample=True), Jacobians(), NTK(),
    SqrtGGNMC(), DiagGGNMC(), KFLR(), KFLR("kflr_reduce", sharing=Sharing.REDUCE), KFAC(),
    KFAC("kfac_empirical", fisher=Fisher.EMPIRICAL), KFRA(), HesScale(), BL89(), ClippedGrad(), NaturalGradientSMW(),
    DirectionalGrad(), DirectionalRoot(), DirectionalCurvature(), WeightedGrad(), AxisMoments(), Total(), Sketch(),
    RotatedSecondMoment(), ProjectedFactors(root=Labels()),
)  # fmt: skip
"""What is compared where nobody says which."""
FEW: tuple[Quantity, ...] = (BatchGrad(),)
"""What is compared with every further shape and option."""


def _scaled(values: Values, factor: float) -> Values:
    return {name: factor * value for name, value in values.items()}


def _linear(problem: Problem, quantity: Any, power: int) -> float:
    """From the gradients as the loss scales them to the scale of the quantity."""
    return float(problem.scale**-power) if quantity.scale is Scale.UNSCALED else 1.0


def _moment(problem: Problem, quantity: SecondMoment) -> Values:
    factor = problem.size * problem.scale**2 if quantity.scale is Scale.BACKPACK else 1.0
    return _scaled(oracle.second_moment(problem), factor)


def _variance(problem: Problem, quantity: Variance) -> Values:
    return _scaled(oracle.variance(problem), problem.scale**2 if quantity.scale is Scale.BACKPACK else 1.0)


def _spectrum(blocks: Tensor, columns: int) -> Tensor:
    """The eigenvalues of Σ_n G_n, the largest first, as many as there are columns of all samples."""
    values = torch.linalg.eigvalsh(blocks.sum(0)).flip(0)
    return torch.cat([values, values.new_zeros(columns)])[:columns]


EXPECTED: Mapping[type[Quantity], Expected] = {
    Grad: lambda problem, _: oracle.gradient(problem),
    BatchGrad: lambda problem, q: _scaled(oracle.individual(problem), _linear(problem, q, 1)),
    BatchL2: lambda problem, q: _scaled(oracle.squared_norms(problem), _linear(problem, q, 2)),
    BatchDot: lambda problem, q: _scaled(oracle.dot_products(problem), _linear(problem, q, 2)),
    SecondMoment: _moment,
    Variance: _variance,
    SqrtGGN: lambda problem, _: oracle.ggn_blocks(problem),
    DiagGGN: lambda problem, q: oracle.ggn_diagonal(problem, q.per_sample),
    GGNTrace: lambda problem, _: oracle.ggn_traces(problem),
    GGNGram: lambda problem, _: oracle.ggn_blocks(problem),
    HessianDiag: lambda problem, q: oracle.hessian_diagonal(problem, q.per_sample),
    Jacobians: lambda problem, _: oracle.jacobians(problem),
    NTK: lambda problem, _: oracle.ntk(problem),
}


def check_quantities(
    program: Program, problem: Problem, values: Mapping[str, Mapping[str, Any]], case: str, means: bool
) -> Iterator[Finding]:
    """A row for each quantity of each parameter.

    values  quantity -> parameter -> value, as the program gives it
    means   also what is drawn, in the mean over many draws
    """
    defined = Defined(program, problem)
    if means:
        yield from check_law(defined, case)
    for key, quantity in program.quantities.items():
        why = _left_out(problem, quantity)
        if why:
            yield LeftOut(key, why)
            continue
        if is_drawn(quantity) and not defined.draws_at_output(defined.root(key)):
            if not isinstance(quantity, SqrtGGNMC | DiagGGNMC | KFAC):
                yield LeftOut(key, "its columns are drawn by way of the loss's Hessian, or behind the output")
            elif means:
                yield from check_mean(defined, key, quantity, case)
            continue
        try:
            want = _expected(defined, key, quantity, values[key])
        except NotDefined as reason:
            yield LeftOut(key, str(reason))
            continue
        except RuntimeError as error:
            if not lacks_derivative(error):
                raise
            yield LeftOut(key, f"torch.func has no second derivative here: {error}")
            continue
        for name, wanted in want.items():
            if isinstance(wanted, NotDefined):
                yield LeftOut(f"{key} of '{name}'", str(wanted))
            elif name not in values[key]:
                yield Row(key, f"'{name}'", case, tuple(wanted.shape), float("inf"), "  the program has no value")
                return
            else:
                yield _compare(key, name, quantity, values[key][name], wanted, case)


def _expected(
    defined: Defined, key: str, quantity: Quantity, got: Mapping[str, Any]
) -> Mapping[str, Tensor | NotDefined]:
    if type(quantity) in EXPECTED:
        return EXPECTED[type(quantity)](defined.problem, quantity)
    if type(quantity) in FORMULAS:
        return rooted(defined, key, quantity, got)
    if isinstance(quantity, HANDED):
        return expected(defined, key, quantity, got)
    if isinstance(quantity, Total):
        return _summed(quantity, _expected(defined, key, quantity.quantity, got))
    return LINE_BY_LINE[type(quantity)](defined, key, quantity, got)


def _summed(total: Total, each: Mapping[str, Tensor | NotDefined]) -> Mapping[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in each.items():
        if isinstance(value, NotDefined):
            raise value
        group = total.group_of(name)
        found[group] = found[group] + value if group in found else value
    return found


def _left_out(problem: Problem, quantity: Quantity) -> str:
    """Why a quantity is not compared; "" where it is."""
    if isinstance(quantity, Total):
        return _left_out(problem, quantity.quantity)
    known = any(type(quantity) in table for table in (EXPECTED, LINE_BY_LINE, FORMULAS))
    if not known and not isinstance(quantity, HANDED):
        return f"{type(quantity).__name__} is not one of tnbackprop's: nothing says what it must be"
    outputs = problem.output.numel()
    largest = max((p.numel() for p in problem.theta.values()), default=0)
    factors = isinstance(quantity, KFLR | KFAC)
    pairs = isinstance(quantity, SqrtGGN | DiagGGN | GGNTrace | GGNGram | HessianDiag) or factors
    entries = largest * max(largest, outputs) * problem.size if pairs else largest * outputs
    return f"{entries} entries to compare with: give verify a smaller model or batch" if entries > 10 * LIMIT else ""


def _compare(key: str, name: str, quantity: Quantity, got: Any, want: Tensor, case: str) -> Row:
    axes = tuple(f"axis{k}" for k in range(want.ndim))
    if isinstance(got, KroneckerFactors):
        got = got.to_dense()
    exact = type(quantity) not in FORMULAS
    if exact and isinstance(quantity, SqrtGGN):  # fixed up to a rotation of its columns: Σ_v V_v V_vᵀ is compared
        V = got.reshape(*got.shape[:2], -1)
        got = torch.einsum("vnp,vnq->npq", V, V)
    if exact and isinstance(quantity, DirectionalRoot):
        got = got.square().sum(0)
    if exact and isinstance(quantity, GGNGram):  # so is its Gram matrix: the spectrum is compared
        columns = got.shape[0] * got.shape[1]
        got = torch.linalg.eigvalsh(got.reshape(columns, columns)).flip(0)
        want, axes = _spectrum(want, columns), ("eigenvalue",)
    wrong = ""
    if got.shape != want.shape:
        wrong = f"  shape {list(got.shape)}, not {list(want.shape)}"
    elif wrong_entries(got, want).any():
        cause = likely(got, want, axes, {})
        wrong = first_entry(f"{key} of '{name}'", "the program", "torch.func", got, want, axes)
        wrong += f"\n  likely: {cause}" if cause else ""
    return Row(key, f"'{name}'", case, tuple(want.shape), deviation(got, want), wrong, explained(quantity))
