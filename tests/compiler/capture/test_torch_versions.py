"""What older versions of torch do otherwise: the same from all of them, and undone afterwards."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._decomp import decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import tnbackprop as tn
from tnbackprop.compiler.running import torch_versions as versions
from tnbackprop.compiler.running.assertions import READING
from tnbackprop.errors import UnsupportedError

from ...capturing import Function
from ...rehearsing import check, compiled, layers, refused


def exported(model: nn.Module, x: Tensor) -> Any:
    batch = torch.export.Dim("batch", max=sys.maxsize - 1)
    return torch.export.export(model, (x,), dynamic_shapes=(({0: batch},),), strict=False)


def test_sizes_by_builtins() -> None:
    """They stay sizes while a graph is made; of other things, and afterwards, they are Python's own."""
    own, seen = (builtins.min, builtins.max, builtins.len), []

    def forward(m: Any, x: Tensor) -> Tensor:
        seen.extend([len(x), min(x.shape[0], 4), max(4, x.shape[0])])
        assert len(x.T) == len([1, 2, 3]) == 3 and len(m.a.weight) == 2
        with pytest.raises(TypeError, match="0-d"):
            len(x.sum())
        assert min([3, 1, 2]) == min(1, 2) == 1 and max("ab", "c", key=len) == "ab"
        return m.a(x) * seen[-2] * seen[-1]  # type: ignore[no-any-return]

    with versions.sizes_by_builtins():
        exported(Function(forward, a=nn.Linear(3, 2)), torch.ones(6, 3))
    assert all(isinstance(size, torch.SymInt) for size in seen)
    with pytest.raises(KeyError), versions.sizes_by_builtins():
        raise KeyError
    assert (builtins.min, builtins.max, builtins.len) == own
    assert versions.COMPARED in (None, {"sym_min": own[0], "sym_max": own[1]})


def test_last_states_of_an_lstm() -> None:
    """[layers, N, H] while a graph is made, as when it runs; afterwards torch's decomposition is its own."""
    own = decompositions.one_layer_lstm
    model = Function(lambda m, x: m.a(x)[1][1], a=nn.LSTM(3, 2, batch_first=True)).double()
    with versions.lstm_states():
        program = exported(model, torch.ones(6, 4, 3, dtype=torch.float64))
    shape = program.graph.output_node().args[0][0].meta["val"].shape
    assert len(shape) == 3 and (shape[0], shape[2]) == (1, 2)
    with pytest.raises(KeyError), versions.lstm_states():
        raise KeyError
    assert decompositions.one_layer_lstm is own


def test_who_asks() -> None:
    """A checkpoint may ask for a node of the graph, for itself; the user may not."""
    check(Function(lambda m, x: m.b(checkpoint(m.a, x, use_reentrant=False)), **layers()))
    refused(Function(lambda m, x: m.b(checkpoint(asks, m.a(x), use_reentrant=False)), **layers()), "reading grad_fn")


def asks(h: Tensor) -> Tensor:
    assert h.grad_fn is not None or not torch.is_grad_enabled()
    return h.sin()


def test_valueless_constants() -> None:
    program = exported(Function(lambda m, x: x + torch.ones(3), a=nn.Linear(3, 2)), torch.ones(4, 3))
    versions.refuse_valueless(program)
    program.constants["c"] = FakeTensorMode().from_tensor(torch.ones(3))
    with pytest.raises(RuntimeError, match="past the operators"):
        versions.refuse_valueless(program)
    with pytest.raises(UnsupportedError, match=r"detach\(\) for \.data"):
        compiled(Function(lambda m, x: m.a(x) + m.b(x).data, **layers()))


def test_running_statistics_are_read() -> None:
    """In eval mode instance norm gives what it gives, and its running statistics are not written to, in any version."""
    layer, x = nn.InstanceNorm1d(2, affine=True, track_running_stats=True).double().eval(), torch.rand(3, 2, 4).double()
    torch.nn.init.uniform_(layer.running_mean), torch.nn.init.uniform_(layer.running_var)
    given = (layer.running_mean, layer.running_var, layer.weight, layer.bias, False, 0.1, 1e-5)
    want, before = layer(x), layer.running_mean._version
    torch.testing.assert_close(READING[F.instance_norm](x, *given), want)
    assert layer.running_mean._version == before
    model = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Upsample(2), nn.InstanceNorm1d(3), nn.Flatten(), nn.Linear(6, 3))
    tn.compile(model.train(), nn.MSELoss(), (torch.rand(4, 3), torch.rand(4, 3)), [tn.Grad()])
