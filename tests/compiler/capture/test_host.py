"""What leaves torch in a forward, wrappers, modules that are not ready: one sentence with the place and the remedy."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn

import tnbackprop as tn

from ...capturing import Function
from ...rehearsing import LOSS, batch, check, compiled, layers

LINE = r"\n  \S*test_host\.py, line \d+: .+\n  "
NOISE = ("TORCH", "github", "draft_export", "While executing", "fake tensor", "http")


def packed(m: Any, x: Tensor) -> Any:
    return m.r(rnn.pack_padded_sequence(x[:, None], torch.ones(x.shape[0]), batch_first=True))[1][0][0]


REFUSED: dict[str, tuple[Callable[..., Any], str]] = {
    "if": (lambda m, x: m.a(x) if x.sum() > 0 else m.b(x), "depends on the data.*" + LINE + "Use torch.where"),
    "float": (lambda m, x: m.a(x) * float(x.max()), LINE),
    "int": (lambda m, x: m.a(x) * int(x.argmax()), LINE),
    "index": (lambda m, x: m.a(x) * [1, 2, 3, 4, 5] [int(x[0].argmax())], LINE),
    "item": (lambda m, x: m.a(x) * x.sum().item(), "reads a number from a tensor's values.*\n  Use torch.where"),
    "numpy": (lambda m, x: m.a(x) * x.detach().numpy().sum(), r"\.numpy\(\) in the model \(Function\)" + LINE),
    "array": (lambda m, x: m.a(x) * numpy.asarray(x.detach()).sum(), r"(numpy|\.numpy\(\)) in the model.*" + LINE),
    "text": (lambda m, x: m.a(x) * len(f"{x.mean():.2f}"), "a formatted text in the model.*" + LINE),
    "copy": (lambda m, x: m.a(x) * copy.deepcopy(x), "a deep copy in the model.*" + LINE),
    "equal": (lambda m, x: m.a(x) * (2 if torch.equal(x, x) else 1), "torch.equal in the model.*" + LINE),
    "unique": (lambda m, x: m.a(x) * len(x.unique()), "reads a number from a tensor's values.*\n  Use torch.where"),
    "rows": (lambda m, x: sum(m.a(row) for row in x), "one batch size.*" + LINE),
    "random": (lambda m, x: m.a(x) * random.random(), "random numbers that are not torch's"),
    "packed": (packed, "packed sequences in the model.*" + LINE + ".*padded tensor"),
}  # fmt: skip


@pytest.mark.thinned(4)
@pytest.mark.parametrize("forward,message", REFUSED.values(), ids=REFUSED)
def test_refused(forward: Callable[..., Any], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    model = Function(forward, **layers(r=nn.LSTM(3, 3, batch_first=True)))
    with pytest.raises(tn.UnsupportedError, match=f"(?s){message}") as caught:
        compiled(model)
    assert not any(word in str(caught.value) for word in NOISE)
    assert capfd.readouterr().err == ""


def test_in_a_module() -> None:
    class Inner(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input * float(input.detach().numpy().max())

    with pytest.raises(tn.UnsupportedError, match=r"(?s)\.numpy\(\) in module '1' \(Inner\)" + LINE):
        compiled(nn.Sequential(nn.Linear(3, 3), Inner()))


@pytest.mark.parametrize("look", [print, repr, lambda h: h.detach().mean().item(), lambda h: h.sum().item() + 1])
def test_looking_changes_nothing(look: Callable[[Tensor], Any]) -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        look(h)
        return m.b(h)

    check(Function(forward, **layers()))


NOT_READY: list[tuple[Callable[[], Any], str]] = [
    (lambda: nn.Sequential(nn.LazyLinear(3)), r"'0.weight' has no shape yet: run the model"),
    (lambda: nn.Sequential(nn.Linear(3, 3), nn.LazyBatchNorm1d(affine=False)), "'1.running_mean' has no shape yet"),
    (lambda: nn.DataParallel(nn.Linear(3, 3)), r"the model is wrapped in DataParallel.*model\.module"),
    (
        lambda: nn.Sequential(nn.DataParallel(nn.Linear(3, 3))),
        r"module '0' is wrapped in DataParallel.*model\.0\.module",
    ),
    (lambda: torch.jit.trace(nn.Linear(3, 3), torch.ones(1, 3)), "scripted or traced by torch.jit"),
    (lambda: nn.Linear(3, 3).forward, "model is method, not a torch.nn.Module.*in the forward of a module"),
]


@pytest.mark.parametrize("model,message", NOT_READY)
@pytest.mark.filterwarnings("ignore")
def test_models_that_are_not_ready(model: Callable[[], Any], message: str) -> None:
    with pytest.raises(tn.InputError, match=f"(?s){message}"):
        tn.compile(model(), LOSS, batch(), [tn.Grad()])


def test_no_warning_of_the_export(recwarn: pytest.WarningsRecorder) -> None:
    x, y = batch()
    model = Function(lambda m, x: m.r(x[:, None])[0][:, 0], r=nn.LSTM(3, 3, batch_first=True)).double()
    tn.compile(model, LOSS, (x, y), [tn.Grad()])
    assert not [w for w in recwarn if "assigned during export" in str(w.message)]


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_loss() -> None:
    """And nothing is left on the model."""
    model, x = nn.Linear(3, 2), batch()[0]
    for loss in (torch.jit.script(nn.MSELoss()), torch.jit.script(squares)):
        with pytest.raises(tn.InputError, match=r"the loss is scripted or traced by torch\.jit"):
            tn.compile(model, loss, (x, torch.ones(len(x), 2)), [tn.Grad()])
    assert not model._forward_hooks and not model._forward_pre_hooks


def squares(output: Tensor, y: Tensor) -> Tensor:
    return (output - y).square().mean()
