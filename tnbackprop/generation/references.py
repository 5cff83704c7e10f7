"""What the `--check` of a generated file compares with: definitions on individual gradients that autograd gives."""

from __future__ import annotations

from ..quantities import (
    KFAC,
    KFLR,
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

OF_LAYER: dict[type[Quantity], str] = {
    Grad: "G.sum(0)",
    BatchGrad: "G",
    BatchL2: "G.flatten(1).square().sum(1)",
    BatchDot: "G.flatten(1) @ G.flatten(1).T",
    SecondMoment: "G.square().mean(0)",
    Variance: "(G - G.mean(0)).square().mean(0)",
    SqrtGGN: "V",
    SqrtGGNMC: "V",
    DiagGGN: "V.square().sum((0, 1))",
    DiagGGNMC: "V.square().sum((0, 1))",
    GGNTrace: "V.flatten(2).square().sum((0, 2))",
    GGNGram: 'torch.einsum("vnp,wmp->vnwm", V.flatten(2), V.flatten(2))',
    Jacobians: "J.transpose(0, 1)",
    NTK: 'torch.einsum("cnp,dmp->ncmd", J.flatten(2), J.flatten(2))',
}
"""In G [N, *p], V [V, N, *p] from columns, and J [C, N, *p]."""

FACTORED = (KFLR, KFAC)


def of_layer(quantity: Quantity) -> str | None:
    """The definition for given cotangents; None where there is none."""
    text = OF_LAYER.get(type(quantity))
    if isinstance(quantity, SecondMoment) and quantity.scale is Scale.BACKPACK:
        return "G.square().sum(0)"
    if isinstance(quantity, DiagGGN) and quantity.per_sample:
        return "V.square().sum(0)"
    return text
