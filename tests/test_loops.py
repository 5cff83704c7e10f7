"""Loops over columns: what is added up in place, and what is not."""

from __future__ import annotations

import torch

from tnbackprop.compiler.cost import Kernel
from tnbackprop.compiler.loops import Loop, loop_lines
from tnbackprop.compiler.store import NO_WORK, Step


def test_a_matmul_that_others_read_is_kept() -> None:
    """It is added up as it is, and what reads it still finds it; a matmul that nobody else reads adds itself."""
    steps = (
        Step("t0", "torch.mm(column_0, b)", ("column_0", "b"), Kernel.MM, NO_WORK),
        Step("t1", "t0 * 2", ("t0",), Kernel.ELEMENTWISE, NO_WORK),
        Step("t2", "torch.mm(column_0, c)", ("column_0", "c"), Kernel.MM, NO_WORK),
    )
    outputs = (("t0", "total_0_0"), ("t1", "total_0_1"), ("t2", "total_0_2"))
    loop = Loop({"column_0": "root_0"}, 3, 1, steps, outputs, frozenset(), {})
    lines = loop_lines(loop, dict.fromkeys(("t0", "t1", "t2"), (2, 2)))
    root, b, c = torch.randn(3, 2, 4), torch.randn(4, 2), torch.randn(4, 2)
    scope = {"torch": torch, "progress": iter, "like": root, "root_0": root, "b": b, "c": c}
    exec("\n".join(line.removeprefix("    ") for line in lines), scope)
    torch.testing.assert_close(scope["total_0_0"], (root @ b).sum(0))
    torch.testing.assert_close(scope["total_0_1"], 2 * (root @ b).sum(0))
    torch.testing.assert_close(scope["total_0_2"], (root @ c).sum(0))
    assert sum("addmm_" in line for line in lines) == 1
