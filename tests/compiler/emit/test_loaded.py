"""What Python knows of an emitted source leaves with the program."""

from __future__ import annotations

import gc
import linecache
import traceback

import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.emit.loaded import FILENAME, load


def known() -> set[str]:
    gc.collect()
    return {name for name in linecache.cache if name.startswith(FILENAME)}


def test_lines_leave_with_the_program() -> None:
    before = known()
    for seed in range(3):  # no more of them than there are programs
        torch.manual_seed(seed)
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        program = tn.compile(model, nn.MSELoss(), (x, x[:, :2]), [tn.BatchL2()])
        (name,) = known() - before
        assert "".join(linecache.getlines(name)).strip() == program.source.strip()
        program(x, x[:, :2])
    copied = program.attached(model, nn.MSELoss())
    del program
    assert known() - before == {name}
    del copied
    assert known() <= before  # programs of other tests may leave meanwhile


def test_an_error_keeps_its_lines() -> None:
    """Whoever holds the traceback can print it, though the function was let go."""
    before = known()
    try:
        load("def program(tensors):\n    return tensors['a'] / 0  # here\n")({"a": 1})
    except ZeroDivisionError as error:
        kept = error
    assert "# here" in "".join(traceback.format_exception(kept))
    del kept
    assert known() <= before  # programs of other tests may leave meanwhile
