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

    def __init__(self, mix: Mix, queries: int | None = None) -> None:
        super().__init__()
        self.qkv, self.out, self.mix, self.queries = nn.Linear(4, 18), nn.Linear(6, 2), mix, queries

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
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


def kept(q: Tensor, *axes: int) -> Tensor:
    """A mask by samples, heads, queries and keys, or by some of them; the first key is always seen."""
    every = (q.detach().unsqueeze(3) + q.detach().unsqueeze(2).flip(1)).sum(-1)
    gone = [axis for axis in range(1, 4) if axis not in axes]
    return ((every.mean(gone, keepdim=True) if gone else every) > 0) | (torch.arange(5) == 0)


def by_sample(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept(q, 2, 3), scale=0.7)


def by_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept(q, 3))


def by_all(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept(q, 1, 2, 3))


def by_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of some queries nothing is left."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept(q, 2)[..., 1:2])


def nothing_added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """-inf for all that one query sees."""
    mask = torch.zeros(5, 5, dtype=q.dtype).masked_fill(torch.arange(5)[:, None] == 2, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def added(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Numbers that are no mask, by heads (Press et al. 2022)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=slopes(q))


def slopes(q: Tensor) -> Tensor:
    far = torch.arange(5) - torch.arange(5)[:, None]
    return far * torch.tensor([0.1, 0.2]).view(1, 2, 1, 1).to(q)


def lowest(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = (1 - kept(q, 3).to(q.dtype)) * torch.finfo(q.dtype).min
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def hidden_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax((q @ k.mT * 0.5).masked_fill(kept(q, 3) == 0, float("-inf")), -1) @ v


def kept_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of a mask without samples, by heads."""
    seen = ~(torch.arange(10).view(2, 1, 5) % 4 == 3)
    return torch.softmax((q @ k.mT / 2).masked_fill(~seen, float("-inf")), -1) @ v


def triangle_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(torch.full((5, 5), float("-inf"), dtype=q.dtype).triu(1) + q @ k.mT, -1) @ v


def subsequent(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def added_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(slopes(q) + q @ k.mT, -1) @ v


def lowest_by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Of one sample all is lowest: its weights are equal, which those of the kernel are not on the way back."""
    seen = kept(q, 3) & (q.detach().sum((1, 2, 3)) > 0).view(-1, 1, 1, 1)
    return torch.softmax(q @ k.mT * 0.5 + (1 - seen.to(q.dtype)) * torch.finfo(q.dtype).min, -1) @ v


def by_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three axes, which PyTorch does without its kernel."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=slopes(q)[0])


def grouped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Keys and values of one head for both."""
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], is_causal=True, enable_gqa=True)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :1].unsqueeze(2).expand(-1, -1, 2, -1, -1).flatten(1, 2) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=kept(q, 3))


def finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A number that takes the place of the score, which is seen where nothing else is."""
    return torch.softmax((q @ k.mT).masked_fill(~kept(q, 3), -2.0), -1) @ v


def larger(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A mask that has keys which the scores have not."""
    return torch.softmax(q @ k[:, :, :1].mT + torch.arange(5, dtype=q.dtype), -1) @ v


def watched(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The weights are read, too."""
    weights = torch.softmax(q @ k.mT, -1)
    return weights @ v + weights.square().sum(-1, keepdim=True)


def over_queries(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT, -2) @ v


MASKED = (
    padding, band, by_sample, by_key, by_all, added, lowest, hidden_by_hand, kept_by_hand, triangle_by_hand, subsequent,
    repeated,
)  # fmt: skip
NOTHING = (by_query, nothing_added)
WHOLE = (F.scaled_dot_product_attention, causal, by_hand, masked_by_hand, last_axis_apart, no_scale, grouped, *MASKED)
PARTS = (to_itself, watched, over_queries, finite, larger, added_by_hand, lowest_by_hand, by_heads)


def problem_of(mix: Mix, queries: int | None = None) -> Problem:
    return Case(mix.__name__, lambda: Heads(mix, queries), (5, 4)).build()


def compared(problem: Problem) -> str:
    arguments = problem.model, problem.loss, problem.x, problem.y
    program = tn.compile(*arguments[:2], arguments[2:], [tn.BatchGrad(), tn.Variance()])
    result = program(problem.x, problem.y)
    assert_equal(result["batch_grad"], oracle.batch_grad(*arguments), "batch_grad")
    assert_equal(result["variance"], oracle.variance(*arguments), "variance")
    return program.source


@pytest.mark.thinned(5)
@pytest.mark.parametrize("mix", (*WHOLE, *NOTHING), ids=lambda mix: mix.__name__)
def test_one_kernel(mix: Mix) -> None:
    source = compared(problem_of(mix))
    assert source.count("flash_attention_for_cpu(") == source.count("flash_attention_for_cpu_backward(") == 1
    assert "softmax" not in source


@pytest.mark.thinned(4)
@pytest.mark.parametrize("mix", PARTS, ids=lambda mix: mix.__name__)
def test_in_its_parts(mix: Mix) -> None:
    source = compared(problem_of(mix))
    assert "flash" not in source and "softmax" in source


def test_fewer_queries() -> None:
    assert "flash" in compared(problem_of(by_hand, queries=3))


@pytest.mark.thinned(3)
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


def test_a_mask_that_is_learned_has_its_gradient() -> None:
    """The kernel gives none."""

    class Relative(Heads):
        def __init__(self) -> None:
            super().__init__(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=self.near[:, self.far]))
            self.near = nn.Parameter(torch.randn(2, 9))
            self.far = torch.arange(5) - torch.arange(5)[:, None] + 4

    assert "flash" not in compared(Case("relative", Relative, (5, 4)).build())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_blocks_of_the_kernel(dtype: torch.dtype) -> None:
    """More positions than the kernel takes at once, of which some see nothing, against autograd."""

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        near = (torch.arange(700) - torch.arange(700)[:, None]).abs() < 40
        lost = torch.arange(700).view(-1, 1) % 5 == 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=near & ~lost & (q.detach().sum(-1) > -3).unsqueeze(2))

    torch.manual_seed(0)
    model, x, y = Heads(mix).to(dtype), torch.randn(3, 700, 4, dtype=dtype), torch.randn(3, 700, 2, dtype=dtype)
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.Grad()], check=False)
    assert "flash" in program.source
    expected = torch.autograd.grad(nn.MSELoss()(model(x), y), list(model.parameters()))
    for value, own in zip(program(x, y)["grad"].values(), expected, strict=True):
        torch.testing.assert_close(value, own, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-7)


