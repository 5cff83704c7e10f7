"""Definitions that read more than one parameter's derivatives: operands, norms over all parameters, totals, inputs.

Each is an expression in `values` that gives {parameter, group or input: value}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ...compiler.emit.layout import Doc, Group
from ...compiler.emit.naming import string
from ...phased import ClippedGrad, Clipping, NaturalGradientSMW
from ...phased.weights import STABLE
from ...quantities import (
    AxisMoments,
    DirectionalCurvature,
    DirectionalGrad,
    DirectionalRoot,
    InputGrad,
    Quantity,
    Total,
    WeightedGrad,
)
from ..parts.text import call
from .references import definition, of_labels

GRADIENTS = "gradients"
DIRECTION = 'operands(values)["direction"]'
Found = tuple[Doc, frozenset[str]]
"""The expression, and the functions that it calls."""


@dataclass(frozen=True)
class Whole:
    """What definitions of a file are made of.

    scale  what the loss multiplies every sample by
    pull   quantity -> the function that pulls its columns back, "" where there is none
    names  of the results of a quantity: inputs, or parameters
    """

    scale: float
    pull: Callable[[Quantity], str]
    names: Callable[[Quantity], tuple[str, ...]]

    def found(self, quantity: Quantity, asked: Quantity | None = None) -> Found | None:
        """The definition of a quantity, or None: those of the classes of the package, not of others.

        asked  the total of it, which was asked for
        """
        G = _named(GRADIENTS, self.scale)
        kind = type(quantity)
        if kind is InputGrad:
            names = Group("[", tuple(map(string, self.names(quantity))), "]")
            return call("input_gradients", ("values", names)), frozenset({"input_gradients"})
        if kind is DirectionalGrad:
            return call("along", (G, DIRECTION, "1")), _uses("along")
        if kind is WeightedGrad:
            return call("weighted", (G, 'operands(values)["weights"]')), _uses("weighted")
        if kind in (DirectionalRoot, DirectionalCurvature):
            return self._along_root(quantity, asked or quantity)
        if isinstance(quantity, AxisMoments) and kind is AxisMoments:
            rows, shapes = G if quantity.individual else _named(GRADIENTS), f"FACTORS[{string(quantity.name)}]"
            return call("moments", (rows, shapes, f"individual={quantity.individual}")), _uses("moments")
        if isinstance(quantity, NaturalGradientSMW) and kind is NaturalGradientSMW:
            return call("natural", (G, repr(quantity.damping))), _uses("natural")
        if isinstance(quantity, ClippedGrad) and kind is ClippedGrad:
            return _clipped(quantity, G)
        return self._total(quantity) if isinstance(quantity, Total) else None

    def _along_root(self, quantity: Quantity, asked: Quantity) -> Found | None:
        """Columns along the direction, or the sum of their squares; those of the labels have no axis of their own."""
        labels = of_labels(quantity)
        pull = GRADIENTS if labels else self.pull(asked)
        if not pull:
            return None
        V = _named(pull, self.scale**0.5 if labels else 1.0)
        found, uses = call("along", (V, DIRECTION, "1" if labels else "2")), frozenset({"named", "along", pull})
        if isinstance(quantity, DirectionalRoot):
            return found, uses
        return call("each", (f"lambda Vd: Vd.square(){'' if labels else '.sum(0)'}", found)), uses | {"each"}

    def _total(self, total: Total) -> Found | None:
        """The sums over parameters, of what has a definition itself."""
        own = self.found(total.quantity, total)
        known = definition(total.quantity, self.scale)
        if own is None and known is not None:
            letter, text = known
            derive = {"G": GRADIENTS, "V": self.pull(total), "J": "jacobians"}[letter]
            each = call("each", (f"lambda {letter}: {text}", _named(derive)))
            own = (each, frozenset({"named", "each", derive})) if derive else None
        if own is None:
            return None
        return call("summed", (own[0], f"GROUPS[{string(total.name)}]")), own[1] | {"summed"}


def _named(derive: str, scale: float = 1.0) -> Doc:
    """What a function derives, by parameter; without what the loss multiplies it by."""
    return call("named", (derive, "values", *[f"{1 / scale:.12g}"] * (scale != 1.0)))


def _clipped(quantity: ClippedGrad, G: Doc) -> Found | None:
    if not isinstance(quantity.mode, Clipping):  # torch code of the user, which has no text
        return None
    weights = f"lambda norms: ({quantity.max_norm!r} / norms).clamp(max=1)"
    if quantity.mode is Clipping.AUTOMATIC:
        weights = f"lambda norms: {quantity.max_norm!r} / (norms + {STABLE!r})"
    alone = f"alone={quantity.mode is Clipping.PER_PARAMETER}"
    return call("clipped", (G, weights, alone)), _uses("clipped")


def _uses(*functions: str) -> frozenset[str]:
    return frozenset({"named", GRADIENTS, *functions})


def groups(total: Total, parameters: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Group -> its parameters."""
    found: dict[str, tuple[str, ...]] = {}
    for name in parameters:
        group = total.group_of(name)
        found[group] = (*found.get(group, ()), name)
    return found


