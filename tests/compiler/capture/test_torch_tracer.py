"""What is asked of the tracer of torch.export: each does what it says, and is undone."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tnbackprop.compiler.running import torch_tracer as tracer

from .test_torch_internals import aten, failing


def test_calls_of_modules_are_seen() -> None:
    """And an equal tensor stands for another node, without a node of its own."""
    before = tracer._ModuleStackTracer.call_module
    model, seen = nn.Sequential(nn.Linear(3, 3), nn.Tanh()), list[str]()

    def around(own: Any, module: nn.Module, run: Any, args: Any, kwargs: Any) -> Any:
        seen.append(own.path_of_module(module).rpartition(".")[2])
        if not isinstance(module, nn.Tanh):
            return run()
        (x,) = args
        assert tracer.is_traced(x) and tracer.node_of(own, x).target is aten.linear.default
        assert all(isinstance(text, str) for pair in tracer.modules_around(own).values() for text in pair)
        other = tracer.another(x)
        assert other is not x and tracer.memory_of(other) != tracer.memory_of(x)
        assert tracer.described(other) == tracer.described(x)
        tracer.track(own, other, tracer.node_of(own, x))
        return other

    with tracer.module_calls(around):
        program = torch.export.export(model, (torch.randn(4, 3),), strict=False)
    assert seen[-2:] == ["0", "1"]
    assert [node.target for node in program.graph.nodes if node.op == "call_function"] == [aten.linear.default]
    failing(tracer.module_calls(around))
    assert tracer._ModuleStackTracer.call_module is before


def test_nobody_follows_what_is_asked() -> None:
    asked: list[Any] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.ones(2)
    with Mode():
        with tracer.unseen():
            assert x.dtype == torch.float32
        assert not asked
        assert x.dtype == torch.float32
    assert asked