def test_rows_of_which_nothing_is_left() -> None:
    """Zeros of the operator, also where columns look inside; nan of what is written by hand, as autograd has it."""
    problem = problem_of(nothing_added)
    arguments = problem.model, problem.loss, problem.x, problem.y
    program = tn.compile(*arguments[:2], arguments[2:], [tn.DiagGGN(), tn.BatchGrad()])
    assert "flash" not in program.source
    result = program(problem.x, problem.y)
    assert_equal(result["diag_ggn"], oracle_second.diag_ggn(*arguments), "diag_ggn")
    assert_equal(result["batch_grad"], oracle.batch_grad(*arguments), "batch_grad")

    def mix(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = ~kept(q, 3) | (q.detach()[:, :1, :, :1] > 0)
        return torch.softmax((q @ k.mT).masked_fill(hidden, float("-inf")), -1) @ v

    problem = problem_of(mix)
    program = tn.compile(problem.model, problem.loss, (problem.x, problem.y), [tn.Grad()], check=False)
    assert "flash" in program.source
    result, loss = program(problem.x, problem.y), problem.loss(problem.model(problem.x), problem.y)
    assert loss.isnan() and result.loss.isnan()
    gradient = torch.autograd.grad(loss, problem.model.out.weight)[0]
    assert gradient.isnan().all() and result["grad"]["out.weight"].isnan().all()


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_encoders_under_a_mask(causal: bool) -> None:
    """Of padding, as `nn.TransformerEncoder` adds it up with a causal one."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
            self.layers, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            pad = x.detach()[..., 0].cummax(1)[0] > 1
            pad = torch.where(pad & (torch.arange(5) > 0), float("-inf"), torch.zeros((), dtype=x.dtype))
            mask = nn.Transformer.generate_square_subsequent_mask(5, dtype=x.dtype) if causal else None
            return self.out(self.layers(x, mask=mask, src_key_padding_mask=pad, is_causal=causal))

    source = compared(Case("encoder", Encoder, (5, 4)).build())
    assert "attention_for_cpu(" in source and "attention_for_cpu_backward(" in source and "softmax" not in source


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
