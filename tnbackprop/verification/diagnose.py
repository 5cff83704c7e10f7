"""The likely cause of a difference: what a person would look for, tried in the order of how telling it is.

`got` is what the text says, `want` what torch.func finds; both have one axis per leg.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

import torch
from torch import Tensor

from ..definitions.report import wrong_entries

Numbers = Mapping[str, float]
Look = Callable[[Tensor, Tensor, Sequence[str], Numbers], str]
SHIFTS = (1, -1, 2, -2, 3, -3)


def likely(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    """The first cause that explains every entry; "" where none does.

    axes     the name of each axis, for the text
    numbers  what a missing or wrong factor may be: sizes of legs (capitals), constants, options of the module
    """
    found = (look(got, want, axes, numbers) for look in LOOKS)
    return next((cause for cause in found if cause), "")


def same(got: Tensor, want: Tensor) -> bool:
    """One shape, and no wrong entry."""
    return got.shape == want.shape and not bool(wrong_entries(got, want).any())


def _not_finite(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    bad = ~torch.isfinite(got) & torch.isfinite(want)
    return "it is not finite there: a division by zero, or an overflow in a branch" if bad.any() else ""


def _zero(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    if not got.any():
        return "it is zero everywhere: a term or an operand is missing"
    return "it must be zero everywhere: this term does not belong here" if not want.any() else ""


def _sign(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    return "wrong sign: every entry is the opposite of what it must be" if same(got, -want) else ""


def _factor(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    if not want.any():
        return ""
    ratio = float((got * want).sum() / want.square().sum())
    if ratio == 0 or not same(got / ratio, want):
        return ""
    return f"wrong factor: every entry is {ratio:.6g} times what it must be{_named(ratio, numbers)}"


def _named(ratio: float, numbers: Numbers) -> str:
    """Which number the factor is."""
    large = " or ".join(name for name, value in numbers.items() if value not in (0, 1) and _near(ratio, value))
    small = " or ".join(name for name, value in numbers.items() if value not in (0, 1) and _near(ratio * value, 1))
    if large:
        mean = " (as in a mean)" if large[0].isupper() else ""
        return f", and that is {large}: a division by {large} is missing{mean}, or the factor is one too many"
    return (
        f", and that is 1/{small}: the factor {small} is missing, or it is divided by once too often" if small else ""
    )


def _near(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9 * max(abs(one), abs(other), 1.0)


def _exchanged(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    for a, b in combinations(range(got.ndim), 2):
        if got.shape[a] == got.shape[b] > 1 and same(got.transpose(a, b), want):
            return f"transposed: legs {axes[a]} and {axes[b]} are exchanged"
    return ""


def _constant(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    for k, size in enumerate(got.shape):
        flat, wanted = (_constant_along(t, k) for t in (got, want))
        if size > 1 and flat and not wanted:
            return f"missing leg: it does not vary along {axes[k]}, and it must"
        if size > 1 and wanted and not flat:
            return f"extra leg: it varies along {axes[k]}, and it must not"
    return ""


def _constant_along(tensor: Tensor, axis: int) -> bool:
    return same(tensor, tensor.narrow(axis, 0, 1).expand_as(tensor))


def _joined(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    """Legs that are one leg on one side and two on the other: zero off their diagonal, or not."""
    for a, b in combinations(range(got.ndim), 2):
        if got.shape[a] != got.shape[b] or got.shape[a] == 1:
            continue
        one, other = (_off_diagonal(t, a, b) for t in (got, want))
        if one and not other:
            return (
                f"missing leg: entries with different {axes[a]} and {axes[b]} must be zero, "
                "so these are one leg (or a delta is missing)"
            )
        if other and not one:
            return f"one leg too few: {axes[a]} and {axes[b]} are tied, and they must be two legs"
    return ""


def _off_diagonal(tensor: Tensor, a: int, b: int) -> bool:
    """Whether an entry off the diagonal of two axes is not zero."""
    rows = torch.arange(tensor.shape[a])
    mask = rows.view([-1 if k == a else 1 for k in range(tensor.ndim)]) != rows.view(
        [-1 if k == b else 1 for k in range(tensor.ndim)]
    )
    return bool((tensor * mask).any())


def _moved(got: Tensor, want: Tensor, axes: Sequence[str], numbers: Numbers) -> str:
    for k, size in enumerate(got.shape):
        for step in (s for s in SHIFTS if abs(s) < size - 1):
            length = size - abs(step)
            one = got.narrow(k, max(step, 0), length)
            other = want.narrow(k, max(-step, 0), length)
            if bool(other.any()) and same(one, other):
                return f"wrong offset: it is right when moved by {-step:+d} along {axes[k]} (padding, stride or index)"
    return ""


LOOKS: tuple[Look, ...] = (_not_finite, _zero, _sign, _factor, _exchanged, _joined, _constant, _moved)


def moved_operands(value: Tensor, axes: Sequence[int]) -> Iterator[tuple[str, Tensor]]:
    """The operand moved along each axis, with zeros where nothing comes in, and what that means."""
    for k in axes:
        size = value.shape[k]
        for step in (s for s in SHIFTS if abs(s) < size):
            moved = torch.zeros_like(value)
            length = size - abs(step)
            moved.narrow(k, max(step, 0), length).copy_(value.narrow(k, max(-step, 0), length))
            yield f"its index is off by {-step:+d} along axis {k}", moved


def exchanged_operands(value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The operand with two axes of one size exchanged."""
    for a, b in combinations(range(value.ndim), 2):
        if value.shape[a] == value.shape[b] > 1:
            yield f"axes {a} and {b}", value.transpose(a, b).contiguous()
