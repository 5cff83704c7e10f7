"""Kronecker factors of whole models with default options: every parameter has some, none is larger than stated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import tnbackprop as tn
from tnbackprop.linalg import Kind, KroneckerFactors

from ..second_order import TOLERANCE, error

D, T, VOCABULARY = 8, 6, 11


class Block(nn.Module):
    """A transformer's layer, norms first; `causal` attention or not."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.wide, self.narrow, self.causal = nn.Linear(D, 2 * D), nn.Linear(2 * D, D), causal

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4).unbind(0)
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(heads.transpose(1, 2).reshape(n, t, d))
        return x + self.narrow(F.gelu(self.wide(self.norm2(x))))


class GPT2(nn.Module):
    """Embedding and head are one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, D), nn.Embedding(T, D)
        self.block, self.norm = Block(causal=True), nn.LayerNorm(D)
        self.head = nn.Linear(D, VOCABULARY, bias=False)
        self.head.weight = self.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe(torch.arange(tokens.shape[1]))
        return self.head(self.norm(self.block(x))).transpose(1, 2)


class ViT(nn.Module):
    """A class token and a position table [1, T, D] that are added as they are."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch, tokens = nn.Conv2d(2, D, 2, stride=2), 4 * width + 1
        self.cls, self.pos = nn.Parameter(torch.randn(1, 1, D)), nn.Parameter(torch.randn(1, tokens, D))
        self.block, self.norm, self.head = Block(causal=False), nn.LayerNorm(D), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(x.shape[0], -1, -1), patches], 1) + self.pos
        return self.head(self.norm(self.block(x))[:, 0])


class BERT(nn.Module):
    """Three embeddings that are added, a norm, a pooler; the encoder's layer is torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places, self.kinds = nn.Embedding(VOCABULARY, D), nn.Embedding(T, D), nn.Embedding(2, D)
        self.norm = nn.LayerNorm(D)
        self.layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True)
        self.pooler, self.head = nn.Linear(D, D), nn.Linear(D, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        kinds = self.kinds(torch.zeros_like(tokens))
        x = self.norm(self.words(tokens) + self.places(torch.arange(tokens.shape[1])) + kinds)
        return self.head(torch.tanh(self.pooler(self.layer(x)[:, 0])))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.head = nn.Embedding(VOCABULARY, 4), nn.LSTM(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(tokens))[0][:, -1])


class UNet(nn.Module):
    """Down, up, and over the bridge; a class for every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 8, 3, padding=1, stride=2)
        self.norm, self.up = nn.GroupNorm(2, 8), nn.ConvTranspose2d(8, 4, 2, stride=2)
        self.merge, self.last = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        low = F.relu(self.norm(self.down(x)))
        return self.last(F.relu(self.merge(torch.cat([x, self.up(low)], 1))))


