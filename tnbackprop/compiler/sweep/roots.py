"""Roots: columns of the square root of the loss Hessian at the model's output, as torch code.

A loss with a `root` in its rule says how. For an elementwise loss the root follows from the formula: the Hessian is
diagonal, its entries are the second derivative, and the columns are their square roots, one per output element.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import count
from math import prod
from typing import Any

import sympy
from torch import Tensor

from ...diagram.algebra import diagonal
from ...diagram.core import BATCH, Diagram, Leg, N, Size, leaves
from ...diagram.derivatives import differentiate
from ...diagram.jacobian import Jacobian
from ...errors import UnsupportedError
from ...notation.bind import CURVATURE, HESSIAN_ROOT, NOISE, BoundRoot, BoundRule
from ...notation.code import Code, Hole
from ..running.drawing_calls import draws
from ..translate.graph import Call, Graph, Value, needed
from .composed import curvature_of, slope_of

Bound = tuple[tuple[Call, BoundRule], ...]
_UNIFORM = Hole(NOISE)
NORMAL = Code.of(
    "1.4142135623730951 * torch.erfinv((2 * ", _UNIFORM, " - 1) * (1 - torch.finfo(", _UNIFORM, ".dtype).eps))"
)  # fmt: skip
"""A normal number for each uniform one, finite for 0."""


@dataclass(frozen=True)
class DrawnLabels:
    """Labels that torch code of a user draws: calls on what the model gives and noise, and those of the loss behind.

    y       what they take the place of
    outputs  the values that the model gives, leaf by leaf
    given   what the code reads: these, and then the noise
    loss    the calls of the loss that read the output or y
    """

    sampler: Callable[..., Any]
    y: Value
    outputs: tuple[str, ...]
    given: tuple[Value, ...]
    calls: tuple[Call, ...]
    made: Value
    constants: Mapping[str, Tensor]
    loss: tuple[Call, ...]

    @property
    def by(self) -> str:
        """The sampler's name."""
        return str(getattr(self.sampler, "__name__", type(self.sampler).__name__))


@dataclass(frozen=True)
class LossRoot:
    """The loss's root; `curvature` is the diagonal Hessian that its code reads, if it has one.

    blocks   the Hessian is a block for each position, in which that is one factor; its signs are those of the columns
    sampler  draws labels, whose gradients are the columns; `labels` is the same captured
    """

    output: Value
    root: BoundRoot
    curvature: Diagram | None
    calls: tuple[Call, ...] = ()  # the loss's own calls, where its Hessian is taken by torch.func
    signed: bool = False  # negative curvature is in the columns' weights
    scale: sympy.Expr = sympy.S.One  # of a sample's loss
    sampler: Callable[..., Any] | None = None
    labels: DrawnLabels | None = None
    blocks: bool = False

    def noise_shape(self) -> tuple[Size, ...]:
        """That of the noise of one column."""
        return self.root.noise_shape(self.output.shape) if self.labels is None else self.labels.y.shape

    @property
    def columns(self) -> int:
        return self.root.columns

    @property
    def positive(self) -> bool:
        """Whether the curvature is a number for all batches, and not negative."""
        products = self.curvature.products if self.curvature is not None else ()
        return not any(p.operands for p in products) and bool(sympy.Add(*(p.scale for p in products)).subs(N, 1) >= 0)

    @property
    def value(self) -> str:
        return self.output.name


def loss_root(
    graph: Graph, bound: Bound, scale: sympy.Expr, what: str, signed: bool = False
) -> LossRoot:
    """The root for the single loss call on the model's only output, for `what` is asked for, with the loss's scale.

    Raises `UnsupportedError` where there is none.
    """
    output = output_of(graph, what)
    call, rule = next(((call, rule) for call, rule in bound if call.output.name == graph.loss), (None, None))
    if call is None or rule is None:
        raise UnsupportedError(
            f"{what} needs a loss that follows the model's output, and nothing trainable reaches this one: it does not "
            "read the output, or detaches it.\n  Its first-order quantities are zeros."
        )
    found = None
    if output.name in {v.name for v in call.tensors.values()}:
        found = LossRoot(output, _per_position(rule.root, output), None) if rule.root else _elementwise(rule, output)
    found = found or _linear_in(graph, bound, output, signed) or _written_out(graph, bound, output)
    return replace(found or _from_hessian(graph, output, signed), scale=scale)


