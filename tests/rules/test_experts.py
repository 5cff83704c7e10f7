"""Mixtures of experts: every expert's parameters have their own derivatives of each sample, 0 where none is routed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.errors import UnsupportedError

from .. import oracle
from ..tried import GGN, Part, Tried, randn

EXPERTS, WIDTH, HIDDEN, CHOSEN = 3, 4, 5, 2
BARE: dict[str, Part] = {
    "router": lambda: nn.Linear(WIDTH, EXPERTS),
    "up": randn(EXPERTS, WIDTH, HIDDEN, seed=1),
    "down": randn(EXPERTS, HIDDEN, WIDTH, seed=2),
    "shift": randn(EXPERTS, WIDTH, seed=3),
}


def experts() -> nn.Module:
    layers = (nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, WIDTH)) for _ in range(EXPERTS))
    return nn.ModuleList(layers)


LISTED: dict[str, Part] = {"router": lambda: nn.Linear(WIDTH, EXPERTS), "experts": experts}


# routers: gates [..., E], and what the chosen are, [..., k]


def chosen(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the chosen."""
    values, index = torch.topk(m.router(x), CHOSEN, dim=-1)
    return values.softmax(-1), index


def normalised(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over all, the chosen normalised."""
    weights, index = m.router(x).softmax(-1).topk(CHOSEN, dim=-1)
    return weights / weights.sum(-1, keepdim=True), index


def scattered(m: Any, x: Tensor) -> Tensor:
    values, index = chosen(m, x)
    return torch.zeros_like(m.router(x)).scatter(-1, index, values)


def written(m: Any, x: Tensor) -> Tensor:
    values, index = normalised(m, x)
    gates = torch.zeros(*x.shape[:-1], EXPERTS, dtype=x.dtype)
    gates.scatter_(-1, index, values)
    return gates


def one_hot(m: Any, x: Tensor) -> Tensor:
    values, index = chosen(m, x)
    return (F.one_hot(index, EXPERTS).to(x.dtype) * values.unsqueeze(-1)).sum(-2)


def one_hot_einsum(m: Any, x: Tensor) -> Tensor:
    values, index = normalised(m, x)
    return torch.einsum("...k,...ke->...e", values, F.one_hot(index, EXPERTS).to(values))


def infinite(m: Any, x: Tensor) -> Tensor:
    """What is not chosen is -inf before the softmax."""
    logits = m.router(x)
    values, index = logits.topk(CHOSEN, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(-1, index, values).softmax(-1)


def threshold(m: Any, x: Tensor) -> Tensor:
    """Masked by the least of the chosen."""
    logits = m.router(x)
    least = logits.topk(CHOSEN, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < least, -torch.inf).softmax(-1)


def sigmoid(m: Any, x: Tensor) -> Tensor:
    """Scores with a bias that only chooses."""
    scores = m.router(x).sigmoid()
    index = torch.topk(scores + torch.linspace(0, 0.5, EXPERTS, dtype=x.dtype), CHOSEN, sorted=False)[1]
    weights = scores.gather(-1, index)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return torch.zeros_like(scores).scatter_add(-1, index, weights)


def one(m: Any, x: Tensor) -> Tensor:
    """A switch: the most probable takes all."""
    probabilities = m.router(x).softmax(-1)
    value, index = probabilities.max(-1)
    return F.one_hot(index, EXPERTS).to(x.dtype) * value.unsqueeze(-1)


Router = Callable[[Any, Tensor], Tensor]
GATES: list[Router] = [scattered, written, one_hot, one_hot_einsum, infinite, threshold, sigmoid, one]


# experts as one parameter


def dense(m: Any, x: Tensor, gates: Router = scattered) -> Tensor:
    h = torch.einsum("...d,edh->...eh", x, m.up).tanh()
    return torch.einsum("...e,...eh,ehd->...d", gates(m, x), h, m.down) + gates(m, x) @ m.shift


def three(m: Any, x: Tensor) -> Tensor:
    """One einsum of gates, input and experts."""
    h = torch.einsum("te,td,edh->th", scattered(m, x), x, m.up).tanh()
    return torch.einsum("te,th,ehd->td", one_hot_einsum(m, x), h, m.down)


def gathered(m: Any, x: Tensor) -> Tensor:
    """The experts' matrices of each token, [..., k, D, H]."""
    values, index = chosen(m, x)
    h = torch.einsum("...d,...kdh->...kh", x, m.up[index]).tanh()
    out = torch.einsum("...kh,...khd->...kd", h, m.down[index]) + m.shift[index]
    return (out * values.unsqueeze(-1)).sum(-2)


def gathered_matmul(m: Any, x: Tensor) -> Tensor:
    values, index = normalised(m, x)
    h = (x[..., None, None, :] @ m.up[index]).tanh()
    out = (h @ m.down[index]).squeeze(-2)
    return torch.einsum("...kd,...k->...d", out, values)


def gathered_flat(m: Any, x: Tensor) -> Tensor:
    """Tokens and choices as one axis, of `torch.bmm`."""
    values, index = chosen(m, x)
    repeated = x.repeat_interleave(CHOSEN, dim=0).unsqueeze(1)
    h = torch.bmm(repeated, m.up[index.flatten()]).tanh()
    out = torch.bmm(h, m.down[index.flatten()]).squeeze(1)
    return (out.view(x.shape[0], CHOSEN, WIDTH) * values[..., None]).sum(1)


def dispatched(m: Any, x: Tensor) -> Tensor:
    """All experts see all tokens, by `torch.bmm` over experts; the gates combine."""
    tokens = x.expand(EXPERTS, *x.shape)
    out = torch.bmm(torch.bmm(tokens, m.up).tanh(), m.down) + m.shift[:, None]
    return torch.einsum("end,ne->nd", out, scattered(m, x))


def broadcast_matmul(m: Any, x: Tensor) -> Tensor:
    out = torch.matmul(torch.matmul(x.unsqueeze(-2).unsqueeze(-2), m.up).tanh(), m.down).squeeze(-2)
    return (out * scattered(m, x).unsqueeze(-1)).sum(-2)


def gated(m: Any, x: Tensor) -> Tensor:
    """SwiGLU experts whose two halves are one parameter."""
    values, index = chosen(m, x)
    gate, up = torch.einsum("nd,nkdh->nkh", x, m.both[index]).chunk(2, dim=-1)
    return torch.einsum("nkh,nkhd,nk->nd", F.silu(gate) * up, m.down[index], values)


# experts as a list


def weighted(m: Any, x: Tensor, gates: Router = scattered) -> Tensor:
    given = gates(m, x)
    return sum(given[..., e, None] * expert(x) for e, expert in enumerate(m.experts))


def stacked(m: Any, x: Tensor) -> Tensor:
    out = torch.stack([expert(x) for expert in m.experts], dim=-2)
    return (out * scattered(m, x).unsqueeze(-1)).sum(-2)


def picked_of_stack(m: Any, x: Tensor) -> Tensor:
    values, index = chosen(m, x)
    out = torch.stack([expert(x) for expert in m.experts], dim=1)
    return (out.gather(1, index[..., None].expand(-1, -1, WIDTH)) * values[..., None]).sum(1)


def where(m: Any, x: Tensor) -> Tensor:
    values, index = normalised(m, x)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        weight = torch.where(index == e, values, 0.0).sum(-1, keepdim=True)
        out = out + expert(x) * weight
    return out


def masked(m: Any, x: Tensor) -> Tensor:
    """A switch: each expert replaces its tokens."""
    best = m.router(x).argmax(-1)
    h = x.clone()
    for e, expert in enumerate(m.experts):
        h[best == e] = expert(h[best == e])
    return h * m.router(x).softmax(-1).amax(-1, keepdim=True)


def masked_input(m: Any, x: Tensor) -> Tensor:
    probabilities, best = m.router(x).softmax(-1).max(-1)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = best == e
        out[mask] = expert(x[mask]) * probabilities[mask].unsqueeze(-1)
    return out


def masked_sum(m: Any, x: Tensor) -> Tensor:
    """Top-k with masks: `out[mask] += weight * expert(x[mask])`; torch 2.7 refuses `weight[mask, None]` by itself."""
    values, index = chosen(m, x)
    out = torch.zeros_like(x)
    for e, expert in enumerate(m.experts):
        mask = (index == e).any(-1)
        weight = (values * (index == e)).sum(-1)
        out[mask] += weight.unsqueeze(-1)[mask] * expert(x[mask])
    return out


def masked_bare(m: Any, x: Tensor) -> Tensor:
    best = m.router(x).argmax(-1)
    out = torch.zeros_like(x)
    for e in range(EXPERTS):
        mask = best == e
        out[mask] = (x[mask] @ m.up[e]).tanh() @ m.down[e] + m.shift[e]
    return out + m.router(x).softmax(-1).sum(-1, keepdim=True)


X, TOKENS = randn(6, WIDTH, seed=4), randn(4, 5, WIDTH, seed=5)
SWIGLU: dict[str, Part] = BARE | {"both": randn(EXPERTS, WIDTH, 2 * HIDDEN, seed=6)}


def tried(function: Any, parts: dict[str, Part], x: Tensor, name: str = "") -> Tried:
    return Tried(name or f"{function.__name__} {x.dim()}", function, x, parts, quantities=GGN)


def flat(function: Any) -> Any:
    """Tokens of all samples as one axis."""

    def forward(m: Any, x: Tensor) -> Tensor:
        return function(m, x.view(-1, WIDTH)).view(x.shape)

    return forward


ANY, ROWS = [dense, gathered, gathered_matmul, broadcast_matmul], [three, gathered_flat, dispatched]
ANY_LIST, ROWS_LIST = [weighted, stacked, where, masked, masked_input, masked_sum], [picked_of_stack]
CASES = [
    *(tried(lambda m, x, g=gates: dense(m, x, g), BARE, TOKENS, gates.__name__) for gates in GATES),
    *(tried(f, BARE, x) for f in ANY for x in (X, TOKENS)),
    *(tried(f, BARE, X) for f in ROWS),
    *(tried(flat(f), BARE, TOKENS, f"{f.__name__} flat") for f in [*ANY, *ROWS, masked_bare]),
    tried(masked_bare, BARE, X), tried(gated, SWIGLU, X),
    *(tried(f, LISTED, x) for f in ANY_LIST for x in (X, TOKENS)),
    *(tried(f, LISTED, X) for f in ROWS_LIST),
    *(tried(flat(f), LISTED, TOKENS, f"{f.__name__} flat") for f in [*ANY_LIST, *ROWS_LIST]),
]  # fmt: skip


@pytest.mark.thinned(24)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_experts(case: Tried) -> None:
    case.check()


MSE = nn.MSELoss()
FIRST = {
    "batch_l2": tn.BatchL2, "batch_dot": tn.BatchDot, "second_moment": tn.SecondMoment, "variance": tn.Variance,
}  # fmt: skip


@pytest.mark.thinned(6)
@pytest.mark.parametrize("x", [X, TOKENS], ids=["tokens", "sequences"])
@pytest.mark.parametrize("function,parts", [(dense, BARE), (gathered, BARE), (masked_sum, LISTED)])
def test_first_order(function: Any, parts: dict[str, Part], x: Tensor) -> None:
    model, y = tried(function, parts, x).build()
    result = tn.compile(model, MSE, (x, y), [make() for make in FIRST.values()])(x, y)
    for key in FIRST:
        for name, value in getattr(oracle, key)(model, MSE, x, y).items():
            torch.testing.assert_close(result[key][name], value)


@pytest.mark.parametrize("function", [dense, gathered, dispatched])
def test_zero_where_a_sample_is_not_routed(function: Any) -> None:
    model, y = tried(function, BARE, X).build()
    idle = torch.ones(len(X), EXPERTS, dtype=torch.bool).scatter(1, chosen(model, X)[1], False)
    result = tn.compile(model, MSE, (X, y), [tn.BatchGrad()])(X, y)["batch_grad"]
    for name in ("up", "down"):
        assert result[name][idle].count_nonzero() == 0
        assert (result[name][~idle].flatten(1) != 0).any(1).all()


def factors(function: Any, parts: dict[str, Part], x: Tensor) -> Any:
    model, y = tried(function, parts, x).build()
    return tn.compile(model, MSE, (x, y), [tn.KFLR(strict=True)])(x, y)["kflr"]


@pytest.mark.slow
@pytest.mark.parametrize("x", [X, TOKENS], ids=["tokens", "sequences"])
def test_factors_of_a_loop_with_masks(x: Tensor) -> None:
    """Those of the same experts on all tokens, weighted by the gates."""
    found, want = factors(masked_sum, LISTED, x), factors(weighted, LISTED, x)
    for name, value in want.items():
        for a, b in zip(found[name].factors, value.factors, strict=True):
            torch.testing.assert_close(a, b)


def test_factors_of_one_parameter_are_those_of_each_expert() -> None:
    """Experts are a leg: [E, D, D] and [E, H, H]."""

    def apart(m: Any, x: Tensor) -> Tensor:
        gates = scattered(m, x)
        return sum(
            gates[:, e, None] * ((x @ getattr(m, f"up{e}")).tanh() @ getattr(m, f"down{e}") + getattr(m, f"shift{e}"))
            for e in range(EXPERTS)
        )

    parts = {"router": BARE["router"]} | {
        f"{name}{e}": BARE[name][e] for name in ("up", "down", "shift") for e in range(EXPERTS)
    }
    found, want = factors(dispatched, BARE, X), factors(apart, parts, X)
    for name in ("up", "down"):
        for e in range(EXPERTS):
            for a, b in zip(found[name].factors, want[f"{name}{e}"].factors, strict=True):
                torch.testing.assert_close(a[e], b)


def test_factors_of_gathered_experts() -> None:
    """Which expert, its input and its output side: the frequencies, a mean of x xᵀ, a sum of S Sᵀ over the chosen."""
    found = factors(gathered, BARE, X)["up"]
    model, _ = tried(gathered, BARE, X).build()
    with torch.no_grad():
        weights, index = chosen(model, X)
        slope = 1 - torch.einsum("nd,nkdh->nkh", X, model.up[index]).tanh() ** 2
        S = torch.einsum("nk,nkh,nkhd->nkhd", weights, slope, model.down[index])
    frequency = torch.bincount(index.flatten(), minlength=EXPERTS).double() / index.numel()
    B = 2 / X.numel() * torch.einsum("nkhd,nkgd->hg", S, S)
    for a, b in zip(found.factors, (frequency, X.T @ X / len(X), B), strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_gathered_has_no_cotangent() -> None:
    """[N, k, D, H] is made once, of the weights: its derivatives stay factors x and g."""
    wide = BARE | {"up": randn(EXPERTS, WIDTH, 64), "down": randn(EXPERTS, 64, WIDTH)}
    model, y = tried(gathered_matmul, wide, X).build()
    program = tn.compile(model, MSE, (X, y), [tn.BatchL2()])
    assert program.peak_bytes < 2 * len(X) * CHOSEN * WIDTH * 64 * X.element_size()


def routed(code: str) -> Any:
    compiled = compile(code, __file__, "exec")

    def forward(m: Any, x: Tensor) -> Tensor:
        values, index = chosen(m, x)
        names = {"m": m, "x": x, "values": values, "index": index, "out": torch.zeros_like(x), "torch": torch, "F": F}
        exec(compiled, names)
        return names["out"]

    return forward


REFUSED: list[tuple[str, str]] = [
    (
        "for e in range(3):\n top, k = torch.where(index == e)\n"
        " out = out.index_add(0, top, m.experts[e](x[top]) * values[top, k, None])",
        r"aten\.where.*depend on the data.*w\[index\], or out\[mask\] = expert\(x\[mask\]\)",
    ),
    (
        "top = (index == 1).any(-1).nonzero().flatten(); out = out.index_add(0, top, m.experts[1](x[top]))",
        r"aten\.nonzero.*depend on the data.*out\[mask\] = expert\(x\[mask\]\)",
    ),
    ("if (index == 0).any():\n out = m.experts[0](x)", r"on the data.*test_experts\.py, line \d+.*torch\.where"),
    ("out = out + m.experts[0](x[index[:, 0] == 1]).median()", "as many entries as the boolean mask eq"),
]


@pytest.mark.parametrize("code,message", REFUSED)
def test_loops_over_what_is_routed(code: str, message: str) -> None:
    with pytest.raises(UnsupportedError, match=f"(?s){message}"):
        tried(routed(code), LISTED, X, "refused").program()


BY_ROWS: list[str] = [
    "F.layer_norm(m.experts[0](x[mask]), (4,))",
    "m.experts[0](x[mask]).softmax(-1)",
    "m.experts[0](x[mask])[..., :1] * x[mask]",
    "m.experts[0](x[mask]).sum(-1, keepdim=True) + x[mask]",
    "m.experts[0](x[mask].unsqueeze(1)).squeeze(1)",
    "(x[mask] @ m.experts[0][0].weight[0]).unsqueeze(-1) * x[mask]",
    "F.dropout(m.experts[0](x[mask]), training=False)",
    "m.experts[0](x[mask].exp().log())",
]


@pytest.mark.thinned(8)
@pytest.mark.parametrize("x", [X, TOKENS], ids=["tokens", "sequences"])
@pytest.mark.parametrize("code", BY_ROWS)
def test_functions_of_rows_that_a_mask_picks(code: str, x: Tensor) -> None:
    tried(routed(f"mask = index[..., 0] == 0; out = x + values[..., :1]; out[mask] = {code}"), LISTED, x, code).check()
