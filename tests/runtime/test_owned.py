"""Results own their memory: writing into one changes no other, no parameter, no input and no later call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.runtime.memory.owned import Owner

from ..models import Apply

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(4, 3, generator=GENERATOR, dtype=torch.float64)
Y = torch.tensor([0, 1, 1, 0])
CE = nn.CrossEntropyLoss()


class Shared(nn.Module):
    """Three layers that read one value, as the projections of attention do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x) + self.c(x)


class Aliases(nn.Module):
    """Returns its input, a view of it, a parameter, a buffer, a constant and one value twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("table", torch.ones(2))
        self.constant = torch.ones(2, dtype=torch.float64)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        h, n = self.layer(x), x.shape[0]
        return h, x, x[:, :2], self.table.expand(n, 2), self.constant.expand(n, 2), h, h.mT.mT, h * 1


class Added(nn.Module):
    """Parameters that are only added: their derivatives are constants, or the cotangent itself."""

    def __init__(self) -> None:
        super().__init__()
        self.p, self.q, self.r = (nn.Parameter(torch.zeros(shape)) for shape in ((2,), (1, 2), (2,)))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :2] + self.p + self.q - self.r


def first(output: Any, y: Tensor) -> Tensor:
    return CE(output[0] if isinstance(output, tuple) else output, y)


FIRST = [tn.Grad(), tn.BatchGrad(), tn.BatchGrad("again", scale=tn.Scale.BACKPACK), tn.BatchL2(), tn.SecondMoment()]
KRONECKER = [tn.KFLR(), tn.KFAC(), tn.KFLR("reduce", sharing=tn.Sharing.REDUCE), tn.KFLR("joined", bias=tn.Bias.JOINED)]
GGN = [tn.DiagGGN(), tn.DiagGGN("other"), tn.SqrtGGN(), tn.GGNTrace()]
LINEAR = [tn.Jacobians(), tn.Jacobians("more"), tn.NTK()]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Linear(3, 2),
    "mlp": lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
    "shared": Shared,
    "added": Added,
    "scale": lambda: nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 2)),
}


def tensors(tree: object) -> list[Tensor]:
    """Every tensor of a result."""
    if isinstance(tree, tn.Result):
        values = [leaf for by in tree.values() for leaf in by.values()]
        return [t for value in (tree.loss, *pytree.tree_leaves(tree.output), *values) for t in tensors(value)]
    if isinstance(tree, tn.KroneckerFactors):
        return list(tree.factors)
    return [tree] if isinstance(tree, Tensor) else []


def assert_owned(model: nn.Module, loss: Any, quantities: Any, y: Any = Y) -> None:
    """Each tensor written over in turn; all others, and a second call, stay as they were."""
    model, x = model.double(), X.clone()
    program = tn.compile(model, loss, (x, y), quantities)
    other = [x, *model.parameters(), *model.buffers(), *(v for v in vars(model).values() if isinstance(v, Tensor))]
    before = [t.detach().clone() for t in other]
    want = [t.clone() for t in tensors(program(x, y, seed=0))]
    found = tensors(program(x, y, seed=0))
    for k, value in enumerate(found):
        value.copy_(torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape) + k)
    for k, value in enumerate(found):
        assert torch.equal(value, torch.arange(value.numel(), dtype=value.dtype).reshape(value.shape) + k), k
    for now, then in zip(other, before, strict=True):
        assert torch.equal(now, then)
    for now, then in zip(tensors(program(x, y, seed=0)), want, strict=True):
        assert torch.equal(now, then)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("quantities", [FIRST, GGN, LINEAR], ids=["first", "ggn", "linear"])
def test_written_over(name: str, quantities: Any) -> None:
    linear = quantities is LINEAR
    assert_owned(MODELS[name](), None if linear else CE, quantities, None if linear else Y)


@pytest.mark.parametrize("name", ["layer", "mlp", "shared", "scale"])
def test_factors_written_over(name: str) -> None:
    assert_owned(MODELS[name](), CE, KRONECKER)


def test_outputs_written_over() -> None:
    assert_owned(Aliases(), first, [tn.Grad(), tn.BatchGrad()])
    assert_owned(nn.Sequential(nn.Identity(), nn.Linear(3, 2)), CE, [tn.Grad()])
    whole = Apply(lambda x: x)
    whole.unused = nn.Parameter(torch.zeros(2))
    assert_owned(whole, lambda output, y: output.square().mean(), [tn.Grad()])


def test_what_does_not_overlap_stays_where_it_is() -> None:
    """Columns of one matrix that do not meet are not copied; those that do are, and so is what was expanded or read."""
    matrix = torch.arange(24.0).reshape(4, 6)
    owner = Owner([])
    left, right, across = matrix[:, :4], matrix[:, 4:], matrix[:, 3:5]
    assert owner.own(left) is left and owner.own(right) is right
    assert owner.own(across) is not across and torch.equal(owner.own(across), across)
    row, column = matrix[1], matrix.mT[5]
    assert owner.own(row) is not row and owner.own(column) is not column
    wide = torch.zeros(()).expand(3)
    assert owner.own(wide).is_contiguous()
    assert Owner([matrix]).own(right) is not right
    empty = matrix[:, :0]
    assert owner.own(empty) is empty


def slices() -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of views of one memory, drawn."""
    generator = torch.Generator().manual_seed(1)
    draw = lambda high: int(torch.randint(high, (), generator=generator))  # noqa: E731
    memory = torch.arange(40)
    for _ in range(300):
        views = []
        for _ in range(2):
            shape = tuple(1 + draw(3) for _ in range(1 + draw(3)))
            stride = tuple(draw(7) for _ in shape)
            views.append(memory.as_strided(shape, stride, draw(12)))
        yield views[0], views[1]


def test_views_that_meet() -> None:
    """Against the elements themselves: what stays shares none; hardly anything is copied that need not be."""
    stayed = copied = needless = 0
    for one, other in slices():
        one_has, other_has = one.flatten().tolist(), other.flatten().tolist()
        owner = Owner([])
        if owner.own(one) is not one:
            continue
        assert len({*one_has}) == len(one_has)
        free = len({*other_has}) == len(other_has) and not {*one_has} & {*other_has}
        same = owner.own(other) is other
        assert free or not same, (one.shape, one.stride(), other.shape, other.stride())
        stayed, copied, needless = stayed + same, copied + (not same), needless + (free and not same)
    assert stayed > 20 and copied > 20 and needless < 10
