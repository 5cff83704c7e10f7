"""Agreement: whether two plans of one program give the same results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..diagram.core import N, Size
from ..errors import InputError

SAMPLES = 2
"""At least so many are compared, where there are so many: what is wrong between samples is right for one."""
SEED = 0


def disagreement(one: Callable[[], Any], other: Callable[[], Any], device: torch.device) -> str:
    """Why the other is of no use: it fails, or gives other numbers with the same random ones inside; "" if neither.

    Rounding: half of the digits of the dtype, relative to the largest number of a tensor.
    """
    found: list[dict[str, Tensor]] = []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for run in (one, other):
            torch.manual_seed(SEED)
            try:
                leaves = pytree.tree_flatten_with_path(run())[0]
            except InputError as error:
                if run is one:
                    raise
                return f"it fails: {str(error).splitlines()[0]}"
            found.append({pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)})
    first, second = found
    same = first.keys() == second.keys() and all(_close(leaf, second[path]) for path, leaf in first.items())
    return "" if same else "its results differ from those of the plan for the example"


def first_samples(tensor: Tensor, shape: Sequence[Size], count: int) -> Tensor:
    """The tensor for so many samples of the batch."""
    for axis, size in enumerate(shape):
        tensor = tensor.narrow(axis, 0, count) if size == N else tensor
    return tensor.contiguous() if any(size == N for size in shape) else tensor


def _close(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    finite = one.isfinite()
    size = one.where(finite, 0).abs().max()
    near = (one - other).abs() <= torch.finfo(one.dtype).eps ** 0.5 * size
    return bool((near | (one == other) | (one.isnan() & other.isnan())).all())
