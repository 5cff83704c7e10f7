"""Generated files against the programs that they come from: python -m benchmarks.generated

For a layer the program is compiled with the loss Σ output · cotangent (first order) or with squared errors (curvature),
and the file runs its forward and one function per parameter. For a model both run the same lines.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import tnbackprop as tn

from .timing import Call, ratios, round_robin

FIRST = (tn.Grad(), tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance())
SECOND = (tn.DiagGGN(), tn.SqrtGGN(), tn.KFLR())
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "Linear(256, 64)": (nn.Linear(256, 64), (256,)),
    "Conv2d(16, 16, 3)": (nn.Conv2d(16, 16, 3), (16, 12, 12)),
    "LayerNorm(256)": (nn.LayerNorm(256), (256,)),
}


class Product(nn.Module):
    """⟨output, cotangent⟩."""

    def forward(self, output: Tensor, cotangent: Tensor) -> Tensor:
        return (output * cotangent).sum()


def loaded(source: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(source, "generated.py", "exec"), namespace)
    return namespace


def pairs(batch: int) -> Iterator[tuple[str, dict[str, Call]]]:
    """(what, {"program": call, "file": call})."""
    for name, (layer, shape) in LAYERS.items():
        x = torch.randn(batch, *shape)
        for quantity in FIRST:
            yield f"{name} {quantity.name}", of_layer(layer, x, quantity)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(1352, 10))
    x, y, loss = torch.randn(batch, 1, 28, 28), torch.randint(10, (batch,)), nn.CrossEntropyLoss()
    for quantity in (*FIRST, *SECOND):
        program = tn.compile(model, loss, (x, y), [quantity])
        compute = loaded(tn.generate(model, [quantity], loss=loss, example=(x, y)).source)["compute"]
        calls: dict[str, Call] = {"program": lambda p=program: p(x, y), "file": lambda c=compute: c(model, x, y)}
        yield f"CNN {quantity.name}", calls


def of_layer(layer: nn.Module, x: Tensor, quantity: tn.Quantity) -> dict[str, Call]:
    """Both with the same cotangent."""
    cotangent = torch.randn_like(layer(x))
    loss = Product()
    program = tn.compile(layer, loss, (x, cotangent), [quantity])
    file = loaded(tn.generate(layer, [quantity], example=x).source)
    state = {name: value.detach() for name, value in layer.state_dict().items()}
    values = {file["INPUTS"][0]: x, "cotangent": cotangent, **{file["STATE"][k]: v for k, v in state.items()}}

    def functions() -> list[Any]:
        output = file["call"](file["forward"], values)
        value = (output * cotangent).sum()
        return [value, *(file["call"](function, values) for function in file["FUNCTIONS"].values())]

    return {"program": lambda: program(x, cotangent), "file": functions}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.generated", description=__doc__)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    print(f"time of the generated file over the program's, N = {options.batch}, {torch.get_num_threads()} threads")
    for name, calls in pairs(options.batch):
        seconds = round_robin(calls, options.rounds, 10, torch.device("cpu"))
        ratio = ratios(seconds, "program")["file"]
        print(f"{name:40} {ratio.median:5.2f}  ({ratio.low:.2f} to {ratio.high:.2f}), file {ratio.milliseconds:.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
