"""Equal layers in a row are written as a function: the same lines, the same numbers, the same memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.emit import shared as shared_module
from tnbackprop.compiler.emit.naming import common
from tnbackprop.compiler.emit.printer import Printer
from tnbackprop.compiler.emit.shared import Use, shared
from tnbackprop.compiler.program.expr import Value, replaced
from tnbackprop.compiler.program.lines import Line

from ..plan.test_memory import CLOSE, Held
from ..plan.test_repeat import Residual, mlp, normed, residual, tied

QUANTITIES = (tn.Grad(), tn.BatchL2(), tn.Variance(), tn.DiagGGNMC(), tn.KFAC())
NETS = [mlp, tied, residual, normed]


def compiled(model: nn.Module) -> tn.Program:
    x, y = torch.randn(5, 8), torch.randint(3, (5,))
    return tn.compile(model, nn.CrossEntropyLoss(), (x, y), QUANTITIES)


def line_of(line: Line, to: dict[Value, Value]) -> tuple[str, tuple[Value, ...]]:
    """What is computed, and what is let go of, with other values."""
    text = Printer(lambda value: value.key, {}).text(replaced(line.expr, lambda value: to.get(value, value)))
    return text, tuple(to.get(value, value) for value in line.frees)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_the_same_lines(net: Callable[[int], nn.Module]) -> None:
    """Calls, with their lines put back, are the lines of the program, in order."""
    writer = compiled(net(6)).compiled.writer
    lines = writer.program.lines
    rows = shared(lines, writer.program.kept, writer.functions)
    uses = [row for row in rows if isinstance(row, Use)]
    assert len(uses) >= 4
    at = 0
    for row in rows:
        if not isinstance(row, Use):
            assert row is lines[at]
            at += 1
            continue
        own = lines[at : at + len(row.shared.lines)]
        local = {t.value: line.value for t, line in zip(row.shared.lines, own, strict=True)}
        outside = dict(zip(row.shared.handed, row.handed, strict=True))
        outside |= dict(zip(row.shared.params, row.params, strict=True))
        for template, line in zip(row.shared.lines, own, strict=True):
            assert line_of(template, outside | local) == line_of(line, {})
        assert [local[value] for value in row.shared.results] == list(row.results)
        assert set(row.unread) <= set(row.results)
        at += len(own)
    assert at == len(lines)


@pytest.mark.slow
@pytest.mark.parametrize("net", NETS, ids=lambda net: net.__name__)
def test_the_same_numbers(net: Callable[[int], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = net(6)
    x, y = torch.randn(7, 8), torch.randint(3, (7,))
    short = compiled(model)
    monkeypatch.setattr(shared_module, "LEAST", 10**6)
    long = compiled(model)
    assert "def block(" in short.source
    assert "def block" not in long.source
    assert short.source.count("\n") < long.source.count("\n")
    one, other = (program(x, y, generator=torch.Generator().manual_seed(1)) for program in (short, long))
    assert torch.equal(one.loss, other.loss)
    for quantity in ("grad", "batch_l2", "variance", "diag_ggn_mc"):
        for name, value in other[quantity].items():
            assert torch.equal(one[quantity][name], value), (quantity, name)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("net", [residual, normed], ids=lambda net: net.__name__)
def test_the_source_grows_with_the_layers_that_differ(net: Callable[[int], nn.Module]) -> None:
    """For each layer more there are its parameters, its results, and calls."""
    lengths = [compiled(net(count)).source.count("\n") for count in (8, 12)]
    parameters = len(list(net(12).parameters())) - len(list(net(8).parameters()))
    calls = 2 * 4 * (shared_module.CALL + 1)
    assert lengths[1] - lengths[0] <= (1 + len(QUANTITIES)) * parameters + calls


def test_the_same_memory() -> None:
    """What a function lets go of is gone while it runs: nobody else holds it."""
    torch.manual_seed(0)
    layers = [layer for _ in range(8) for layer in (nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())]
    model, x, y = nn.Sequential(*layers), torch.randn(256, 64), torch.randn(256, 64)
    program = tn.compile(model, nn.MSELoss(), (x, y), [tn.Grad(), tn.BatchL2()])
    assert "handed.clear()" in program.source
    program(x, y)
    with Held(x, y, *model.parameters()) as held:
        result = program(x, y)
    assert result.loss is not None
    assert abs(program.peak_bytes / held.peak - 1) < CLOSE, (program.peak_bytes, held.peak)


@pytest.mark.slow
def test_large_values_and_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function is given what its lines read that is no value: where large values go, and what follows a loop."""
    torch.manual_seed(0)
    model, x, y = residual(6), torch.randn(16, 8), torch.randint(3, (16,))
    loss, quantities = nn.CrossEntropyLoss(), [tn.Grad(), tn.BatchL2(), tn.Variance(centred=True)]
    plain = tn.compile(model, loss, (x, y), quantities)
    monkeypatch.setattr("tnbackprop.compiler.plan.plan.Plan.is_large", lambda self, value: True)
    for limit in (None, int(0.8 * plain.peak_bytes)):
        program = tn.compile(model, loss, (x, y), quantities, memory_limit=limit)
        for function in program.source.split("\ndef ")[1:]:
            head, _, body = function.partition("\n")
            for free in ("memory", "progress"):
                assert (free in head) == (f"{free}(" in body)
        assert "\ndef block" in program.source and "memory(" in program.source
        for name, value in plain(x, y)["variance"].items():
            torch.testing.assert_close(program(x, y, progress=limit is not None)["variance"][name], value)


