"""One Linear layer through all stages, each printed: text, graph, diagrams, plan, typed program, a pass, source, proof.

Every stage is a function from frozen data to frozen data; nothing here knows what a Linear is except its text.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.program.interpret import Interpreter
from tnbackprop.compiler.program.lines import Lines, lines_of
from tnbackprop.compiler.program.passes import PASSES
from tnbackprop.diagram.algebra import Cotangents, Uses, inline, tensor
from tnbackprop.diagram.core import N
from tnbackprop.diagram.derivatives import differentiate
from tnbackprop.diagram.reference import evaluate
from tnbackprop.notation.bind import bind

TEXT = "output[n, o] = weight[o, i] * input[n, i] + bias[o]"


def main() -> None:
    torch.manual_seed(0)

    stage("1 declare: the rule's text", TEXT)

    model = nn.Sequential(nn.Linear(3, 2))
    x, y = torch.randn(4, 3), torch.randn(4, 2)
    program = tn.compile(model, nn.MSELoss(), (x, y), quantities=[tn.SecondMoment()])
    stage("2 capture: the model and the loss as calls", program.explain("capture").strip())

    # The text meets the operands of one call: N samples, 3 inputs, 2 outputs. One tuple of factors per axis.
    operands = {"input": ((N,), (3,)), "weight": ((2,), (3,)), "bias": ((2,),)}
    names = {"input": "x", "weight": "W", "bias": "b"}
    bound = bind(tn.Rule(TEXT), operands, names, "z", ((N,), (2,)), "the tour")
    (equation,) = bound.equations
    assert equation.diagram is not None
    stage("3 bind: a diagram over runtime values", f"{equation.name}{equation.diagram}")

    # The Jacobian is derived: the operand is taken out of the diagram, its legs are left open and joined by deltas.
    jacobian = differentiate(equation.diagram, "W")
    assert jacobian is not None
    stage("4 derive: the Jacobian by W", f"J{jacobian.diagram}")

    # What a quantity is given: all uses of the parameter, and what was propagated to each of them.
    weight_legs = equation.diagram.products[0].operands[0].legs  # W[o, i]
    J = Uses((jacobian,), weight_legs)
    g = Cotangents((tensor("g_z", equation.legs),), scale=1 / N)
    G = J.T @ g
    stage("5 simplify: the individual gradients, without the deltas", f"G{G}")

    moment = tn.SecondMoment().extract(J, g)
    opened = inline(moment)
    stage(
        "6 extract: the second moment, a square of halves (...)",
        f"m{moment}\n\nand multiplied out:\nm{opened}",
    )

    # The meaning of a diagram: everything materialised, one naive einsum. Both forms mean the same.
    values = {"x": np.arange(12.0).reshape(4, 3), "g_z": np.arange(8.0).reshape(4, 2) - 3}
    first, second = (evaluate(diagram, values, 4) for diagram in (moment, opened))
    assert np.array_equal(first, second)
    stage("7 reference: the meaning of both at N = 4", str(first))

    second_half(program, x, y)


def second_half(program: tn.Program, x: torch.Tensor, y: torch.Tensor) -> None:
    """From the plan on: what is computed, and no longer what it means."""
    stage("8 plan and lower: build the half or multiply out, by predicted time", program.explain("plan").strip())

    # The program is data: values and the expressions that make them. A name is only what emit will call a value.
    stage("9 program: typed values, by what they are for", program.explain("program").split("\n\n")[0])

    # A pass takes the lines of the program and gives lines of the same values. Each is a row; this is the third.
    plan, writer = program.compiled.plan, program.compiled.writer
    in_place = next(row for row in PASSES if row.name == "in place")
    before = lines_of(plan.steps)
    after = in_place.apply(before, writer.context(writer.wanted))
    shown = [f"{writer.names(line.value)} = {writer.printer.text(line.expr)}" for line in (*before, *after)]
    width, count = max(map(len, shown)), len(before)
    changed = ((one, other if one != other else "") for one, other in zip(shown[:count], shown[count:], strict=True))
    pairs = [f"{one:{width}}   {other}".rstrip() for one, other in changed]
    stage(f"10 pass {in_place.name!r}: {in_place.says}", "\n".join(pairs))

    # The reference interpreter says what lines mean, and reads no text: both mean the same.
    wanted = [plan.results[result][name] for result in plan.results for name in plan.results[result]]
    for value in wanted:
        assert torch.equal(meaning(program, before, x, y)[value], meaning(program, after, x, y)[value])

    stage("11 emit: what runs", program.source.strip())

    # On the samples of the example, and with PyTorch's own autograd: a difference would have been a VerificationError.
    stage("12 check: the program proves itself", program.checked)

    result = program(x, y)
    stage("13 run", f"loss {result.loss:.4f}\n{result['second_moment']['0.weight']}")


def meaning(program: tn.Program, lines: Lines, x: torch.Tensor, y: torch.Tensor) -> Mapping[Any, torch.Tensor]:
    """What every value of the lines is on this batch, by the reference interpreter."""
    given = program.compiled.plan.given
    tensors = {name: tensor.detach().clone() for name, tensor in program.tensors(x, y).items()}
    env = {given[name]: tensor for name, tensor in tensors.items() if name in given}
    return Interpreter({N: len(x)}, elementwise).run(lines, env)


def elementwise(expr: sympy.Expr, args: Mapping[sympy.Symbol, Any]) -> Any:
    """A formula of sympy on tensors."""
    return sympy.lambdify(list(args), expr)(*args.values())


def stage(title: str, text: str) -> None:
    print(f"{title}\n{'-' * len(title)}\n{text}\n")


if __name__ == "__main__":
    main()
