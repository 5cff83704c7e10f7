"""torch.export takes the batch size for two or more: whether its graph holds for one sample is seen by running it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx import Interpreter
from torch.utils import _pytree as pytree

from ...errors import UnsupportedError
from ..running.magnitudes import largest, largest_difference
from ..translate.foreign import MISTAKES
from ..translate.opaque import NAMESPACE, named_tensors
from ..translate.sizes import TRIED, first_broken
from ..translate.torch_internals import OpOverload, arguments_of, name_of
from .exported import Exported
from .state import copied, resized

FAILURES = (RuntimeError, AssertionError, *MISTAKES)
TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-3}
"""How much the graph and the model may differ, relative to the largest value; 5e-2 for the shorter dtypes."""


def least_batch(wrapped: nn.Module, exported: Exported, example: tuple[Any, Any]) -> int:
    """1 where the graph gives for one sample what the model gives, and 2 where not.

    Where the model takes no single sample, there is nothing to compare. Raises `UnsupportedError` where the graph
    differs from the model for other batches, too, or has parts that were not traced and is not compared.
    """
    sizes = [size for size in TRIED if first_broken(exported.conditions, size) is None]
    nothing = not exported.repeated  # what is to be said where nothing can be compared
    one = _agree(wrapped, exported, example, 1) if 1 in sizes else False
    if one or (one is None and nothing):
        return 1
    several = _agree(wrapped, exported, example, next(size for size in sizes if size > 1))
    if several or (several is None and nothing):
        return 1 if one is None else 2
    nodes = exported.program.graph.nodes
    if nothing and any(torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) for node in nodes):
        return 1  # the two may draw in another order
    raise UnsupportedError(
        "the graph that torch.export makes does not give what the model gives on the example, or has other gradients: "
        "forward may depend on more than its inputs and tensors (random numbers that are not torch's, a counter), or "
        "have an autograd.Function without a gradient.\n"
        "  Make the former an input or a buffer, and detach() what the latter returns."
    )


def _agree(wrapped: nn.Module, exported: Exported, example: tuple[Any, Any], size: int) -> bool | None:
    """Whether the graph gives what the model gives on some samples, and its gradients; both draw from one seed.

    None where the model does not take so many.
    """
    try:
        want = _values(wrapped, wrapped, resized(example, size))
    except FAILURES:
        return None
    try:
        got = _values(wrapped, _Replay(wrapped, exported).results, resized(example, size))
    except FAILURES:  # a guard on the batch size is one such failure
        return False
    return all(map(_close, got, want))


def _values(wrapped: nn.Module, function: Callable[..., Any], samples: tuple[Any, Any]) -> tuple[list[Any], list[Any]]:
    """The loss and the outputs; the gradients of their sum with some weights."""
    with copied(wrapped):
        torch.manual_seed(0)
        values = pytree.tree_leaves(function(*samples))
        ends = [v.flatten() for v in values if isinstance(v, Tensor) and v.requires_grad]
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        if not ends or not parameters:
            return values, []
        weights = [torch.arange(1, len(v) + 1, device=v.device).cos().to(v.dtype) for v in ends]
        options = {"allow_unused": True, "materialize_grads": True}
        return values, list(torch.autograd.grad(ends, parameters, weights, **options))


def _close(got: Sequence[Any], want: Sequence[Any]) -> bool:
    """The same numbers; an axis of one sample may have been squeezed out. Small next to the others is small."""
    if [isinstance(a, Tensor) and a.numel() for a in got] != [isinstance(b, Tensor) and b.numel() for b in want]:
        return False
    both = zip(got, want, strict=True)
    pairs = [(_flat(a), _flat(b)) for a, b in both if isinstance(a, Tensor)]
    sizes = [_size(b) for _, b in pairs]
    most = max(sizes, default=0.0)
    for (a, b), size in zip(pairs, sizes, strict=True):
        share = max(1e-2, 16 * torch.finfo(b.dtype).eps) if b.is_floating_point() else 1e-2
        tolerance = TOLERANCES.get(b.dtype, 5e-2) * (size + share * most)
        near = b.is_floating_point() and largest_difference(a.to(b.dtype), b) <= tolerance
        if not near and not torch.allclose(a.to(b.dtype), b, rtol=0, atol=tolerance, equal_nan=True):
            return False
    return True


def _flat(tensor: Tensor) -> Tensor:
    """Its elements; a gradient may be sparse."""
    tensor = tensor.detach()
    return (tensor if tensor.layout == torch.strided else tensor.to_dense()).flatten()


def _size(tensor: Tensor) -> float:
    """The largest finite value."""
    if tensor.is_floating_point() and (found := largest(tensor)) < torch.inf:
        return found
    finite = (tensor.int() if tensor.dtype == torch.bool else tensor)[tensor.isfinite()].abs()
    return float(finite.max()) if finite.numel() else 0.0


class _Replay(Interpreter):
    """Runs an exported program on tensors; what has a rule runs as it is."""

    def __init__(self, wrapped: nn.Module, exported: Exported) -> None:
        super().__init__(exported.program.graph_module)
        self.wrapped, self.exported, self.opaque = wrapped, exported.program, exported.opaque

    def results(self, *example: Any) -> list[Any]:
        """The loss and the outputs."""
        signature, tables = self.exported.graph_signature, named_tensors(self.wrapped)
        leaves = iter(pytree.tree_leaves(example))
        given = [
            next(leaves)
            if spec.kind is InputKind.USER_INPUT
            else tables[str(spec.target)]
            if spec.target in tables
            else self.exported.constants[str(spec.target)]
            for spec in signature.input_specs
        ]
        found = self.run(*given)
        return [v for v, spec in zip(found, signature.output_specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT]

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is torch.ops.aten.copy.default:  # which has no derivative
            return torch.empty_like(args[0]).copy_(args[1])
        if not isinstance(target, OpOverload) or target.namespace != NAMESPACE:
            return super().call_function(target, args, kwargs)
        opaque = self.opaque[name_of(target)[0]]
        named = dict(zip((a.name for a in arguments_of(target)), args, strict=False)) | kwargs
        own, options = opaque.called(named["site"], named["inputs"])
        return opaque.function(*own, **options)
