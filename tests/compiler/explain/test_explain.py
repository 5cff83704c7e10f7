"""What `explain` says is what the plan does: choices, sums, polynomials."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from benchmarks.models import PROBLEMS
from tnbackprop.compiler.explain.alternatives import Way, alternatives
from tnbackprop.compiler.explain.polynomials import Symbols, in_batch, in_batch_text, without_common_factor
from tnbackprop.compiler.explain.stages import pulled_back
from tnbackprop.compiler.explain.text import body_text
from tnbackprop.compiler.invariants.stage import Stage
from tnbackprop.compiler.program.cost import number
from tnbackprop.compiler.sweep.derived import Extraction, Result
from tnbackprop.diagram.canonical import same
from tnbackprop.diagram.core import BATCH, Leg, N, Part
from tnbackprop.diagram.simplify import simplify
from tnbackprop.errors import InputError
from tnbackprop.runtime import Program

FIRST_ORDER = (tn.Grad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance())


@lru_cache(maxsize=2)
def net(*quantities: tn.Quantity) -> Program:
    """3C3D at N = 32."""
    problem = PROBLEMS["3c3d-32"]
    model, loss = problem.build(torch.device("cpu"))
    return tn.compile(model, loss, problem.data(problem.batch, torch.device("cpu")), quantities or (tn.BatchL2(),))


@pytest.mark.parametrize(
    ("parameter", "way"),
    [("0.weight", Way.EXPLICIT), ("3.weight", Way.EXPLICIT)]
    + [(name, Way.GRAM) for name in ("6.weight", "10.weight", "12.weight", "14.weight")],
)
def test_gram_late_explicit_early(parameter: str, way: Way) -> None:
    """Squared norms of 3C3D: early convolutions build the individual gradients, late layers never do."""
    shown = section(net().explain(Stage.PLAN), "Choices")
    block = next(block for block in shown.split("\n\n") if block.startswith(parameter))
    assert re.search(rf"batch_l2: {way.value}\b", block)
    assert re.search(rf"{way.value}[^;\n]* \(chosen\)", block)
    other = Way.EXPLICIT if way is Way.GRAM else Way.GRAM
    assert other.value in block


def section(text: str, title: str) -> str:
    """The part of an explanation under a title."""
    return re.split(r"\n\n(?=[^\n]*\n=+\n)", text.split(f"{title}\n{'=' * len(title)}\n")[1])[0]


def test_conditions_between_the_alternatives() -> None:
    """The condition is the textbook one, in leg sizes, with the numbers of this network; and the batch is said."""
    shown = section(net().explain(Stage.PLAN), "Choices")
    dense = next(block for block in shown.split("\n\n") if block.startswith("10.weight"))
    assert re.search(r"Gram takes fewer FLOPs than explicit where (5·i \+ 5·o|5·o \+ 5·i) < 3·(i·o|o·i)", dense)
    assert "(here 8,320 < 1.77e+06)" in dense
    assert "predicted faster: Gram for every N up to 4096" in dense


def test_alternatives_are_what_was_tried() -> None:
    """The chosen one comes first and reads what is built; all quantities together are the chosen option."""
    compiled = net(*FIRST_ORDER).compiled
    choices = {choice.parameter: choice for choice in compiled.plan.choices}
    for item in compiled.derived.schedule:
        if not isinstance(item, Extraction):
            continue
        choice = choices[compiled.graph.parameters[item.parameter][0]]
        assert choice.chosen.seconds == min(option.seconds for option in choice.options)
        for quantity, ways in alternatives(item.diagrams, choice).items():
            assert [way.chosen for way in ways] == [True] + [False] * (len(ways) - 1)
            assert set(ways[0].steps) <= set(choice.chosen.steps), quantity
            assert len({way.diagram for way in ways}) == len(ways)
            if ways[0].reads:
                assert ways[0].way is Way.EXPLICIT


def test_linear_quantities_are_not_called_gram() -> None:
    shown = section(net(*FIRST_ORDER).explain(Stage.PLAN), "Choices")
    assert "grad: Gram" not in shown
    assert re.search(r"10\.weight.*\n.*\n  grad: direct", shown)
    assert re.search(r"3\.weight.*\n.*\n  grad: explicit, reads G", shown)


def test_totals_are_those_of_the_program() -> None:
    program = net(*FIRST_ORDER)
    text = section(program.explain(Stage.PLAN), "Totals (N = 32)")
    cells = next(line for line in text.splitlines() if "together" in line).split()
    assert int(cells[1]) == len(program.compiled.plan.steps)
    assert float(cells[2]) == pytest.approx(program.flops, rel=1e-3)
    assert float(cells[3]) == pytest.approx(program.bytes, rel=1e-3)
    in_n = re.search(r"together.* ms +(.*) FLOPs; (.*) bytes", text)
    assert in_n is not None
    assert eval(python(in_n[1]), {"N": 32}) == program.flops
    assert eval(python(in_n[2]), {"N": 32}) == program.bytes


def python(polynomial: str) -> str:
    """A printed polynomial as Python."""
    plain = re.sub("([²³⁴⁵⁶⁷⁸⁹])", lambda m: f"**{'⁰¹²³⁴⁵⁶⁷⁸⁹'.index(m[1])}", polynomial)
    return plain.replace("·", "*").replace(",", "")


def test_every_polynomial_evaluates_to_its_number() -> None:
    """FLOPs and bytes of each step: the printed polynomial at the printed sizes is the number."""
    plan = net(*FIRST_ORDER).compiled.plan
    for step in plan.steps:
        for terms in (step.work.flops, step.work.moved):
            symbols = Symbols()
            polynomial = symbols.polynomial(terms)
            assert symbols.at(polynomial, plan.batch) == number(terms, plan.batch)
            values = {str(symbol): size for symbol, size in symbols.values.items()} | {"N": plan.batch}
            printed = python(symbols.text(polynomial, plan.batch))
            assert eval(printed, {}, values) == number(terms, plan.batch)
            assert sum(c * 7**power for power, c in in_batch(terms).items()) == number(terms, 7)


def test_leg_names_with_two_sizes_stay_distinct() -> None:
    symbols = Symbols()
    polynomial = symbols.polynomial(((2, (BATCH, Leg("h", 3), Leg("h'", 5))), (1, (Leg("h", 3), Leg("u", 1)))))
    assert symbols.text(polynomial, 4) == "2·N·h·h2 + h"
    assert symbols.legend() == "h=3 h2=5"
    assert symbols.at(polynomial, 4) == 2 * 4 * 15 + 3
    assert in_batch_text(((2, (BATCH, BATCH, Leg("h", 3))), (1, ()))) == "6·N² + 1"


def test_common_factors_leave_a_condition() -> None:
    a, b = sympy.symbols("a b", positive=True)
    assert without_common_factor(2 * N * a + 2 * N * b, 4 * N * a * b) == (a + b, 2 * a * b)


def test_every_stage_is_shown() -> None:
    """Formulas with their Jacobians and kinks, cotangents, diagrams before and after, path, kept values, totals."""
    program = net(*FIRST_ORDER)
    text = program.explain()
    for title in ("Graph", "Formulas and Jacobians", "Diagrams", "Choices", "Path (N = 32)", "Totals (N = 32)"):
        assert f"{title}\n{'=' * len(title)}\n" in text
    assert "∂layer_10[n,o]/∂p_10_weight[o',i'] = layer_9[n,i'] δ[o,o']" in text
    assert "at a kink: 0 at 0" in text
    assert "(0 if layer_10[n,s1] <= 0 else layer_10[n,s1])" in text
    assert "G[n,o,i] = layer_9[n,i] g_layer_10[n,o]" in text
    assert re.search(r"batch_l2\[n\] = Σ_\{o,i\} G\[n,o,i\]²", text)
    assert re.search(r"batch_l2\[n\] = Σ_\{\w,\w\} layer_9\[n,i\]² g_layer_10\[n,o\]²", text)
    kept = section(text, "Kept from the forward")
    assert re.search(r"layer_9 +\[N, 1152\] +147 kB +for ", kept)
    assert "Piecewise" not in text
    texts = program.compiled.texts
    assert all(texts[step][0] in section(text, "Path (N = 32)") for step in program.compiled.plan.steps)


def test_one_stage() -> None:
    program = net(*FIRST_ORDER)
    assert program.explain("capture").startswith("Graph\n")
    assert program.explain(Stage.EMIT).endswith(program.source)
    with pytest.raises(InputError, match="no stage 'paln': there are capture, bind, derive, plan, program, emit"):
        program.explain("paln")


def test_reused_and_unused_parameters_are_explained() -> None:
    """Two uses make one G; a parameter without a use has zeros and no alternative."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.spare = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    x = torch.randn(4, 3)
    program = tn.compile(Twice(), nn.MSELoss(), (x, x), (tn.BatchL2(), tn.BatchGrad()))
    text = section(program.explain(), "Diagrams")
    uses = next(line for line in text.splitlines() if line.startswith("  G[n,") and "+" in line)
    assert uses.count("g_layer") == 2
    assert "spare.weight" in text


