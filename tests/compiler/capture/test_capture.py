"""Capture: every graph is run op by op and must give what the model gives, for several batch sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tnbackprop.compiler.capture.export import capture
from tnbackprop.compiler.translate.symbolic import KERNELS, WHOLE
from tnbackprop.diagram.core import N
from tnbackprop.errors import InputError

from ...capturing import Function, captured, check_contract, run, targets

aten = torch.ops.aten


def cnn() -> nn.Sequential:
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(36, 5)]
    return nn.Sequential(*layers)


def test_cnn_with_cross_entropy() -> None:
    model = cnn().eval()
    graph = captured(model, torch.randn(6, 1, 8, 8), torch.randint(5, (6,)), nn.CrossEntropyLoss(torch.rand(5)))
    assert targets(graph) == ["conv2d", "relu", "max_pool2d", "flatten", "dropout", "linear", "cross_entropy_loss"]
    assert [c.output.name for c in graph.calls[:3]] == ["layer_0", "layer_1", "layer_2"]
    assert [c.path for c in graph.calls] == ["0", "1", "2", "3", "4", "5", "loss"]
    conv, loss = graph.calls[0], graph.calls[-1]
    assert conv.module_type == "Conv2d" and conv.stride == (1, 1) and conv.groups == 1
    assert conv.input.name == "x" and conv.weight.name == "p_0_weight"
    assert conv.output.axes == ((N,), (4,), (6,), (6,))
    assert conv.output.depends_on == {"0.weight", "0.bias"}
    assert loss.weight.name in graph.constants and loss.reduction == 1
    assert graph.example_batch == 6 and graph.inputs == ("x", "y")
    text = str(graph)
    assert "aten.conv2d.default" in text and "[N, 4, 6, 6]" in text


def test_dropout_keeps_the_mode() -> None:
    graph = capture(cnn().train(), None, (torch.randn(6, 1, 8, 8), None), {})
    assert next(c for c in graph.calls if c.target is aten.dropout.default).train is True
    assert graph.loss is None


def test_einsum_stays_one_call() -> None:
    before = torch.backends.opt_einsum.enabled
    model = Function(
        lambda m, x: torch.einsum("nij,jk,kl->nil", x, m.a, m.b),
        a=nn.Parameter(torch.randn(3, 4)),
        b=nn.Parameter(torch.randn(4, 2)),
    )
    graph = captured(model, torch.randn(4, 5, 3))
    assert targets(graph) == ["einsum"] and graph.calls[0].equation == "nij,jk,kl->nil"
    assert torch.backends.opt_einsum.enabled == before


def test_views_keep_the_place_of_the_batch() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        n = x.shape[0]
        h = m.linear(x).view(n, 3, 2, 4).transpose(1, 2).reshape(n * 2, 3, 4)
        h = torch.bmm(h, h.transpose(1, 2)).softmax(-1)
        return h.view(n, 2, 9).flatten(1)

    graph = captured(Function(forward, linear=nn.Linear(8, 8)), torch.randn(4, 3, 8))
    assert ((N, 2), (3,), (4,)) in [c.output.axes for c in graph.calls]
    assert next(c for c in graph.calls if c.target is aten.bmm.default).output.axes == ((N, 2), (3,), (3,))


def test_batch_in_the_middle_of_an_axis() -> None:
    def forward(m: Any, x: Tensor) -> Any:
        h = m.linear(x).transpose(0, 1).reshape(-1, 4)  # [T*N, 4]
        return h.relu().view(3, x.shape[0], 4).transpose(0, 1)

    graph = captured(Function(forward, linear=nn.Linear(8, 4)), torch.randn(5, 3, 8))
    assert ((3, N), (4,)) in [c.output.axes for c in graph.calls]


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(batch_first: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(m: Any, x: Tensor) -> Any:
        h = x if batch_first else x.transpose(0, 1)
        h = m.attention(h, h, h, need_weights=not batch_first)[0]
        return h if batch_first else h.transpose(0, 1)

    graph = captured(Function(forward, attention=attention), torch.randn(4, 3, 8))
    assert all("attention.in_proj_weight" in c.output.depends_on for c in graph.calls[-3:])


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x).relu_().add_(1.0).mul_(x.mean()),
        lambda m, x: _write(m.a(x)),
        lambda m, x: F.relu(x, inplace=True) + m.a(x),
        lambda m, x: torch.cat([c * (k + 1) for k, c in enumerate(m.a(x).chunk(3, -1))], -1),
        lambda m, x: torch.stack(m.a(x).unbind(1), 1) + m.a(x).split([2, 4], 1)[1].sum(1, keepdim=True),
        lambda m, x: m.a(x).max(1)[0] + m.a(x).max(1)[1],
        lambda m, x: m.a(x)[torch.arange(x.shape[0]), x[:, 0].long().clamp(0, 5)],
        lambda m, x: torch.cat([m.a(x), x]).relu().sum(1),
        lambda m, x: m.a(x).repeat_interleave(2, 0).cos().view(-1, 12),
        lambda m, x: (m.a(x) / x.shape[0], {"h": m.a(x).double().float(), "x": x.unsqueeze(1).squeeze(1)}),
        lambda m, x: torch.var_mean(m.a(x).masked_fill(x > 0, -1.0), 1)[1],
        lambda m, x: m.a(x) - x.mean(0),
        lambda m, x: torch.mul(*m.a(torch.cat([x, x + 1])).unflatten(0, (2, -1)).unbind()),
        lambda m, x: m.a(torch.cat([x, x + 1])).relu()[x.shape[0] :],
        lambda m, x: torch.einsum("...d,...e,de->...e", m.a(x), x, m.a.weight),
        lambda m, x: m.lstm(m.a(x)[:, :, None])[0].narrow(1, 1, 3),
        lambda m, x: m.a(m.a(x)).to(torch.float64).contiguous().clone().view(-1, 2, 3),
    ],
)
def test_programs(forward: Callable[..., Any]) -> None:
    model = Function(forward, a=nn.Linear(6, 6), lstm=nn.LSTM(1, 2, batch_first=True))
    x = torch.randn(4, 6)
    graph = capture(model, None, (x.clone(), None), {})
    for size in (1, 3):
        xs = x[torch.arange(size)]
        env = run(graph, model, xs.clone(), None)
        torch.testing.assert_close(pytree.tree_map(env.__getitem__, graph.output), model(xs.clone()))
    check_contract(graph, model)


def _write(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0] = 1.0
    h[:, 1:3] *= 2.0
    return h


def test_sum_over_cat_along_the_batch() -> None:
    graph = capture(
        Function(lambda m, x: torch.cat([m.a(x), x]), a=nn.Linear(6, 6)), None, (torch.ones(4, 6), None), {}
    )
    assert graph.values[graph.output].axes == ((2, N), (6,))


def test_squeeze_never_drops_the_batch() -> None:
    graph = capture(Function(lambda m, x: m.a(x).squeeze(), a=nn.Linear(6, 1)), None, (torch.ones(4, 2, 6), None), {})
    assert graph.calls[-1].dim == (2,) and graph.values[graph.output].axes == ((N,), (2,))


def test_depends_on_stops_at_detach_and_no_grad() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            frozen = m.a(x).relu()
        return m.a(x).detach() * m.b(x), frozen + m.b(x), frozen, m.a(x).argmax(1)

    model = Function(forward, a=nn.Linear(3, 2), b=nn.Linear(3, 2, bias=False))
    graph = captured(model, torch.randn(4, 3))
    assert [graph.values[name].depends_on for name in graph.output] == [{"b.weight"}, {"b.weight"}, set(), set()]


def test_parameters_tied_frozen_unused() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3), "c": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    model["a"].bias.requires_grad_(False)
    model.forward = lambda x: model["b"](model["a"](x))
    graph = capture(model, lambda o, y: o.sum(), (torch.randn(4, 3), None), {})
    assert graph.parameters["p_a_weight"] == ("a.weight", "b.weight")
    assert set(graph.parameters) == {"p_a_weight", "p_a_bias", "p_b_bias", "p_c_weight"}
    assert graph.values["p_a_bias"].depends_on == frozenset()
    assert graph.values["p_c_weight"].depends_on == {"c.weight"}
    assert graph.calls[0].weight is graph.calls[1].weight
    assert graph.values["loss"].depends_on == {"a.weight", "b.bias"}


def test_buffers_and_literals() -> None:
    model = Function(
        lambda m, x: m.bn(m.a(x)) + torch.tensor([1.0, 2.0]), a=nn.Linear(3, 2), bn=nn.BatchNorm1d(2)
    ).eval()
    graph = captured(model, torch.randn(4, 3))
    assert set(graph.buffers.values()) >= {"bn.running_mean", "bn.running_var"}
    assert [t.tolist() for t in graph.constants.values()] == [[1.0, 2.0]]


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx=0)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        h = self.embedding(input_ids)
        return {"logits": (h * attention_mask[..., None]).sum(1) if attention_mask is not None else h}


def test_dict_and_tuple_inputs() -> None:
    x = {"attention_mask": torch.ones(4, 5), "input_ids": torch.randint(7, (4, 5))}
    graph = captured(Words(), x, torch.randint(4, (4,)), lambda o, y: F.cross_entropy(o["logits"], y))
    assert graph.inputs == ("x_attention_mask", "x_input_ids", "y") and graph.output == {"logits": "sum"}
    scale = Function(lambda m, a, b, s: m.a(a) * b * s, a=nn.Linear(3, 2))
    graph = captured(scale, (torch.randn(4, 3), torch.randn(4, 1), torch.tensor(2.0)))
    assert graph.inputs == ("x_0", "x_1", "x_2") and graph.values["x_2"].axes == ()


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_batch_that_collides_with_other_sizes(batch: int) -> None:
    model = Function(lambda m, x: m.a(x) + x.sum(1, keepdim=True) * torch.ones(2), a=nn.Linear(3, 2))
    graph = captured(model, torch.randn(batch, 3), torch.randn(batch, 2), nn.MSELoss())
    assert graph.example_batch == batch


def test_loss_with_partial_and_module_called_twice() -> None:
    loss = functools.partial(F.cross_entropy, weight=torch.rand(3), reduction="sum")
    model = Function(lambda m, x: m.a(m.a(x)), a=nn.Linear(3, 3))
    graph = captured(model, torch.randn(4, 3), torch.randint(3, (4,)), loss)
    assert [c.output.name for c in graph.calls] == ["a", "a_2", "loss"]


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))
        self.inner = nn.Linear(3, 3)

    def forward(self, input: Tensor, power: float = 2.0) -> Any:
        return self.inner(input).abs() ** power * self.weight


class SubGate(Gate):
    pass


def test_module_with_a_rule_is_one_call() -> None:
    model = nn.Sequential(nn.Linear(3, 3), SubGate(), Gate(), nn.Flatten())
    graph = captured(model, torch.randn(4, 3), rules={Gate: lambda layer: ""})
    first, second = graph.calls[1:3]
    assert first.target is Gate and first.module is model[1] and first.module_type == "SubGate" and first.path == "1"
    assert list(first.arguments) == ["input", "power", "weight", "inner_weight", "inner_bias"]
    assert first.power == 2.0 and first.inner_weight.name == "p_1_inner_weight" and second.input is first.output
    assert first.output.axes == ((N,), (3,)) and "1.inner.weight" in first.output.depends_on
    assert not hasattr(torch.ops.tnbackprop_capture, "SubGate_0")


def test_patches_are_undone_when_export_fails() -> None:
    model = nn.Sequential(Gate(), nn.Linear(5, 5))
    with pytest.raises(InputError, match=r"module '1' \(Linear\)"):
        capture(model, None, (torch.randn(4, 3), None), {Gate: lambda layer: ""})
    assert "forward" not in model[0].__dict__


@pytest.mark.parametrize("shape", [(3,), (4, 3), (4, 3, 2)], ids=str)
@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("reduction", [0, 1, 2])
def test_kernels_of_the_export_are_the_operators(shape: tuple[int, ...], soft: bool, reduction: int) -> None:
    """What runs in the place of cross-entropy gives its values, smoothed and weighted too; nothing of it stays."""
    target, kernel = aten.cross_entropy_loss.default, KERNELS[aten.cross_entropy_loss.default]
    torch.manual_seed(0)
    output, labels = torch.randn(shape), torch.randint(3, shape[:-2] + shape[-1:] if len(shape) > 2 else shape[:-1])
    for weight, smoothing in ((None, 0.0), (torch.rand(3), 0.3)):
        options = (torch.rand(shape) if soft else labels, weight, reduction, -100, smoothing)
        torch.testing.assert_close(kernel(output, *options), target(output, *options))
        short = WHOLE[target](output.requires_grad_(), *options)
        assert short.shape == target(output, *options).shape and short.requires_grad
    assert not target.py_kernels


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_probabilities_after_a_written_view(reduction: str) -> None:
    """The graph is traced a second time, where the batch size must not be fixed either."""

    def forward(m: Any, x: Tensor) -> Any:
        h = m.a(x)
        h[:, 0] += 1
        return h

    model = Function(forward, a=nn.Linear(3, 3))
    loss = nn.CrossEntropyLoss(torch.rand(3), reduction=reduction)
    graph = captured(model, torch.randn(4, 3), torch.rand(4, 3).softmax(1), loss)
    assert targets(graph)[-1] == "cross_entropy_loss"
    assert not aten.cross_entropy_loss.default.py_kernels


def test_one_tensor_twice() -> None:
    """The same object as x and y, or twice in x, is two inputs: each is read where the model reads it."""
    x = torch.randn(4, 3)
    graph = captured(nn.Linear(3, 3), x, x, nn.MSELoss())
    assert graph.inputs == ("x", "y")
    assert graph.calls[0].input.name == "x" and graph.calls[-1].arguments["target"].name == "y"
    graph = captured(Function(lambda m, a, b: m.a(a) - b, a=nn.Linear(3, 3)), (x, x))
    assert graph.calls[0].input.name == "x_0" and graph.calls[1].other.name == "x_1"


def test_a_kernel_for_large_batches() -> None:
    """What branches on a batch far above the example's, as cuDNN's batch norm does at 65535, holds for the others."""
    model = Function(lambda self, x: torch.relu(x) if x.shape[0] <= 65535 else x.clamp(min=0))
    graph = captured(model, torch.randn(4, 2), torch.randn(4, 2))
    assert graph.values[graph.inputs[0]].shape == (N, 2)


def test_a_large_example() -> None:
    graph = captured(Function(lambda self, x: x[:, :1].relu()), torch.randn(70000, 2), torch.randn(70000, 1))
    assert graph.values[graph.inputs[0]].shape == (N, 2)
