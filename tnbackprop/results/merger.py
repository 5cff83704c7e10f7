"""The merger: results of one batch after the other become that of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, Self, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compiler.merge.join import Join, Mean, Merging, Way
from ..errors import InputError
from ..linalg import KroneckerFactors
from .batch import Batch

Place = tuple[str, str, int]
"""Quantity, parameter and factor; ("", "", k) is output k."""


class Whole(Protocol):
    """What a `Result` is here: values of a batch, and how they join."""

    loss: Tensor | None
    output: Any
    batch: Batch | None
    own: Mapping[str, Mapping[str, Any]]

    @property
    def some(self) -> Mapping[tuple[int, ...], Self]: ...

    def with_values(
        self,
        loss: Tensor | None,
        output: Any,
        values: Mapping[str, Mapping[str, Any]],
        batch: Batch | None,
        some: Mapping[tuple[int, ...], Self] | None = None,
    ) -> Self: ...


R = TypeVar("R", bound=Whole)


@dataclass(frozen=True)
class Size:
    """So many samples; `kept`: what the loss divides by, of a mean over what is kept."""

    count: int
    kept: Tensor | None

    def __add__(self, other: Size) -> Size:
        kept = None if self.kept is None or other.kept is None else self.kept + other.kept
        return Size(self.count + other.count, kept)


class Scaling:
    """From a value of some samples to what it is of all: N^power s^loss, s = N^scale, or N^(scale + 1) / kept."""

    def __init__(self, merging: Merging, part: Size, whole: Size) -> None:
        self.part, self.whole, self._merging = part, whole, merging
        self._known: dict[tuple[float, float], float | Tensor] = {}

    def __call__(self, power: float, loss: float) -> float | Tensor:
        if (power, loss) not in self._known:
            self._known[power, loss] = self._factor(power, loss)
        return self._known[power, loss]

    def _factor(self, power: float, loss: float) -> float | Tensor:
        part, whole = self.part, self.whole
        exponent = power + (self._merging.scale + self._merging.divided) * loss
        number: float = (whole.count / part.count) ** exponent if exponent else 1.0
        if part.kept is None or whole.kept is None or not loss:
            return number
        ratio = torch.where(whole.kept == 0, torch.zeros_like(whole.kept), part.kept / whole.kept)
        found: Tensor = ratio.pow(loss) * number
        return found


class Merger(Generic[R]):
    """Takes results of batches, each of the same program: those before are one result at every moment.

    What adds up is added in place, to memory of its own; what has an axis of samples is collected, and put together
    once. A result that does not fit changes nothing.
    """

    def __init__(self, first: R, own: bool = False) -> None:
        """
        own  nobody else holds the first result: its tensors may be written over
        """
        self._first, self._batch, self._own = first, batch_of(first), own
        self._some = {samples: Merger(each, own) for samples, each in first.some.items()}
        self._check_ways()
        self._size = _size(first, self._batch)
        self._loss = first.loss
        self._sums: dict[Place, Tensor] = {}
        self._rows: dict[Place, list[tuple[Tensor, Size]]] = {}
        for place, join, tensor in _tensors(first, self._batch):
            if join.way is Way.ROWS:
                self._rows[place] = [(tensor, self._size)]
            else:
                self._sums[place] = tensor

    def add(self, other: R) -> None:
        """Take one more. Raises `InputError` where it is not of the same program."""
        self._check(other)
        for samples, each in other.some.items():
            self._some[samples].add(each)
        batch = batch_of(other)
        size = _size(other, batch)
        total = self._size + size
        new = {place: (join, tensor) for place, join, tensor in _tensors(other, batch)}
        if not self._own:
            self._sums, self._own = {place: tensor.clone() for place, tensor in self._sums.items()}, True
        before, now = (Scaling(self._batch.merging, each, total) for each in (self._size, size))
        for place, (join, tensor) in new.items():  # they read means of before
            if join.mean is not None:
                means = self._sums[join.mean.of, place[1], 0], new[join.mean.of, place[1], 0][1]
                _add_moments(join.mean, (self._sums[place], tensor), means, (before, now))
        for place, (join, tensor) in new.items():
            if join.way is Way.ROWS:
                self._rows[place].append((tensor, size))
            elif join.way is Way.SUM:
                _add(self._sums[place], before(join.power, join.loss), tensor, now(join.power, join.loss))
        self._loss = self._loss_of(other, before, now)
        self._size = total

    def _loss_of(self, other: R, before: Scaling, now: Scaling) -> Tensor | None:
        if self._loss is None or other.loss is None:
            return None
        found = []
        for value, factors in ((self._loss, before), (other.loss, now)):
            part, kept = _times(value, factors(0.0, 1.0)), factors.part.kept
            found.append(part if kept is None else torch.where(kept == 0, torch.zeros_like(part), part))
        return found[0] + found[1]

    def result(self) -> R:
        """That of all so far."""
        first = self._first
        values = {q: {name: self._value(q, name, v) for name, v in by.items()} for q, by in first.own.items()}
        leaves, spec = pytree.tree_flatten(first.output)
        tensors = iter(range(len(leaves)))
        output = [self._tensor(("", "", next(tensors))) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        batch = replace(self._batch, count=self._size.count, average=None, kept=self._size.kept)
        loss = None if self._loss is None else self._loss.clone()
        some = {samples: each.result() for samples, each in self._some.items()}
        return first.with_values(loss, pytree.tree_unflatten(output, spec), values, batch, some)

    def _value(self, quantity: str, name: str, value: Any) -> Any:
        if not isinstance(value, KroneckerFactors):
            return self._tensor((quantity, name, 0))
        factors = tuple(self._tensor((quantity, name, k)) for k in range(len(value.factors)))
        return replace(value, factors=factors)

    def _tensor(self, place: Place) -> Tensor:
        if place in self._sums:
            mine = self._sums[place]
            return mine if self._own and self._join(place).way is not Way.SAME else mine.clone()
        join, merging = self._join(place), self._batch.merging
        rows = ((tensor, Scaling(merging, size, self._size)) for tensor, size in self._rows[place])
        return torch.cat([_times(tensor, factors(join.power, join.loss)) for tensor, factors in rows], join.axis)

    def _join(self, place: Place) -> Join:
        quantity, name, k = place
        if quantity:
            return self._batch.merging.joins[quantity][name][k]
        return _outputs(self._batch, self._first.output)[k]

    # Checks, before anything is changed.

    def _check_ways(self) -> None:
        merging = self._batch.merging
        for quantity, by in merging.joins.items():
            for name, joins in by.items():
                for join in joins:
                    if join.way is Way.REFUSED:
                        raise InputError(f"{quantity!r} of {name!r} cannot be merged: {_told(join.why)}.")
        if merging.loss.way is Way.REFUSED:
            remedy = "Write it as a mean or a sum over samples."
            raise InputError(f"the loss cannot be merged: {merging.loss.why}.\n  {remedy}")
        for join in _outputs(self._batch, self._first.output):
            if join.way is Way.REFUSED:
                raise InputError(f"the output cannot be merged: {join.why}.\n  Return it without, or merge by hand.")

    def _check(self, other: R) -> None:
        mine, theirs = self._batch, batch_of(other)
        for quantity in {**mine.made, **theirs.made}:
            one, two = (each.made.get(quantity, "not there") for each in (mine, theirs))
            if one != two:
                told = f"{quantity!r} is {one} in one result and {two} in the other"
                raise InputError(f"{told}: merge those of one program")
        if mine.merging != theirs.merging:
            raise InputError("the results are of programs with other losses or models: merge those of one program")
        if (self._loss is None) != (other.loss is None):
            raise InputError("one of the results has no loss: merge those of one program")
        if list(self._some) != list(other.some):
            raise InputError(f"the results are of samples {list(self._some)} and {list(other.some)}: merge those alike")
        self._check_values(other)
        self._check_even(other)
        for samples, each in other.some.items():
            self._some[samples]._check(each)

    def _check_values(self, other: R) -> None:
        for quantity, one in self._first.own.items():
            two = other.own[quantity]
            if list(one) != list(two):
                raise InputError(f"{quantity!r} is of {list(one)} in one result and of {list(two)} in the other")
            for name, value in one.items():
                _check_alike(value, two[name], self._batch.merging.joins[quantity][name], f"{quantity!r} of {name!r}")
        leaves, spec = pytree.tree_flatten(self._first.output)
        others, theirs = pytree.tree_flatten(other.output)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        more = [leaf for leaf in others if isinstance(leaf, Tensor)]
        joins = _outputs(self._batch, self._first.output)
        if spec != theirs or len({len(tensors), len(more), len(joins)}) > 1:
            raise InputError("the outputs of the results have different structures: merge those of one program")
        for leaf, another, join in zip(tensors, more, joins, strict=True):
            _check_alike(leaf, another, (join,), "the output")
            if join.way is Way.SAME and not torch.equal(leaf, another):
                raise InputError("an output that no sample is in differs between the results: the model has changed")

    def _check_even(self, other: R) -> None:
        joins = self._batch.merging.joins
        every = ((f"{q!r} of {name!r}", each) for q, by in joins.items() for name, each in by.items())
        even = next((what for what, each in every if any(join.even for join in each)), None)
        even = "the loss" if self._batch.merging.loss.even else even
        size = _size(other, batch_of(other))
        if even is None or size.kept is None or self._size.kept is None:
            return
        one, two = self._size.kept / self._size.count, size.kept / size.count
        if not torch.isclose(one, two, rtol=1e-6):
            raise InputError(
                f"{even} cannot be merged: the loss has a mean over the kept labels, and these count as "
                f"{float(one):.3g} and {float(two):.3g} of each sample in two batches.\n"
                "  Compile with a loss that sums."
            )


def _told(why: str) -> str:
    remedy = "Leave it to a program of its own, or compute it of all samples in one batch"
    return why if "\n" in why else f"{why}.\n  {remedy}"


def batch_of(result: Whole) -> Batch:
    """What it was computed of. Raises `InputError` where nobody knows."""
    if result.batch is None:
        raise InputError("this result does not know what it was computed of: merge those that a program returns")
    return result.batch


def _size(result: Whole, batch: Batch) -> Size:
    return Size(batch.count, batch.divisor(result.loss))


def _outputs(batch: Batch, output: Any) -> list[Join]:
    """Of the tensors of the output; a backward half has none."""
    if output is None:
        return []
    return [join for join in batch.merging.outputs if join is not None]


def _tensors(result: Whole, batch: Batch) -> Iterator[tuple[Place, Join, Tensor]]:
    """Every tensor of a result with how it joins."""
    for quantity, by in result.own.items():
        for name, value in by.items():
            tensors = value.factors if isinstance(value, KroneckerFactors) else (value,)
            for k, (tensor, join) in enumerate(zip(tensors, batch.merging.joins[quantity][name], strict=True)):
                yield (quantity, name, k), join, tensor
    leaves = [leaf for leaf in pytree.tree_leaves(result.output) if isinstance(leaf, Tensor)]
    for k, (leaf, join) in enumerate(zip(leaves, _outputs(batch, result.output), strict=True)):
        yield ("", "", k), join, leaf


def _times(tensor: Tensor, factor: float | Tensor) -> Tensor:
    return tensor if isinstance(factor, float) and factor == 1.0 else tensor * factor


def _add(mine: Tensor, before: float | Tensor, other: Tensor, now: float | Tensor) -> None:
    """mine = before · mine + now · other, in place."""
    if isinstance(before, Tensor) or before != 1.0:
        mine.mul_(before)
    if isinstance(now, Tensor):
        mine.addcmul_(other, now.to(mine.dtype))
    elif now == 1.0:
        mine.add_(other)  # whole numbers have no other factor
    else:
        mine.add_(other, alpha=now)


def _add_moments(
    mean: Mean, values: tuple[Tensor, Tensor], means: tuple[Tensor, Tensor], factors: tuple[Scaling, Scaling]
) -> None:
    """c Σ (x - x̄)² of both, and c N₁ N₂ / N of the squared distance of their means, into the first."""
    power, loss = mean.degree
    before, now = (each(mean.power + 2 * power, 2 * loss) for each in factors)
    _add(values[0], before, values[1], now)
    counts = [each.part.count for each in factors]
    one, two = (
        each(power, loss) * (mean.over * count**-mean.less) for each, count in zip(factors, counts, strict=True)
    )
    distance = means[0] * one
    _add(distance, 1.0, means[1], -two)
    total = factors[0].whole.count
    weight: float = mean.factor * total**mean.power * counts[0] * counts[1] / total
    values[0].addcmul_(distance, distance, value=weight)


def _check_alike(one: Any, two: Any, joins: tuple[Join, ...], what: str) -> None:
    if type(one) is not type(two):
        raise InputError(f"{what} is {type(one).__name__} in one result and {type(two).__name__} in the other")
    pairs = zip(one.factors, two.factors, strict=True) if isinstance(one, KroneckerFactors) else ((one, two),)
    for (mine, theirs), join in zip(pairs, joins, strict=True):
        if (mine.dtype, mine.device) != (theirs.dtype, theirs.device):
            raise InputError(
                f"{what} is {mine.dtype} on {mine.device} in one result and {theirs.dtype} on {theirs.device} in the "
                "other: convert one, result.to(device, dtype)"
            )
        shapes = [list(each.shape) for each in (mine, theirs)]
        for shape in shapes if join.way is Way.ROWS else ():
            del shape[join.axis : join.axis + 1]
        if shapes[0] != shapes[1]:
            raise InputError(f"{what} is {list(mine.shape)} in one result and {list(theirs.shape)} in the other")