def labelled_root(graph: Graph, scale: sympy.Expr, what: str, sampler: Callable[..., Any]) -> LossRoot:
    """Columns that are gradients of labels which a sampler draws."""
    output = output_of(graph, what)
    return LossRoot(output, BoundRoot(1, Code(), Code()), None, scale=scale, sampler=sampler)


def elementwise_root(found: LossRoot) -> LossRoot:
    """One column with the squared entries that the rule gives where outputs are taken not to mix, if it does."""
    code = found.root.elementwise if not found.signed else Code()
    root = replace(found.root, columns=1, code=Code.of("(", code, ").sqrt().unsqueeze(0)"))
    return replace(found, root=root) if code else found


def trained_outputs(graph: Graph) -> dict[str, Value]:
    """The outputs that the loss reads and a parameter reaches; all that it reads where none is.

    A mask or a detached target that the model gives back is to the loss what a label is.
    """
    outputs = graph.read_by_loss
    return {place: value for place, value in outputs.items() if value.differentiable} or outputs


def output_of(graph: Graph, what: str) -> Value:
    """The only output tensor of the model that the loss reads, alone or inside a dictionary or a tuple.

    Raises `UnsupportedError` where there are none or several.
    """
    outputs = trained_outputs(graph)
    if len(outputs) == 1:
        (output,) = outputs.values()
        if not output.differentiable:
            raise UnsupportedError(f"{what}: nothing trainable reaches the output: it is detached, or constant")
        return output
    shown = ", ".join(f"{place or 'output'} {value.axes_text}" for place, value in outputs.items()) or "none"
    reads = f"the loss reads {len(outputs)}" if graph.loss else f"this one returns {len(outputs)}"
    raise UnsupportedError(
        f"a model with one output tensor is needed for {what}, and {reads}: {shown}.\n  "
        "Wrap it in a module that returns the one that the loss reads, or torch.cat of them; tn.ggn_product and "
        "tn.hessian_product take several as they are."
    )


def at_loss(graph: Graph, bound: Bound) -> Value | None:
    """Where curvature is taken if not at the only output: further on, nearer to the loss's own call.

    Past all that reads a parameter, if the loss itself does (its head, say, or the model gives its loss): the curvature
    by parameters is that of the whole then. Past what moves, cuts or sums alone, to what the loss's own call reads:
    the map is linear, so its curvature is the same, J^T A^T H A J.
    """
    outputs = list(trained_outputs(graph).values())
    first = _past_parameters(graph) if read_behind(graph) else outputs[0] if len(outputs) == 1 else None
    value, moved = first, first not in outputs
    while value is not None:
        reading = [(call, rule) for call, rule in bound if value in call.tensors.values()]
        if len(reading) != 1:
            break
        ((call, rule),) = reading
        if rule.root and call.output.name != graph.loss and _linear_in(graph, bound, value):
            return value if moved or value != first else None
        if call.output.name == graph.loss:
            known = rule.root or _elementwise(rule, value)
            return value if known and (moved or value != first) else first if moved else None
        value = call.output if _linear(rule, call.output, value) else None
    return first if moved else None


def read_behind(graph: Graph) -> list[str]:
    """The trainable parameters that the loss reads by itself, not through an output of samples alone."""
    sampled = {value.name for value in graph.read_by_loss.values() if any(N in axis for axis in value.axes)}
    outputs = sampled - {graph.loss, *graph.parameters}
    made = {call.output.name: call for call in graph.calls if call.output.name not in outputs}
    seen, todo = set[str](), [graph.loss] if graph.loss else []
    while todo:
        name = todo.pop()
        if name in made and name not in seen:
            todo += [value.name for value in made[name].tensors.values()]
        seen.add(name)
    trainable = (name for name in graph.parameters if graph.values[name].differentiable and name not in outputs)
    return [graph.parameters[name][0] for name in trainable if name in seen]


