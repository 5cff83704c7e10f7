"""What the `--check` of a generated file compares with: definitions in derivatives that autograd gives."""

from __future__ import annotations

from ...quantities import (
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
    Labels,
    Quantity,
    Scale,
    SecondMoment,
    SqrtGGN,
    SqrtGGNMC,
    Variance,
)

DEFINITIONS: dict[type[Quantity], tuple[str, str]] = {
    Grad: ("G", "{0}.sum(0)"),
    BatchGrad: ("G", "{0}"),
    BatchL2: ("G", "flattened({0}, 1).square().sum(1)"),
    BatchDot: ("G", "flattened({0}, 1) @ flattened({0}, 1).T"),
    SecondMoment: ("G", "{0}.square().sum(0)"),
    Variance: ("G", "({0} - {0}.mean(0)).square().mean(0)"),
    SqrtGGN: ("V", "{0}"),
    SqrtGGNMC: ("V", "{0}"),
    DiagGGN: ("V", "{0}.square().sum((0, 1))"),
    DiagGGNMC: ("V", "{0}.square().sum((0, 1))"),
    GGNTrace: ("V", "flattened({0}, 2).square().sum((0, 2))"),
    GGNGram: ("V", 'torch.einsum("vnp,wmp->vnwm", flattened({0}, 2), flattened({0}, 2))'),
    Jacobians: ("J", "{0}.transpose(0, 1)"),
    NTK: ("J", 'torch.einsum("cnp,dmp->ncmd", flattened({0}, 2), flattened({0}, 2))'),
}
"""In the individual gradients G [N, *p], the root V [V, N, *p], or the Jacobian J [C, N, *p]."""
OF_LABELS: dict[type[Quantity], str] = {
    SqrtGGN: "{0}",
    DiagGGN: "{0}.square().sum(0)",
    GGNTrace: "flattened({0}, 1).square().sum(1)",
    GGNGram: "flattened({0}, 1) @ flattened({0}, 1).T",
}
"""With the gradients of the labels for columns: in G over the square root of what the loss multiplies by."""
OF_EACH_SAMPLE, MEAN_OF_SQUARES = "{0}.square().sum(0)", "{0}.square().mean(0)"


def definition(quantity: Quantity, scale: float = 1.0) -> tuple[str, str] | None:
    """("G", "V" or "J", the definition in it), or None. `scale` is what the loss multiplies every sample by."""
    if type(quantity) not in DEFINITIONS:
        return None
    if of_labels(quantity):
        each = isinstance(quantity, DiagGGN) and quantity.per_sample
        text = "{0}.square()" if each else OF_LABELS[type(quantity)]
        return "G", text.format(f"(G * {scale**-0.5:.12g})" if scale != 1.0 else "G")
    letter, text = DEFINITIONS[type(quantity)]
    if isinstance(quantity, DiagGGN) and quantity.per_sample:
        text = OF_EACH_SAMPLE
    kind = getattr(quantity, "scale", Scale.BACKPACK)
    plain = isinstance(quantity, SecondMoment | Variance) and kind is not Scale.BACKPACK
    if isinstance(quantity, SecondMoment) and plain:
        text = MEAN_OF_SQUARES
    unscaled = scale != 1.0 and (plain or kind is Scale.UNSCALED)
    return letter, text.format(f"({letter} * {1 / scale:.12g})" if unscaled else letter)


def of_labels(quantity: Quantity) -> bool:
    """Whether its columns are the gradients of the labels."""
    return isinstance(getattr(quantity, "root", None), Labels)
