"""Trial: what an operator without a rule does on samples of the example, which are in its own domain.

Changing one sample must not change the others. There, too, the VJP of the batch and `torch.func.vmap` over that of one
sample are compared with one call for each sample and column: for some operators torch knows no such derivative, or a
wrong one (`cdist`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Any

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...diagram.core import N
from ...errors import UnsupportedError
from ..batched.axes import batch_axis
from ..capture.export import plain
from ..capture.state import resized
from ..running.drawing_calls import draws
from ..running.printing import SILENT
from ..running.torch_quiet import UNWARNED
from ..translate.graph import Call, Graph, Value, needed
from ..translate.opaque import named_tensors, signature_of
from ..translate.torch_internals import OpOverload, arguments_of

SAMPLES = 3
"""As many are tried: one that is changed, and two that must not notice."""
SECOND = torch.tensor([1, 1, 2])
"""The second sample in the place of the first."""


@dataclass
class Trial:
    """The values of a graph on a few samples of the example, each computed when it is first asked for."""

    graph: Graph
    values: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, graph: Graph, model: nn.Module, loss: Any, example: tuple[Any, Any]) -> Trial:
        """What the graph reads."""
        (x, y), own = example, named_tensors(model)
        values = {name: own[dotted[0]] for name, dotted in graph.parameters.items()}
        values |= {name: own[dotted] for name, dotted in graph.buffers.items()} | dict(graph.constants)
        few = resized((plain(x), plain(y)), SAMPLES)
        leaves = [leaf for leaf in pytree.tree_leaves(few) if isinstance(leaf, Tensor)]
        values |= dict(zip(graph.inputs, leaves, strict=True))
        return cls(graph, {name: value.detach() for name, value in values.items()})

    def operands(self, call: Call) -> dict[str, Tensor]:
        """The tensors that a call reads; samples that do not differ are scaled."""
        self._compute({value.name for value in call.tensors.values()})
        found = {value.name: self.values[value.name] for value in call.tensors.values()}
        own = [value for value in batched(call) if value.dtype.is_floating_point]
        if any(not torch.equal(*_samples(value, found[value.name])[:2]) for value in own):
            return found
        for value in own:
            rows = _samples(value, found[value.name])
            scales = torch.linspace(1, 0.75, SAMPLES).to(rows).view(-1, *[1] * (rows.ndim - 1))
            found[value.name] = (rows * scales).movedim(0, place_of(value))
        return found

    @torch.no_grad()
    def _compute(self, wanted: set[str]) -> None:
        calls = needed([call for call in self.graph.calls if call.output.name not in self.values], wanted)
        with torch.random.fork_rng():
            for call in calls:
                self.values[call.output.name] = run(call, self.values)


def sampled(value: Value) -> bool:
    """Whether it has the batch."""
    return batch_axis(value) is not None


def place_of(value: Value) -> int:
    """The axis of the samples; what has none gets them in front."""
    return batch_axis(value) or 0


def _samples(value: Value, tensor: Tensor) -> Tensor:
    """The samples in front."""
    return tensor.movedim(place_of(value), 0)


def batched(call: Call) -> list[Value]:
    """The operands with a sample's own value, each once."""
    return [v for v in dict.fromkeys(call.tensors.values()) if sampled(v)]


def one_sample(call: Call) -> Call:
    """The call with the sizes that it has for one."""
    return replace(call, arguments=MappingProxyType({k: _sized(a, 1) for k, a in call.arguments.items()}))


def run(call: Call, tensors: Mapping[str, Tensor]) -> Tensor:
    """The output of a call."""

    def value(argument: Any) -> Any:
        if isinstance(argument, Call):
            return run(argument, tensors)
        return tensors[argument.name] if isinstance(argument, Value) else _sized(argument, SAMPLES)

    filled = {name: pytree.tree_map(value, argument) for name, argument in call.arguments.items()}
    if not isinstance(call.target, OpOverload):
        signature = signature_of(call.module) if call.module is not None else inspect.signature(call.target.function)
        bound = inspect.BoundArguments(signature, {name: filled[name] for name in signature.parameters})
        with SILENT:
            output: Tensor = (call.module or call.target.function)(*bound.args, **bound.kwargs)
        return output
    names = {a.name: "input" if a.name == "self" else a.name for a in arguments_of(call.target)}
    args = [filled[names[a.name]] for a in arguments_of(call.target) if not a.kwarg_only]
    options = {a.name: filled[names[a.name]] for a in arguments_of(call.target) if a.kwarg_only}
    result = call.target(*args, **options)
    return result if call.item is None else result[call.item]  # type: ignore[no-any-return]


def _sized(argument: Any, samples: int) -> Any:
    def sized(leaf: Any) -> Any:
        if isinstance(leaf, Call):
            return replace(leaf, arguments=MappingProxyType({k: _sized(a, samples) for k, a in leaf.arguments.items()}))
        return int(leaf.subs(N, samples)) if isinstance(leaf, sympy.Expr) else leaf

    return pytree.tree_map(sized, argument)