def _past_parameters(graph: Graph) -> Value | None:
    """The first value of samples of which the loss is computed without a parameter; None: there is none."""
    found, read = None, set[str]()
    for call in reversed(needed(list(graph.calls), {graph.loss} if graph.loss else set())):
        own = call.output
        if read == {own.name} and any(N in axis for axis in own.axes):
            found = own
        read = read - {own.name} | {value.name for value in call.tensors.values() if value.differentiable}
    return found


def _linear(rule: BoundRule, made: Value, read: Value) -> bool:
    """Whether a value of a sample, with no more elements, is linear in another."""
    first = _slope(rule, read.name)
    batch = [size for axis in made.axes for size in axis].count(N) == 1
    if first is None or leaves(first.diagram) or not batch or made.depends_on != read.depends_on:
        return False
    return _elements(made) <= _elements(read)


def _elements(value: Value) -> int:
    """Of one sample."""
    return prod(int(size) for axis in value.axes for size in axis if size != N)


def _from_hessian(graph: Graph, output: Value, signed: bool) -> LossRoot:
    """Any other loss: its Hessian by torch.func, one column of the output at a time, and an eigendecomposition."""
    if not output.axes or output.axes[0] != (N,):
        raise UnsupportedError(
            f"the root of this loss's Hessian needs an output with the batch alone on axis 0, and it is {output}.\n"
            "  Use one of torch's losses directly, or declare a rule with a root: tnbackprop.Root."
        )
    calls = [call for call in calls_behind(graph, output) if call.output.differentiable]
    for call in calls:
        if draws(call.target, call.arguments):
            raise UnsupportedError(
                f"{call.where} draws random numbers, and the root of this loss's Hessian, by torch.func, would be of "
                "others.\n  Draw what does not depend on the output (torch.randn_like), or in the model."
            )
        if call.by_rule:
            raise UnsupportedError(
                f"the root of the Hessian of {call.where} does not follow from its rule: the loss is not elementwise "
                "in the model's output.\n  Declare it: tnbackprop.Rule(…, root=tnbackprop.Root(…))."
            )
    size = prod(int(s) for s in output.shape[1:])
    shape = ", ".join(str(s) for s in output.shape)
    columns = Hole(HESSIAN_ROOT)
    drawn = Code.of("(", NORMAL, f").reshape(N, {size}).t().unsqueeze(-1)")
    sample = Code.of("(", columns, f".reshape({size}, N, {size}) * ", drawn, f").sum(0).reshape({shape})")
    return LossRoot(output, BoundRoot(size, Code.of(columns, " * 1"), sample), None, tuple(calls), signed)


def calls_behind(graph: Graph, *values: Value) -> list[Call]:
    """The calls that read one of these values, or what is made of them."""
    reached, found = {value.name for value in values}, []
    for call in graph.calls:
        if reached & {value.name for value in call.tensors.values()}:
            reached.add(call.output.name)
            found.append(call)
    return found


def _per_position(root: BoundRoot, output: Value) -> BoundRoot:
    """The columns of each position of a sample: its Hessian does not mix them, so its columns may not either."""
    factors = [(size, axis in root.mixes) for axis, sizes in enumerate(output.axes) for size in sizes]
    free = [int(size) for size, mixed in factors if size != N and not mixed]
    if prod(free) == 1:
        return root
    ones = [str(size) if size != N and not mixed else "1" for size, mixed in factors]
    like = Code.of("dtype=", Hole(output.name), ".dtype, device=", Hole(output.name), ".device")
    eye = Code.of(f"torch.eye({prod(free)}, ", like, f").reshape({prod(free)}, {', '.join(ones)})")
    places = ", ".join(str(size) for size, _ in factors)
    spread = Code.of("(", root.code, f").reshape({root.columns}, 1, {places}) * ", eye)
    shape = ", ".join(str(size) for size in output.shape)
    columns = root.columns * prod(free)
    return replace(root, columns=columns, code=Code.of("(", spread, f").reshape({columns}, {shape})"))


def _slope(rule: BoundRule, name: str) -> Jacobian | None:
    """The loss's derivative as a formula of its operands, derived or declared; None where it reads anything else."""
    if len(rule.equations) > 1:
        return None
    (equation,) = rule.equations
    if equation.diagram is not None:
        return differentiate(equation.diagram, name)
    found = equation.jacobians.get(name)
    computed = {equation.name, *(saved.name for saved in rule.saved)}
    return found if found is not None and not computed & set(leaves(found.diagram)) else None


