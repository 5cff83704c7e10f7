"""What the values of a generated file are called: after the layer, not after the graph that it was captured as."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn


class Two(nn.Module):
    """Two inputs, and parameters whose names the graph would not keep."""

    def __init__(self) -> None:
        super().__init__()
        self.R, self.weight = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 3))

    def forward(self, input: Tensor, shift: Tensor) -> Tensor:
        return torch.sigmoid(input @ self.R) @ self.weight - shift


def two_of_a_kind() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))


NAMED: list[tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = [
    # a layer, the shapes of its inputs' samples, the arguments of forward
    (lambda: nn.Sequential(nn.Linear(4, 3)), (4,), ["input", "weight", "bias"]),
    (two_of_a_kind, (4,), ["input", "weight_0", "bias_0", "weight_2", "bias_2"]),
    (lambda: nn.Sequential(tn.einsum_layer("output[n, i] = R[i] * input[n, i]", R=(3,))), (3,), ["input", "R"]),
    (Two, (4, 3), ["input", "shift", "R", "weight"]),
]


@pytest.mark.parametrize(("make", "sizes", "arguments"), NAMED)
def test_names_are_those_of_the_layer(
    make: Callable[[], nn.Module], sizes: tuple[int, ...], arguments: list[str]
) -> None:
    module = make().double()
    inputs = tuple(torch.randn(5, size).double() for size in (sizes if isinstance(module, Two) else sizes[:1]))
    made = tn.generate(module, "batch_grad,second_moment", example=inputs if len(inputs) > 1 else inputs[0])
    (signature,) = re.findall(r"^def forward\((.*)\):$", made.source, flags=re.MULTILINE)
    assert signature.split(", ") == arguments
    functions = re.findall(r"^def (?:vjp|batch_grad)_(\w+)\(", made.source, flags=re.MULTILINE)
    assert functions == arguments
    for name in arguments[: len(inputs)]:
        assert f"# cotangent of {name}\n" in made.source and re.search(rf"^ +g_{name}\[n", made.source, re.MULTILINE)
    assert not re.search(r"\b(g_)?x(_\d)?\b(?! for)|\bp_\d", made.source.partition("GIVEN")[0])
    namespace: dict[str, object] = {"__name__": "made"}
    exec(made.source, namespace)
    assert namespace["check"]() == 0  # type: ignore[operator]


def test_minus_one_is_no_factor() -> None:
    made = tn.generate(Two(), "grad", example=(torch.randn(5, 4), torch.randn(5, 3)))
    assert "cotangent.neg()" in made.source and "* -1" not in made.source


@pytest.mark.parametrize("name", ["gelu", "softplus", "sigmoid", "silu", "logsigmoid", "mish"])
def test_functions_are_called_by_name(name: str) -> None:
    """In the forward, and their derivatives where torch has a kernel; never as what they are made of."""
    module = {"logsigmoid": nn.LogSigmoid, "silu": nn.SiLU, "gelu": nn.GELU}.get(name) or getattr(nn, name.capitalize())
    source = tn.generate(module(), "grad", example=torch.randn(3, 4)).source
    (forward,) = re.findall(r"^def forward.*?^    return", source, flags=re.MULTILINE | re.DOTALL)
    assert f".{name.replace('logs', 'log_s')}.default(input)" in forward and "exp" not in forward
