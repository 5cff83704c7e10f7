"""No cycles are looked for while a program is compiled; what was before is again afterwards."""

from __future__ import annotations

import gc
from threading import Barrier, Thread

import pytest
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.running.collector import UNCOLLECTED, Uncollected


def test_while_compiling() -> None:
    seen: list[bool] = []

    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(gc.isenabled())
            return super().forward(x)

    assert gc.isenabled()
    example = torch.randn(4, 3), torch.randn(4, 2)
    tn.compile(Net(3, 2), nn.MSELoss(), example, [tn.Grad()])
    assert gc.isenabled() and seen and not any(seen)
    with pytest.raises(tn.TnError):
        tn.compile(Net(4, 2), nn.MSELoss(), example, [tn.Grad()])
    assert gc.isenabled() and UNCOLLECTED.inside == 0


def test_threads() -> None:
    """It is the last one that gives it back, and nobody where it was off."""
    one, both = Uncollected(), Barrier(2)

    def inside() -> None:
        with one:
            both.wait()
            assert not gc.isenabled()
            both.wait()

    threads = [Thread(target=inside) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.isenabled()
    gc.disable()
    try:
        with one, one:
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