NAMED = '''
def named(derive, values, times=1.0):
    """What a function of `values` derives, by the names of parameters."""
    found = derive(values)
    return {name: times * found[value] for name, value in STATE.items() if value in found}
'''

EACH = '''
def each(define, found):
    """A definition of every parameter's own."""
    return {name: define(value) for name, value in found.items()}
'''

SUMMED = '''
def summed(found, groups):
    """The sums over the parameters of each group."""
    return {group: sum(found[name] for name in names) for group, names in groups.items()}
'''

ALONG = '''
def along(found, direction, lead):
    """Inner products with a direction; the axes in front are kept."""
    return {name: flattened(value * direction[name], lead).sum(lead) for name, value in found.items()}
'''

WEIGHTED = '''
def weighted(G, weights):
    """Weighted sums of individual gradients."""
    return {name: torch.einsum("n,np->p", weights, flattened(g, 1)).reshape(g.shape[1:]) for name, g in G.items()}
'''

CLIPPED = '''
def clipped(G, weights, alone):
    """The same with weights from the norms of each parameter alone, or of all together."""
    squares = {name: flattened(g, 1).square().sum(1) for name, g in G.items()}
    norms = squares if alone else dict.fromkeys(G, sum(squares.values()))
    return {name: weighted({name: g}, weights(norms[name].sqrt()))[name] for name, g in G.items()}
'''

NATURAL = '''
def natural(G, damping):
    """(F + damping)^-1 times the mean gradient, by the singular values of all individual gradients."""
    rows = torch.cat([flattened(g, 1) for g in G.values()], 1)
    U, S, Vh = torch.linalg.svd(rows, full_matrices=False)
    step = (U.sum(0) * S / (S.square() / len(rows) + damping) / len(rows)) @ Vh
    parts = step.split([g[0].numel() for g in G.values()])
    return {name: part.reshape(g.shape[1:]) for (name, g), part in zip(G.items(), parts, strict=True)}
'''

MOMENTS = '''
def moments(G, shapes, individual):
    """Second moments along each axis: of the gradient, or the mean of those of individual gradients."""
    found = {}
    for name, g in G.items():
        rows = g if individual else g.sum(0, keepdim=True)
        flat = [flattened(rows.movedim(k + 1, 1), 2) for k in range(len(shapes[name]))]
        texts = ["nak,nbk->ab" if len(shape) == 2 else "nak,nak->a" for shape in shapes[name]]
        found[name] = tuple(torch.einsum(text, M, M) / len(rows) for text, M in zip(texts, flat, strict=True))
    return found
'''

INPUT_GRADIENTS = '''
def input_gradients(values, names):
    """Derivatives of the loss by inputs."""
    leaves = {name: values[name].clone().requires_grad_() for name in names}
    number = total(values, call(forward, values | leaves))
    found = torch.autograd.grad(number, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
'''

OPERANDS = '''
def operands(values):
    """What quantities are handed: random numbers, the same every time."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for key, parameter, shape, _ in operands_read(len(values[BATCH])).values():
        made = torch.rand(shape, generator=generator, dtype=torch.float64)
        if parameter:
            found.setdefault(key, {}).setdefault(parameter, made)
        else:
            found[key] = made
    return found
'''

WHOLE_TEXTS = {
    "operands": OPERANDS,
    "named": NAMED,
    "each": EACH,
    "summed": SUMMED,
    "along": ALONG,
    "weighted": WEIGHTED,
    "clipped": CLIPPED,
    "natural": NATURAL,
    "moments": MOMENTS,
    "input_gradients": INPUT_GRADIENTS,
}
"""Texts by the name of their function."""
WHOLE_CALLS = {"clipped": ("weighted",)}
"""Which of them a function calls."""

CHECK_WHOLE = '''
def check_whole(values, found):
    """What has a definition in the derivatives of all parameters, or in operands."""
    made, right = {}, []
    for (quantity, name), got in found.items():
        if quantity in WHOLE:
            if quantity not in made:
                made[quantity] = WHOLE[quantity](values)
            want, label = made[quantity][name], f"{quantity} of {name}"
            if isinstance(got, tuple):
                pairs = zip(got, want, strict=True)
                right += [compare(f"{label}, factor {k}", one, other) for k, (one, other) in enumerate(pairs)]
            else:
                right.append(compare(label, got, want))
    return right
'''