def test_a_part_without_a_name_is_written_out() -> None:
    compiled = net(*FIRST_ORDER).compiled
    item = next(item for item in compiled.derived.schedule if isinstance(item, Extraction))
    diagram = item.diagrams[Result("batch_l2")]
    assert body_text(diagram, {}).count("(") == 1
    assert "²" in body_text(diagram, {})


def small(model: nn.Module, shape: tuple[int, ...], *quantities: tn.Quantity) -> Program:
    torch.manual_seed(0)
    return tn.compile(model, nn.CrossEntropyLoss(), (torch.randn(4, *shape), torch.randint(2, (4,))), quantities)


def convolution(*quantities: tn.Quantity) -> Program:
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
    return small(model, (2, 3, 3), *quantities)


@pytest.mark.parametrize("quantities", [(tn.BatchGrad(),), (tn.SqrtGGN(),)], ids=str)
def test_what_is_pulled_back_is_the_individual_gradient(quantities: tuple[tn.Quantity, ...]) -> None:
    """Jᵀ g as the Jacobian gives it, simplified, is the part that the quantities are made of."""
    program = convolution(*quantities)
    for item in (item for item in program.compiled.derived.items if isinstance(item, Extraction)):
        (raw,) = pulled_back(program.compiled, item)
        (quantity,) = item.diagrams.values()
        (part,) = (op.diagram for product in quantity.products for op in product.operands if isinstance(op, Part))
        named = raw.rename(dict(zip(raw.legs, part.legs, strict=True)))
        assert same(simplify(named), part) and not same(named, part)


