"""What runs, op by op: nothing twice, and no weight gradient with individual gradients."""

from __future__ import annotations

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

import tnbackprop as tn
from benchmarks.models import net_3c3d

from ...programs import code_of


def ops(*quantities: tn.Quantity) -> tuple[Counter[str], tn.Program]:
    """How often each operator runs, with the shapes of its inputs."""
    torch.manual_seed(0)
    model, loss = net_3c3d(), torch.nn.CrossEntropyLoss()
    x, y = torch.randn(4, 3, 32, 32), torch.randint(10, (4,))
    program = tn.compile(model, loss, (x, y), quantities)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        program(x, y)
    return Counter(event.name for event in seen.events() or ()), program


def weight_gradients(program: tn.Program) -> list[str]:
    """Code of native weight gradients that are summed over the batch."""
    return [code for code in codes(program) if "_weight(" in code and not code.rstrip(")").endswith("N")]


def codes(program: tn.Program) -> list[str]:
    """The code of all that runs."""
    code = code_of(program)
    return [code[step] for step, _ in program.compiled.plan.timed]


def test_no_weight_gradient_with_individual_gradients() -> None:
    """Two convolutions need the VJP of their input, with the weight's; no gradient is computed twice for the sum."""
    alone, gradient = ops(tn.Grad())
    assert len(weight_gradients(gradient)) == 3
    assert alone["aten::convolution_backward"] == 3
    together, program = ops(tn.Grad(), tn.BatchGrad())
    assert weight_gradients(program) == []
    built = sum("_weight(" in code for code in codes(program))
    assert together["aten::convolution_backward"] == 2 + built


def test_no_half_of_a_square_twice() -> None:
    """No two steps run the same code, and a cotangent passes through a layer once."""
    first_order = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.BatchDot(), tn.SecondMoment(), tn.Variance())
    counted, program = ops(*first_order)
    every = codes(program)
    assert len(every) == len(set(every))
    assert sum("conv2d_input(" in code or "[True, False, False]" in code for code in every) == 2
    assert counted["aten::scatter_add_"] == 4  # three poolings, and the labels in the loss
    assert counted["aten::threshold_backward"] == 5