class Normalized(nn.Module):
    """A weight behind its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


@dataclass(frozen=True)
class Whole:
    """A model, its batch, the parameters that have no factors, and some of the shapes of the factors."""

    name: str
    model: Callable[[], nn.Module]
    x: tuple[int, ...]  # of integers where it is [N, T]
    y: tuple[int, ...]
    alone: tuple[str, ...]
    shapes: dict[str, list[tuple[int, ...]]]

    def __str__(self) -> str:
        return self.name

    def build(self) -> tuple[nn.Module, Tensor, Tensor]:
        torch.manual_seed(0)
        x = torch.randint(VOCABULARY, self.x) if self.x[1:] == (T,) else torch.randn(self.x, dtype=torch.float64)
        return self.model().double(), x, torch.randint(3, self.y)


SCALES = [(D, 1, 1), (D, 1, 1)]  # a norm's: one number for each element of it
WHOLE = (
    Whole("gpt2", GPT2, (3, T), (3, T), ("wte.weight",), {
        "wte.weight": [(VOCABULARY * D,)], "wpe.weight": [(T,), (D, D)], "block.qkv.weight": [(24, 24), (D, D)],
        "norm.weight": SCALES, "norm.bias": [(D, D)],
    }),
    Whole("vit", ViT, (2, 2, 4, 64), (2,), (), {
        "pos": [(65, 65), (D, D)], "cls": [(D, D)], "patch.weight": [(D, D), (8, 8)], "block.norm1.weight": SCALES,
    }),
    Whole("bert", BERT, (3, T), (3,), (), {
        "words.weight": [(VOCABULARY,), (D, D)], "places.weight": [(T,), (D, D)], "norm.weight": SCALES,
        "layer.self_attn.in_proj_weight": [(24, 24), (D, D)], "pooler.weight": [(D, D), (D, D)],
    }),
    Whole("lstm", Recurrent, (3, T), (3,), (), {
        "words.weight": [(VOCABULARY,), (4, 4)], "lstm.weight_hh_l0": [(12, 12), (3, 3)], "lstm.bias_hh_l0": [(12, 12)],
    }),
    Whole("unet", UNet, (2, 2, 4, 4), (2, 4, 4), (), {
        "down.weight": [(8, 8), (36, 36)], "up.weight": [(8, 8), (16, 16)], "norm.weight": SCALES,
    }),
    Whole("weight_norm", Normalized, (3, 4), (3,), ("first.parametrizations.weight.original1",), {
        "first.parametrizations.weight.original1": [(20,)], "last.weight": [(3, 3), (5, 5)],
    }),
)  # fmt: skip


TWINS = ("vit", "bert")
"""Layers that `gpt2` has, too."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "whole", [w if str(w) not in TWINS else pytest.param(w, marks=pytest.mark.slow) for w in WHOLE], ids=str
)
def test_every_parameter_has_its_factors(whole: Whole) -> None:
    """KFLR and KFAC; what has no factors has the diagonal of the GGN of the same columns, and `explain` says why."""
    model, x, y = whole.build()
    quantities = [tn.KFLR(), tn.DiagGGN(), tn.KFAC(), tn.DiagGGNMC()]
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), quantities)
    result = program(x, y, seed=0)
    text = program.explain("derive")
    for factors, diagonal in (("kflr", "diag_ggn"), ("kfac", "diag_ggn_mc")):
        found = result[factors]
        assert list(found) == [name for name, _ in model.named_parameters()]
        for name, K in found.items():
            assert isinstance(K, KroneckerFactors) and K.shape == dict(model.named_parameters())[name].shape
            assert all(f.isfinite().all() and f.shape[-1] <= tn.KFAC().largest for f in K.factors)
            assert (K.inverse(1e-2) @ torch.ones_like(result[diagonal][name])).isfinite().all()
            alone = name in whole.alone
            assert ("no Kronecker factors" in K.assumption) == alone
            if alone:
                assert K.kinds == (Kind.DIAGONAL,)
                assert error(K.factors[0], result[diagonal][name].flatten()) <= TOLERANCE
        for name, shapes in whole.shapes.items():
            assert [tuple(f.shape) for f in found[name].factors] == shapes, name
    _, table = text.split("Kronecker factors\n===")
    for name, K in result["kflr"].items():
        (row, _) = (line for line in table.splitlines() if line.split()[:1] == [name])
        assert ("no Kronecker factors: the uses" in row) == (name in whole.alone)
        assert all(f"{kind.value} [" in row for kind in K.kinds)


@pytest.mark.parametrize("whole", [whole for whole in WHOLE if whole.alone], ids=str)
def test_strict_refuses_a_whole_model(whole: Whole) -> None:
    model, x, y = whole.build()
    with pytest.raises(tn.UnsupportedError, match=rf"'{whole.alone[0]}'.*different Kronecker structure"):
        tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.KFAC(strict=True)])


@pytest.mark.slow
def test_the_table_names_every_reason() -> None:
    """An axis that is too large, a one-hot input, a parameter without factors; positions that are summed."""
    model, x, y = WHOLE[0].build()
    model.head.weight = nn.Parameter(torch.randn(VOCABULARY, D, dtype=torch.float64))
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.KFLR(largest=10, sharing=tn.Sharing.REDUCE)])
    lines = program.explain("derive").split("Kronecker factors\n===")[1].splitlines()
    (head,) = (line for line in lines if line.split()[:1] == ["head.weight"])
    assert "diagonal [o] 11×11 ⊗ full [i] 8×8" in head and "reduce" in head
    assert "11 rows are more than largest=10" in head
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.KFLR(largest=10)])
    lines = program.explain().split("Kronecker factors\n===")[1].split("Choices\n===")[0].splitlines()
    (wte,) = (line for line in lines if line.split()[:1] == ["wte.weight"])
    assert "one-hot input" in wte and "diagonal [v] 11×11" in wte
    assert "Kronecker factors\n=" not in tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.Grad()]).explain()
