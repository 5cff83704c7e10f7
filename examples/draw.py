"""Tensor network pictures of Linear, Conv2d, attention and a Kronecker cut, as SVG, DOT and TikZ.

    python examples/draw.py pictures

Operands are nodes, legs are wires. A wire that ends in a name is an output leg, every other is summed; a dot joins
more than two. Wires of the batch are thick. A dashed frame is a part: here G, the individual gradient, in G·G.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.diagram.algebra import inline
from tnbackprop.drawing import formulas, jacobian, quantity


class Attention(nn.Module):
    """softmax(Q Kᵀ / √d) V on [N, tokens, d]."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2) / x.shape[-1] ** 0.5
        return torch.softmax(scores, -1) @ self.v(x)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    quantities = [tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(), tn.KFAC()]
    loss, y = nn.CrossEntropyLoss(), torch.randint(2, (4,))

    linear = tn.compile(nn.Sequential(nn.Linear(5, 2)), loss, (torch.randn(4, 5), y), quantities)
    W = {"p_0_weight": "W", "p_0_bias": "b", "layer_0": "z"}
    g = {"g_layer_0": "g"}
    moment = quantity(linear, "second_moment", "0.weight")
    assert isinstance(moment, tn.Diagram)
    pictures = {
        "linear": tn.draw(formulas(linear, "0"), names=W),
        "linear_jacobian": tn.draw(jacobian(linear, "0", "0.weight"), title="∂z/∂W"),
        "linear_batch_grad": tn.draw(quantity(linear, "batch_grad", "0.weight"), names=g),
        "linear_second_moment": tn.draw(moment, names=g, title="second moment of W"),
        "linear_variance": tn.draw(quantity(linear, "variance", "0.weight"), names=g),
        "linear_rewrite": tn.draw((moment, inline(moment)), names=g, title="the square, multiplied out"),
    }

    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 2))
    convolution = tn.compile(model, loss, (torch.randn(4, 1, 8, 8), y), quantities)
    r = {"input_h": "r", "input_w": "c"}
    pictures |= {
        "conv": tn.draw(formulas(convolution, "0"), names=W | r),
        "conv_jacobian": tn.draw(jacobian(convolution, "0", "0.weight"), names=r),
        "conv_pooling": tn.draw(formulas(convolution, "2"), names={"layer_2_index": "argmax"}),
        "conv_batch_grad": tn.draw(quantity(convolution, "batch_grad", "0.weight"), names=g | r),
        "conv_second_moment": tn.draw(quantity(convolution, "second_moment", "0.weight"), names=g | r),
        "conv_kfac": tn.draw(quantity(convolution, "kfac", "0.weight"), names={"s0_layer_0": "S"} | r),
        "conv_model": tn.draw(convolution),
    }

    model = nn.Sequential(Attention(4), nn.Flatten(), nn.Linear(12, 2))
    attention = tn.compile(model, loss, (torch.randn(4, 3, 4), y), quantities[:3])
    names = {f"p_0_{k}_weight": f"W{k}" for k in "qkv"} | {f"layer_0_{k}": k.upper() for k in "qkv"}
    names |= {"layer_0_matmul": "scores", "layer_0_transpose": "Kᵀ", "layer_0_softmax": "softmax(scores/√d)"}
    names |= {"layer_0_div": "scores/√d", "layer_0": "output"}
    pictures |= {
        "attention": tn.draw(formulas(attention, "0"), names=names),
        "attention_batch_grad": tn.draw(quantity(attention, "batch_grad", "0.q.weight"), names={"g_layer_0_q": "g"}),
        "attention_model": tn.draw(attention),
    }

    for name, drawing in pictures.items():
        for suffix in (".svg", ".dot", ".tex"):
            drawing.save(folder / f"{name}{suffix}", force=True)
        print(f"{name:22} {drawing!r}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "pictures"))