def _elementwise(rule: BoundRule, output: Value) -> LossRoot | None:
    """The root of a loss with a diagonal Hessian; None for any other."""
    first = _slope(rule, output.name)
    if first is None:
        return None
    second = differentiate(first.diagram, output.name)
    curvature = diagonal(second) if second is not None else Diagram(first.into, ())
    if curvature is None:
        return None
    curvature = curvature.rename({leg: BATCH for leg in first.into if leg.size == BATCH.size})
    return _on_diagonal(curvature, output, rule.draw or NORMAL)


def _written_out(graph: Graph, bound: Bound, output: Value) -> LossRoot | None:
    """The root of a loss of several lines whose Hessian is diagonal; None for any other."""
    lines = _lines(graph, bound, output)
    legs = tuple(leg for axis in _legs(output) for leg in axis)
    curvature = None if lines is None else curvature_of(output.name, legs, lines, str(graph.loss))
    return None if curvature is None else _on_diagonal(curvature, output, NORMAL)


def _linear_in(graph: Graph, bound: Bound, output: Value, signed: bool = False) -> LossRoot | None:
    """The root of a loss that is linear in what has one: cross-entropy, log_softmax; None for any other."""
    reading = [(call, rule) for call, rule in bound if output in call.tensors.values() and call.output.differentiable]
    ((call, rule),) = reading if len(reading) == 1 else ((None, None),)
    if call is None or rule is None or rule.root is None or call.output.name == graph.loss:
        return None
    lines, legs = _lines(graph, bound, call.output), _legs(call.output)
    every = tuple(leg for axis in legs for leg in axis)
    slope = None if lines is None else slope_of(call.output.name, every, lines, str(graph.loss))
    if slope is None:
        return None
    if CURVATURE in rule.root.code.holes:
        root, weight = rule.root, -slope.sum(*(leg.name for axis in rule.root.mixes for leg in legs[axis]))
    else:
        root, weight = _times(rule.root, output, call.output), slope
    found = LossRoot(output, _per_position(root, output), weight, blocks=True)
    return replace(found, signed=signed and not found.positive)


def _times(root: BoundRoot, output: Value, made: Value) -> BoundRoot:
    """The root of a loss that counts as often as `CURVATURE` says, for each position or as a whole."""
    ones = ", ".join("1" if axis in root.mixes else str(size) for axis, size in enumerate(output.shape))
    weight = Code.of(Hole(CURVATURE), ".clamp(min=0)", f".reshape({ones})" if made.axes else "")
    code, sample = (Code.of("(", own, ") * ", weight, ".sqrt()") for own in (root.code, root.sample))
    elementwise = Code.of("(", root.elementwise, ") * ", weight) if root.elementwise else root.elementwise
    return replace(root, code=code, sample=sample, elementwise=elementwise)


def _lines(graph: Graph, bound: Bound, output: Value) -> list[tuple[Call, BoundRule]] | None:
    """What leads from a value to the loss; None where a line of it has no rule."""
    behind = {call.output.name for call in calls_behind(graph, output) if call.output.differentiable}
    lines = [(call, rule) for call, rule in bound if call.output.name in behind]
    return lines if len(lines) == len(behind) else None


def _legs(value: Value) -> list[list[Leg]]:
    """For each axis those that it is made of."""
    names = count()
    return [[BATCH if size == N else Leg(f"o{next(names)}", size) for size in axis if size != 1] for axis in value.axes]


def _on_diagonal(curvature: Diagram, output: Value, draw: Code) -> LossRoot:
    """The root of a diagonal Hessian; `draw` gives a number with mean 0 and variance 1 for each element."""
    shape = ", ".join(str(s) for s in output.shape)
    entries = Code.of(Hole(CURVATURE), ".clamp(min=0).sqrt()")
    root = _per_position(BoundRoot(1, Code.of(entries, f".reshape(1, {shape})"), Code()), output)
    sample = Code.of(entries, f".reshape({shape}) * ", draw)
    return LossRoot(output, BoundRoot(root.columns, root.code, sample), curvature)
