"""A branch on the batch size: the program is for the sizes that take the example's, and says so. Oracle: autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.errors import InputError, UnsupportedError

from ...capturing import Function
from ...oracle_second import diag_ggn
from ...rehearsing import LOSS, batch, compiled, layers, refused


def branch(condition: Callable[[int], bool]) -> Function:
    """Another scale and another activation where the condition holds."""
    return Function(lambda m, x: 3 * m.b(m.a(x)) if condition(x.shape[0]) else m.b(m.a(x).tanh()), **layers())


# the condition, the example's size, what is said of it, sizes that do the same, sizes that do not
BRANCHES: list[tuple[Callable[[int], bool], int, str, tuple[int, ...], tuple[int, ...]]] = [
    (lambda n: n < 6, 4, "N < 6", (1, 5), (6, 40)),
    (lambda n: n >= 6, 4, "N < 6", (1, 5), (6, 40)),
    (lambda n: n >= 6, 8, "N >= 6", (6, 40), (1, 2, 5)),
    (lambda n: n == 7, 4, "N != 7", (1, 6, 8), (7,)),
    (lambda n: n in (7, 9), 4, "N != [79]", (1, 6, 8), (7, 9)),
    (lambda n: n % 2 == 0, 4, "N % 2 == 0", (2, 6), (1, 3)),
    (lambda n: n % 2 == 0, 5, "N % 2", (1, 3), (2, 6)),
    (lambda n: 2 < n < 6, 4, "N (> 2|< 6)", (3, 5), (1, 2, 6)),
    (lambda n: 2 * n > 9, 5, "2 *[*] *N > 9", (5, 6), (1, 4)),
    (lambda n: n == 2, 1, "N != 2", (1, 3), (2,)),
]


@pytest.mark.thinned(4)
@pytest.mark.parametrize("condition,size,said,same,others", BRANCHES)
def test_branches(
    condition: Callable[[int], bool], size: int, said: str, same: tuple[int, ...], others: tuple[int, ...]
) -> None:
    model = branch(condition)
    program = compiled(model, size)
    for n in (size, *same):
        x, y = batch(n)
        want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
        for value, expected in zip(program(x, y)["grad"].values(), want, strict=True):
            torch.testing.assert_close(value, expected)
    for n in others:
        with pytest.raises(InputError, match=f"(?s)branches on the batch size.*{said if n > 1 else ''}.*do not branch"):
            program(*batch(n))


def test_what_is_said_of_a_branch() -> None:
    program = compiled(branch(lambda n: n < 6), 4)
    assert "for N < 6" in program.explain("capture")
    with pytest.raises(
        InputError, match=r"has 7 samples.*is for N < 6\.\n  .*test_batch_sizes\.py, line \d+.*\n  Compile"
    ):
        program(*batch(7))
    with pytest.raises(UnsupportedError, match="where not N < 6"):
        tn.generate(branch(lambda n: n < 6).double(), [tn.BatchGrad()], loss=LOSS, example=batch(4))


def test_a_branch_on_bits_of_the_size() -> None:
    with pytest.raises(InputError, match=r"has 3 samples.*is for Eq\(and\(N, N - 1\), 0\)\.\n"):
        compiled(branch(lambda n: n & (n - 1) == 0), 4)(*batch(3))


def test_a_branch_in_the_loss_and_curvature() -> None:
    def loss(output: Tensor, y: Tensor) -> Tensor:
        return (output - y).square().mean() if output.shape[0] < 100 else output.sum()

    model, (x, y) = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double(), batch(5)
    result = tn.compile(model, loss, batch(4), [tn.DiagGGN()])(x, y)["diag_ggn"]
    for name, value in diag_ggn(model, nn.MSELoss(), x, y).items():
        torch.testing.assert_close(result[name], value)


def test_compute_for_each_branch() -> None:
    """A program for other sizes is no match, whatever was compiled before."""
    model = branch(lambda n: n < 6).double()
    for n in (4, 7, 5, 1, 8):
        x, y = batch(n)
        want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
        torch.testing.assert_close(tuple(tn.compute(model, LOSS, (x, y), [tn.Grad()])["grad"].values()), want)


PARTS: list[Callable[..., Any]] = [
    lambda m, x: torch.cat([m.a(part) for part in x.split(2)]),
    lambda m, x: torch.cat([m.a(part) for part in x.chunk(2)]),
    lambda m, x: torch.cat([m.a(x[:2]), m.b(x[2:])]),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("forward", PARTS)
def test_parts_of_the_batch(forward: Callable[..., Any]) -> None:
    """How many there are depends on the batch size: one sentence says so, and what to do."""
    said = r"cuts the batch: a part of it has .*N.* of the N samples.*whole batch.*memory_limit"
    with pytest.raises(UnsupportedError, match=f"(?s){said}"):
        compiled(Function(forward, **layers()), 6)


def test_one_part_is_the_batch() -> None:
    model = Function(lambda m, x: torch.cat([m.a(part) for part in x.split(64)]), **layers())
    program, (x, y) = compiled(model), batch(7)
    want = torch.autograd.grad(LOSS(model(x), y), [*model.a.parameters()])
    torch.testing.assert_close([*program(x, y)["grad"].values()][:2], [*want])
    with pytest.raises(InputError, match="the program is for"):
        compiled(model)(*batch(65))


@pytest.mark.parametrize("size", [1, 2, 9])
def test_len(size: int) -> None:
    """Of a tensor it is a size, of what it is wherever it is called."""
    model = Function(lambda m, x: m.a(x).reshape(len(x), 3) / len(x) * len([x, x]), a=nn.Linear(3, 3))
    program, (x, y) = compiled(model, 6, loss=lambda f, y: (f - y).square().sum() / len(f)), batch(size)
    want = torch.autograd.grad((model(x) - y).square().sum() / size, list(model.parameters()))
    torch.testing.assert_close(tuple(program(x, y)["grad"].values()), want)


SPECIAL: list[tuple[Callable[..., Any], str]] = [
    (lambda m, x: sum(m.a(x[n]) for n in range(len(x))), "line .* range"),
    (lambda m, x: m.a(x) if x.shape[0] == 5 else x, r"line .* x\.shape"),
    (lambda m, x: sum(m.a(row) for row in x), "line .* sum"),
    (lambda m, x: m.a(x).view(5, -1), "one batch size"),
]


@pytest.mark.thinned(3)
@pytest.mark.parametrize("forward,said", SPECIAL)
def test_one_size(forward: Callable[..., Any], said: str) -> None:
    """The line is the user's own, and nothing of torch's is told."""
    refused(Function(forward, **layers()), said)
    with pytest.raises(UnsupportedError) as caught:
        compiled(Function(forward, **layers()))
    assert "torch" not in str(caught.value).replace(__file__, "") and "TORCH" not in str(caught.value)


def test_another_function_in_another_branch() -> None:
    """What is rehearsed is the branch that the program is of."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g / 2

    model = Function(lambda m, x: Half.apply(m.a(x)) if x.shape[0] > 2 else m.a(x), a=nn.Linear(3, 3))
    refused(model, "Function 'Half'")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "scale", [lambda n: min(n, 4), lambda n: max(n, 4), lambda n: n % 3, lambda n: n // 3 + 1, lambda n: -(-n // 4)]
)
@pytest.mark.parametrize("size", [1, 3, 4, 9])
def test_numbers_of_the_batch_size(scale: Callable[[int], int], size: int) -> None:
    model = Function(lambda m, x: m.a(x) * scale(x.shape[0]), a=nn.Linear(3, 3))
    program, (x, y) = compiled(model, 6), batch(size)
    want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    torch.testing.assert_close(tuple(program(x, y)["grad"].values()), want)


