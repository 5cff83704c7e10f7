"""Attention as one call: what is taken for it, that its rule is right, and what is left in its parts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop import compiler
from tnbackprop.compiler.attention import ATTENTION, with_attention
from tnbackprop.rules import RULES

from ... import oracle, oracle_second
from ...problems import Case, Problem
from ...rules.test_rules import Step, check, inputs_of, run
from ...second_order import assert_equal

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]


class Heads(nn.Module):
    """Two heads of size 3 from one projection of [N, 5, 4]."""

    def __init__(self, mix: Mix, queries: int = 5) -> None:
        super().__init__()
        self.qkv, self.out, self.mix, self.queries = nn.Linear(4, 18), nn.Linear(6, 2), mix, queries

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(-1, 5, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(self.mix(q[:, :, : self.queries], k, v).transpose(1, 2).flatten(2))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 3**0.5, -1) @ v


def no_scale(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((0.4 * q) @ k.mT, -1) @ v


def masked_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(2, 3)) * 0.7
    return torch.matmul(scores.masked_fill(~torch.ones(5, 5, dtype=torch.bool).tril(), float("-inf")).softmax(3), v)


def last_axis_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Operands whose last axis is not that of memory."""
    q, k, v = (t.mT.contiguous().mT for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def to_itself(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The values are the keys, which are read elsewhere, too."""
    return F.scaled_dot_product_attention(q, k, k) + k.tanh() * v


def padding(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(torch.arange(5) < 4).expand(5, 5))


def band(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask that is nearly causal."""
    mask = torch.ones(5, 5, dtype=torch.bool).tril(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights are read, too."""
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v + weights.square().sum(-1, keepdim=True)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -2) @ v


WHOLE = (F.scaled_dot_product_attention, causal, by_hand, masked_by_hand, last_axis_apart, no_scale)
PARTS = (to_itself, padding, band, watched, over_queries)


def problem_of(mix: Mix, queries: int = 5) -> Problem:
    return Case(mix.__name__, lambda: Heads(mix, queries), (5, 4)).build()


def compared(problem: Problem) -> str:
    arguments = problem.model, problem.loss, problem.x, problem.y
    program = tn.compile(*arguments[:2], arguments[2:], [tn.BatchGrad(), tn.Variance()])
    result = program(problem.x, problem.y)
    assert_equal(result["batch_grad"], oracle.batch_grad(*arguments), "batch_grad")
    assert_equal(result["variance"], oracle.variance(*arguments), "variance")
    return program.source


@pytest.mark.parametrize("mix", WHOLE, ids=lambda mix: mix.__name__)
def test_one_kernel(mix: Mix) -> None:
    source = compared(problem_of(mix))
    assert source.count("flash_attention_for_cpu(") == source.count("flash_attention_for_cpu_backward(") == 1
    assert "softmax" not in source


@pytest.mark.parametrize("mix", PARTS, ids=lambda mix: mix.__name__)
def test_in_its_parts(mix: Mix) -> None:
    source = compared(problem_of(mix))
    assert "flash" not in source and "softmax" in source


def test_fewer_queries() -> None:
    assert "flash" in compared(problem_of(by_hand, queries=3))


@pytest.mark.parametrize("mix", WHOLE, ids=lambda mix: mix.__name__)
def test_the_rule(mix: Mix) -> None:
    """Formula, forward and native VJP are those of the operator."""
    problem = problem_of(mix)
    graph = with_attention(compiler.capture(problem.model, problem.loss, (problem.x, problem.y), RULES), (), RULES)
    env = inputs_of(graph, problem.model, problem.x, problem.y)
    found = 0
    for call in graph.calls:
        output = run(call, env)
        if call.target is ATTENTION:
            check(Step(call, dict(env), output))
            found += 1
        env[call.output.name] = output
    assert found == 1


def test_several_columns_look_inside() -> None:
    problem = problem_of(causal)
    arguments = problem.model, problem.loss, problem.x, problem.y
    program = tn.compile(*arguments[:2], arguments[2:], [tn.Grad(), tn.DiagGGN()])
    assert "flash" not in program.source
    assert_equal(program(problem.x, problem.y)["diag_ggn"], oracle_second.diag_ggn(*arguments), "diag_ggn")


def test_rules_of_ones_own_are_used() -> None:
    """Of a part, too: the kernel knows nothing of them."""
    problem = problem_of(causal)
    softmax = torch.ops.aten.softmax.int
    jacobian = tn.Rule(
        jacobian={"input": "2 * output[n, h, t, c] * (delta[c, k] - output[n, h, t, k])"},
        legs={"input": "n, h, t, k", "output": "n, h, t, c"},
    )
    arguments = problem.model, problem.loss, (problem.x, problem.y), [tn.Grad()]
    program = tn.compile(*arguments, rules=tn.RULES | {softmax: lambda call: jacobian}, check=False)
    assert "flash" not in program.source


def test_drawn_columns_do_not() -> None:
    problem = problem_of(causal)
    arguments = problem.model, problem.loss, (problem.x, problem.y)
    one, more = (tn.compile(*arguments, [tn.KFAC(mc_samples=count)]).source for count in (1, 2))
    assert one.count("flash_attention_for_cpu_backward(") == 1 and "flash" not in more


def test_other_dtypes_and_no_batch_stay() -> None:
    """Half precision keeps its statistics in another dtype; queries that are parameters have no samples."""

    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.key = nn.Parameter(torch.randn(1, 2, 3, 3)), nn.Linear(4, 6)

        def forward(self, x: Tensor) -> Tensor:
            k = self.key(x).view(-1, 5, 2, 3).transpose(1, 2)
            return F.scaled_dot_product_attention(self.queries, k, k).flatten(1)

    assert "flash" not in compared(Case("latent", Latent, (5, 4)).build())
    model = Heads(causal).bfloat16()
    x, y = torch.randn(3, 5, 4).bfloat16(), torch.randn(3, 5, 2).bfloat16()
    assert "flash" not in tn.compile(model, nn.MSELoss(), (x, y), [tn.Grad()]).source