class Fallback(nn.Module):
    """A layer with an operator that has no rule: its VJP is a function inside an expression."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.special.i0(self.linear(x)).sin()


def test_variables_of_functions_inside() -> None:
    """They are no values that a function of lines is given."""
    torch.manual_seed(0)
    model, loss = nn.Sequential(*(Fallback() for _ in range(6)), nn.Linear(8, 3)), nn.CrossEntropyLoss()
    x, y = torch.randn(5, 8), torch.randint(3, (5,))
    program = tn.compile(model, loss, (x, y), [tn.Grad(), tn.DiagGGN()])
    functions, _, _ = program.source.partition("def program(")
    assert "def block" in functions and "lambda" in functions
    loss(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(program(x, y)["grad"][name], parameter.grad)


class Named(nn.Module):
    """Layers that are called as functions and values of a source are."""

    names = ("block", "block_2", "handed", "u0", "t0", "N", "results", "program", "layers")

    def __init__(self) -> None:
        super().__init__()
        for name in self.names:
            setattr(self, name, Residual(nn.Linear(8, 8), nn.Linear(8, 8)))

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = getattr(self, name)(x)
        return x[:, :3]


def test_names_that_meet() -> None:
    torch.manual_seed(0)
    model, x, y = Named(), torch.randn(5, 8), torch.randint(3, (5,))
    program = tn.compile(model, nn.CrossEntropyLoss(), (x, y), [tn.Grad()])
    assert "def block(" in program.source
    result = program(x, y)
    nn.CrossEntropyLoss()(model(x), y).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(result["grad"][name], parameter.grad)


def test_an_error_in_a_function_says_what_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model = residual(6)
    program = tn.compile(model, nn.CrossEntropyLoss(), (torch.randn(4, 8), torch.randint(3, (4,))), [tn.Grad()])
    assert "def block(" in program.source

    def convolution(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(torch.ops.aten.conv2d, "default", convolution)
    with pytest.raises(tn.InputError, match=r"fails in 1\.first: conv2d.default … > \*\.first: conv2d.default: no ker"):
        program(torch.randn(4, 8), torch.randint(3, (4,)))


@pytest.mark.parametrize(
    ("texts", "other", "expected"),
    [
        (["blocks_0_norm", "blocks_11_norm"], "", "blocks_norm"),
        (["blocks.0.qkv: linear", "blocks.1.qkv: linear"], "*", "blocks.*.qkv: linear"),
        (["0: linear", "12: linear"], "*", "*: linear"),
        (["a_b", "a"], "", ""),
        (["", ""], "*", ""),
    ],
)
def test_what_names_have_in_common(texts: list[str], other: str, expected: str) -> None:
    assert common(texts, other) == expected


@pytest.mark.slow
@pytest.mark.parametrize("net", [residual, normed], ids=lambda net: net.__name__)
def test_torch_compile_takes_it_as_one_graph(net: Callable[[int], nn.Module]) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(5, 8), torch.randint(3, (5,))
    program = tn.compile(net(6), nn.CrossEntropyLoss(), (x, y), [tn.Grad(), tn.BatchL2()])
    assert "handed.clear()" in program.source
    namespace: dict[str, Callable[..., tuple[Tensor, object, dict[str, dict[str, Tensor]]]]] = {}
    exec(program.source, namespace)
    torch._dynamo.reset()
    traced = torch.compile(namespace["program"], fullgraph=True, backend="aot_eager")
    want, got = (function(program.tensors(x, y))[2] for function in (namespace["program"], traced))
    for quantity, by in want.items():
        for name, value in by.items():
            torch.testing.assert_close(got[quantity][name], value)