def refuse_mixing(call: Call, tensors: Mapping[str, Tensor], refused: Callable[[str], UnsupportedError]) -> None:
    """Replace the first sample by the second one, which is as good: the others must stay as they are."""
    own = batched(call)
    if draws(call.target, call.arguments):
        raise refused("it draws random numbers. In eval mode it may draw none: model.eval()")
    if own and sampled(call.output):
        changed = dict(tensors)
        for value in own:
            changed[value.name] = tensors[value.name].index_select(
                place_of(value), SECOND.to(tensors[value.name].device)
            )
        try:
            with torch.no_grad():
                before, after = (_samples(call.output, run(call, each)) for each in (tensors, changed))
        except RuntimeError as error:
            raise refused(f"it fails on samples of the example, or on one that is scaled ({error})") from error
        if not _close(after[1:], before[1:]) or not _close(after[0], before[1]):
            raise refused("its output for one sample depends on another (it mixes samples)")
    floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    try:
        torch.func.vjp(lambda some: run(call, {**tensors, **some}), floating)
    except (RuntimeError, NotImplementedError) as error:
        raise refused("it knows no derivative of it") from error


class Way(Enum):
    """How the VJP of an operator is taken of a batch: of all samples at once, by vmap over them, one by one."""

    WHOLE = "all samples at once"
    MAPPED = "vmap over the samples"
    LOOPED = "each sample by itself"


@dataclass(frozen=True)
class Ways:
    """How the VJPs of all samples are found, and whether one of the batch gives their sum, by what has no samples."""

    each: Way
    total: bool


def ways_of(
    call: Call, operand: Value, tensors: Mapping[str, Tensor], refused: Callable[[str], UnsupportedError]
) -> Ways:
    """Which ways give what single VJPs give, for several columns, too: the quickest of them."""
    own, one, generator = batched(call), one_sample(call), torch.Generator().manual_seed(1)
    each = sampled(call.output)
    shape = [3, SAMPLES, *(size for size in call.output.shape if isinstance(size, int))]
    cotangents = torch.randn(shape, generator=generator, dtype=torch.float64)

    def vjp(cotangent: Tensor, *rows: Tensor) -> Tensor:
        at = {**tensors, **{v.name: row.unsqueeze(place_of(v)) for v, row in zip(own, rows, strict=True)}}
        return _pulled(one, at, operand, cotangent.unsqueeze(place_of(call.output)) if each else cotangent)

    rows = [_samples(v, tensors[v.name]) for v in own]
    cotangents = cotangents.to(tensors[operand.name].device, call.output.dtype)
    try:
        columns = [torch.stack([vjp(*sample) for sample in zip(column, *rows, strict=True)]) for column in cotangents]
    except (RuntimeError, IndexError) as error:
        raise refused(f"it fails on a sample by itself ({error})") from error
    single = torch.stack(columns)
    if each and sampled(operand):
        place = place_of(operand)
        together = single.squeeze(2 + place).movedim(1, 1 + place)
        if _gives(partial(_pulled, call, tensors, operand), cotangents.movedim(1, 1 + place_of(call.output)), together):
            return Ways(Way.WHOLE, total=False)
    over_samples = torch.func.vmap(vjp, (0, *(0 for _ in rows)))
    mapped = _gives(lambda column: over_samples(column, *rows), cotangents, single)
    return Ways(Way.MAPPED if mapped else Way.LOOPED, total=each and _sums(call, tensors, operand, cotangents, single))


def _pulled(call: Call, tensors: Mapping[str, Tensor], operand: Value, cotangent: Tensor) -> Tensor:
    """A VJP of a call by one operand."""
    back = torch.func.vjp(lambda u: run(call, {**tensors, operand.name: u}), tensors[operand.name])[1]
    found: Tensor = back(cotangent)[0]
    return found


def _gives(vjp: Callable[[Tensor], Tensor], cotangents: Tensor, want: Tensor) -> bool:
    """Whether vmap over the columns, and a call for the first of them, are right."""
    try:
        with UNWARNED:
            return _close(torch.func.vmap(vjp)(cotangents), want) and _close(vjp(cotangents[0]), want[0])
    except RuntimeError:  # an operator that vmap does not know, or that draws numbers
        return False


def _sums(call: Call, tensors: Mapping[str, Tensor], operand: Value, cotangents: Tensor, single: Tensor) -> bool:
    """Whether the VJP of the batch is the sum over its samples."""
    try:
        whole = _pulled(call, tensors, operand, cotangents[0].movedim(0, place_of(call.output)))
    except RuntimeError:
        return False
    return _close(whole, single[0].sum(0))


def _close(one: Tensor, other: Tensor) -> bool:
    """Up to rounding: kernels add up in another order where there is something else beside."""
    if not one.is_floating_point():
        return torch.equal(one, other)
    bound = torch.finfo(other.dtype).eps ** 0.5 * other.abs().nan_to_num(0, 0, 0).amax() if other.numel() else 0
    return torch.allclose(one, other, rtol=0, atol=float(bound), equal_nan=True)