@pytest.mark.parametrize(
    ("sharing", "assumed"),
    [
        ("EXPAND", ["factors are independent over the samples; h, w tied", "between different positions: h, w tied"]),
        ("REDUCE", ["factors are independent over the samples; h, w summed", "none: one factor, the block itself"]),
    ],
)
def test_what_is_assumed(sharing: str, assumed: list[str]) -> None:
    """Of a convolution's weight and bias, in the text of the program; nothing of the last bias."""
    text = section(convolution(tn.KFLR(sharing=tn.Sharing[sharing])).explain(), "Diagrams")
    shown = dict(
        re.findall(r"^(\d\.\w+) [^\n]*\n(?:  (?!Assumption)[^\n]*\n)*  Assumption of kflr: ([^\n]*)", text, re.M)
    )
    assert [part in shown[name] for part, name in zip(assumed, ("0.weight", "0.bias"), strict=True)] == [True, True]
    assert shown["3.bias"] == "none: one factor, the block itself"


def test_a_reduced_bias_needs_no_assumption() -> None:
    """What is said of it is so: the factor is the block of the GGN."""
    program = convolution(tn.KFLR(sharing=tn.Sharing.REDUCE), tn.DiagGGN())
    torch.manual_seed(0)
    result = program(torch.randn(4, 2, 3, 3), torch.randint(2, (4,)))
    block = result["kflr"]["0.bias"].to_dense()
    torch.testing.assert_close(block.diagonal(), result["diag_ggn"]["0.bias"])


def test_uses_are_counted() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(3, 2))
    assert "2 uses taken as positions" in small(model, (3,), tn.KFLR()).explain()


def test_long_fractions_and_signs() -> None:
    """The eps of a norm is a decimal, and what is subtracted has a minus."""
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    text = small(model, (3,), tn.HessianDiag()).explain()
    assert "(1/sqrt(layer_1_variance[n] + 1e-05))" in text
    assert "layer_1_centred[n,i] = layer_0[n,i] − layer_1_mean[n]" in text
    assert "+ (-1)" not in text and not re.search(r"\d{12}", text)
    assert "g_layer_1_centred[n,i'] += " in text


def test_what_is_computed_for_another_result() -> None:
    """The Hessian of a network that is linear up to kinks is its GGN: nothing is left to do."""
    text = section(convolution(tn.DiagGGN(), tn.HessianDiag()).explain(), "Choices")
    assert "hessian_diag: computed already, for another result" in text and "zoo" not in text


def test_kept_values_of_unknown_shape() -> None:
    """What only code reads has no shape here, and is not counted as a number."""
    text = section(convolution(tn.DiagGGN()).explain(), "Kept from the forward")
    assert re.search(r"loss_factor +\? +\? +for ", text)
    assert re.search(r"layer_0 +\[N, 3, 2, 2\] +192 B +for ", text)
    assert re.search(r"together .*, and \d of unknown shape", text)
