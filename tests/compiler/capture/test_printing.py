"""A forward runs several times while it is compiled: what it prints comes once, and what other threads print, too."""

from __future__ import annotations

import builtins
import io
import sys
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.running.printing import SILENT

from ...capturing import Function
from ...rehearsing import LOSS, compiled, layers


class Prints(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        print("layer", file=sys.stderr)
        return 2 * input


def forward(m: Any, x: Tensor) -> Tensor:
    print("forward", tuple(x.shape))
    return m.b(m.p(m.a(x)))  # type: ignore[no-any-return]


def loss(output: Tensor, y: Tensor) -> Tensor:
    print("loss", output.shape[1])
    return LOSS(output, y)


def picky(m: Any, x: Tensor) -> Tensor:
    """It takes no fewer samples than the example has."""
    print("picky", tuple(x.shape))
    assert x.shape[0] > 4
    return m.a(x)  # type: ignore[no-any-return]


def test_once(capsys: pytest.CaptureFixture[str]) -> None:
    program = compiled(Function(forward, **layers(p=Prints())), loss=loss)
    assert capsys.readouterr() == ("forward (2, 3)\nloss 3\n", "layer\n")
    program.model(torch.ones(1, 3).double())
    assert capsys.readouterr().out == "forward (1, 3)\n"


def test_once_where_it_takes_two_attempts(capsys: pytest.CaptureFixture[str]) -> None:
    compiled(Function(picky, **layers()))
    assert capsys.readouterr().out == "picky (2, 3)\n"


def test_modules_with_a_rule(capsys: pytest.CaptureFixture[str]) -> None:
    rules = tn.RULES | {Prints: tn.Rule("output[n, i] = 2 * input[n, i]")}
    compiled(Function(forward, **layers(p=Prints())), rules=rules)
    assert capsys.readouterr() == ("forward (2, 3)\n", "layer\n")


def test_other_threads_print(capsys: pytest.CaptureFixture[str]) -> None:
    own, inside, printed = builtins.print, Event(), Event()

    def other() -> None:
        assert inside.wait(20)
        print("other")
        printed.set()

    with ThreadPoolExecutor(1) as threads:
        done = threads.submit(other)
        with SILENT, SILENT:
            print("nobody reads this")
            inside.set()
            assert printed.wait(20)
        done.result()
    with pytest.raises(KeyError), SILENT:
        raise KeyError
    file = io.StringIO()
    print("all", file=file)
    assert builtins.print is own and file.getvalue() == "all\n" and capsys.readouterr().out == "other\n"
