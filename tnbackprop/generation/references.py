"""What the `--check` of a generated file compares with: definitions in derivatives that autograd gives."""

from __future__ import annotations

import re

from ..quantities import (
    NTK,
    BatchDot,
    BatchGrad,
    BatchL2,
    DiagGGN,
    DiagGGNMC,
    GGNGram,
    GGNTrace,
    Grad,
    Jacobians,
    Quantity,
    Scale,
    SecondMoment,
    SqrtGGN,
    SqrtGGNMC,
    Variance,
)

DEFINITIONS: dict[type[Quantity], str] = {
    Grad: "G.sum(0)",
    BatchGrad: "G",
    BatchL2: "flattened(G, 1).square().sum(1)",
    BatchDot: "flattened(G, 1) @ flattened(G, 1).T",
    SecondMoment: "G.square().sum(0)",
    Variance: "(G - G.mean(0)).square().mean(0)",
    SqrtGGN: "V",
    SqrtGGNMC: "V",
    DiagGGN: "V.square().sum((0, 1))",
    DiagGGNMC: "V.square().sum((0, 1))",
    GGNTrace: "flattened(V, 2).square().sum((0, 2))",
    GGNGram: 'torch.einsum("vnp,wmp->vnwm", flattened(V, 2), flattened(V, 2))',
    Jacobians: "J.transpose(0, 1)",
    NTK: 'torch.einsum("cnp,dmp->ncmd", flattened(J, 2), flattened(J, 2))',
}
"""In the individual gradients G [N, *p], the root V [V, N, *p], or the Jacobian J [C, N, *p]."""


def definition(quantity: Quantity, scale: float = 1.0) -> tuple[str, str] | None:
    """("G", "V" or "J", the definition in it), or None. `scale` is what the loss multiplies every sample by."""
    text = DEFINITIONS.get(type(quantity))
    if text is None:
        return None
    if isinstance(quantity, DiagGGN) and quantity.per_sample:
        text = "V.square().sum(0)"
    kind = getattr(quantity, "scale", Scale.BACKPACK)
    plain = isinstance(quantity, SecondMoment | Variance) and kind is not Scale.BACKPACK
    if isinstance(quantity, SecondMoment) and plain:
        text = text.replace("sum(0)", "mean(0)")
    letter = next(letter for letter in "GVJ" if re.search(rf"\b{letter}\b", text))
    if scale != 1.0 and (plain or kind is Scale.UNSCALED):
        text = text.replace("G", f"(G * {1 / scale:.12g})")
    return letter, text