def windows(m: Any, x: Tensor) -> Tensor:
    """Cut into windows and put together again, as hierarchical vision transformers are published."""
    cut = m.a(x[:, None, None].expand(-1, 4, 4, -1)).view(-1, 2, 2, 2, 2, 3).transpose(2, 3).reshape(-1, 2, 2, 3)
    size = int(cut.shape[0] / (4 * 4 / 2 / 2))
    return m.b(cut.view(size, 2, 2, 2, 2, -1).transpose(2, 3).reshape(size, 16, -1)).sum(1)


def twins(m: Any, x: Tensor, y: Tensor) -> Tensor:
    """Two batches through one net, one after the other: how torch cuts them asks whether a half has one sample."""
    first, second = m.a(torch.cat([x, y])).sigmoid().chunk(2)
    return m.b(first * second)


@pytest.mark.parametrize("size", [1, 3])
def test_twins(size: int) -> None:
    """Sizes of several inputs are one size, and one sample is as good as many."""
    model, (x, y) = Function(twins, **layers()).double(), batch(4)
    program = tn.compile(model, LOSS, ((x[:size], y[:size]), y[:size]), [tn.Grad()])
    for number in (1, 2, 4):
        part = x[:number], y[:number]
        want = torch.autograd.grad(LOSS(model(*part), y[:number]), list(model.parameters()))
        torch.testing.assert_close(tuple(program(part, y[:number])["grad"].values()), want)


NUMBERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "int": lambda m, x: m.b(m.a(x).reshape(int(x.shape[0]), -1)),
    "int of a quotient": windows,
    "int of a product": lambda m, x: m.b(m.a(x).view(int(x.size(0) * 2 * 0.5), 3)),
    "float": lambda m, x: m.b(m.a(x)) / float(x.shape[0]),
    "as ever": lambda m, x: m.b(m.a(x).view(int(x.shape[0]), int("3"))) * float("0.5") * isinstance(int(3.5), int),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("function", NUMBERS.values(), ids=NUMBERS)
def test_numbers_made_of_sizes(function: Callable[[Any, Tensor], Tensor]) -> None:
    """`int` and `float` of a batch size are sizes while a model is exported, and Python's own again afterwards."""
    model = Function(function, **layers())
    program = compiled(model, 5)
    assert "int" not in globals() and "float" not in globals()
    for size in (5, 3, 1):
        x, y = batch(size)
        want = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
        for value, expected in zip(program(x, y)["grad"].values(), want, strict=True):
            torch.testing.assert_close(value, expected)
