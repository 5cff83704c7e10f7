"""What a result was computed of: how many samples, and how its values join those of other batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.serialization import add_safe_globals

from ..compiler.merge.join import Join, Mean, Merging, Way


@dataclass(frozen=True)
class Batch:
    """The samples of a result, of one batch or several.

    count    how many there are
    merging  how values join
    made     every quantity with its options, to tell results of different programs
    average  what the loss is divided by besides N; None: nothing
    kept     the same times N, of several batches
    """

    count: int
    merging: Merging
    made: Mapping[str, str]
    average: Tensor | None = None
    kept: Tensor | None = None

    def divisor(self, loss: Tensor | None) -> Tensor | None:
        """What the loss is divided by in all: of class labels the sum of the weights of the kept ones."""
        if self.kept is not None or self.average is None:
            return self.kept
        found = self.average * self.count
        if loss is None:
            return found
        # of a batch without a label the loss is 0/0, and everything else is divided by 1
        return torch.where(loss.isnan() & (found.round() == 1), torch.zeros_like(found), found)

    def moved(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """With its tensors on another device or in another dtype."""
        average, kept = (None if each is None else function(each) for each in (self.average, self.kept))
        return replace(self, average=average, kept=kept)

    def plain(self) -> dict[str, Any]:
        """All of it as numbers, texts, lists and tensors."""
        merging = self.merging
        joins = {q: {name: [_plain(j) for j in own] for name, own in by.items()} for q, by in merging.joins.items()}
        return {
            "count": self.count,
            "made": dict(self.made),
            "average": self.average,
            "kept": self.kept,
            "joins": joins,
            "loss": _plain(merging.loss),
            "outputs": [each and _plain(each) for each in merging.outputs],
            "scale": merging.scale,
            "divided": merging.divided,
        }

    @classmethod
    def of_plain(cls, state: Mapping[str, Any]) -> Batch:
        """What `plain` was taken of."""
        joins = {q: {name: tuple(map(_join, own)) for name, own in by.items()} for q, by in state["joins"].items()}
        outputs = tuple(each and _join(each) for each in state["outputs"])
        merging = Merging(joins, _join(state["loss"]), outputs, state["scale"], state["divided"])
        return cls(state["count"], merging, state["made"], state["average"], state["kept"])


def _plain(join: Join) -> list[Any]:
    return [join.way.value, join.power, join.loss, join.axis, join.even, join.mean and _listed(join.mean), join.why]


def _listed(mean: Mean) -> list[Any]:
    *numbers, degree = astuple(mean)
    return [*numbers, list(degree)]


def _join(state: Any) -> Join:
    way, power, loss, axis, even, mean, why = state
    of = None
    if mean is not None:
        name, factor, exponent, over, less, degree = mean
        of = Mean(name, factor, exponent, over, less, tuple(degree))
    return Join(Way(way), power, loss, axis, even, of, why)


def shown(value: Any) -> str:
    """A quantity with its options as a text that is the same in every process."""
    if is_dataclass(value) and not isinstance(value, type):
        rows = (f"{each.name}={shown(getattr(value, each.name))}" for each in fields(value))
        return f"{type(value).__qualname__}({', '.join(rows)})"
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{shown(k)}: {shown(v)}' for k, v in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    named = getattr(value, "__qualname__", None)
    return repr(value) if named is None else str(named)


add_safe_globals([Batch, Merging, Join, Mean, Way])  # what torch.load takes as it is
