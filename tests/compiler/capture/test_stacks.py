"""Where the nodes of an exported graph are from: torch's own record, by less of the stack."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.fx import proxy

from tnbackprop.compiler.running import torch_quiet as quiet
from tnbackprop.compiler.running.failure import line_of

from ...capturing import Function


class Nested(nn.Module):
    """Operators of its own, of a function, and of a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Sequential(nn.Linear(3, 3), Function(lambda m, x: x.sin() * 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x.cos()) + x


def test_where_a_node_is_from() -> None:
    """The line is the one that is found in the whole stack; another thread's stacks are whole; all is undone."""
    own = proxy.CapturedTraceback

    def lines() -> list[str]:
        graph = torch.export.export(Nested(), (torch.randn(2, 3),), strict=False).graph
        return [line_of(node) for node in graph.nodes]

    with quiet.noting_forwards():
        found = lines()
        inside = proxy.CapturedTraceback
        with ThreadPoolExecutor(1) as pool:
            assert isinstance(pool.submit(inside.extract).result(), own)
    assert (inside is not own) == hasattr(proxy.TracerBase, "_filter_traceback_frames")
    assert proxy.CapturedTraceback is own
    assert found == lines()
    assert any("x.cos()" in line for line in found) and any("self.function" in line for line in found)
