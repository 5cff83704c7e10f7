"""The result: a mapping from quantity name to {parameter name: value}."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, overload

import torch
from torch.serialization import add_safe_globals
from torch.utils import _pytree as pytree

from ..errors import InputError
from ..linalg import KroneckerFactors
from .batch import Batch
from .merger import Merger

Tensors = Literal[
    "grad", "batch_grad", "batch_l2", "batch_dot", "second_moment", "variance", "sqrt_ggn", "sqrt_ggn_mc", "diag_ggn",
    "diag_ggn_mc", "ggn_trace", "ggn_gram", "hessian_diag", "hesscale", "bl89", "jacobians", "ntk",
]  # fmt: skip
Matrices = Literal["kflr", "kfac", "kfra"]
"""For type checkers: what the values of the built-in quantities are under their own names."""


@dataclass(frozen=True)
class Axes:
    """Of the values of a quantity: so many of samples and columns, then the `parameter`'s own or none."""

    lead: int
    parameter: bool


class Result(Mapping[str, Mapping[str, Any]]):
    """``result["variance"]["features.0.weight"]``, ``result.loss``, ``result.output``.

    The output is in the structure in which the model returns it. None is in the place of what mixes samples and the
    loss does not read (``program.explain("capture")`` says what is left out), and an object of a class of the user's
    own is a namespace of its fields.
    """

    def __init__(
        self,
        loss: torch.Tensor | None,
        output: Any,
        values: Mapping[str, Mapping[str, Any]],
        axes: Mapping[str, Axes | None] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        batch: Batch | None = None,
        some: Mapping[tuple[int, ...], Result] | None = None,
    ) -> None:
        """
        axes    of every quantity's values; None where they are no tensors, or not alike for all parameters
        shapes  of the model's parameters, in their order
        batch   what it was computed of; None: nobody knows, and it is not merged
        some    the results of quantities of some samples, by these: they are found as if they were this one's own
        """
        self.loss, self.output, self.own, self.some = loss, output, values, some or {}
        self._axes, self._shapes, self.batch = axes or {}, shapes or {}, batch
        self._values = {**values, **{quantity: each[quantity] for each in self.some.values() for quantity in each}}
        for each in self.some.values():
            self._axes = {**self._axes, **each._axes}

    @property
    def count(self) -> int | None:
        """The number of samples that it was computed of; None where nobody knows."""
        return None if self.batch is None else self.batch.count

    @overload
    def __getitem__(self, quantity: Tensors) -> Mapping[str, torch.Tensor]: ...

    @overload
    def __getitem__(self, quantity: Matrices) -> Mapping[str, KroneckerFactors]: ...

    @overload
    def __getitem__(self, quantity: str) -> Mapping[str, Any]: ...

    def __getitem__(self, quantity: str) -> Mapping[str, Any]:
        try:
            return self._values[quantity]
        except KeyError:
            known = ", ".join(self._values) or "none"
            raise InputError(f"no quantity {quantity!r} in this result; it has: {known}") from None

    def __contains__(self, quantity: object) -> bool:
        return quantity in self._values

    def get(self, quantity: str, default: Any = None) -> Any:
        """The quantity's values, or `default` where this result has none."""
        return self._values.get(quantity, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def flat(self, quantity: str) -> torch.Tensor:
        """The values of all parameters flattened, one after the other in the order of `named_parameters`.

        [P] for a quantity with values [*p], [N, P] for [N, *p], [V, N, P] for [V, N, *p]. P are the elements of the
        parameters that the quantity has values of: trainable ones, a tied one once. Raises `InputError` where the
        values do not have the parameters' axes, are matrices, or differ in dtype or device.
        """
        values, axes = self[quantity], self._axes.get(quantity)
        if axes is None or not axes.parameter:
            self._refuse(quantity, "no tensors with the parameters' own axes", "total(quantity) adds up numbers")
        ordered = [values[name] for name in self._shapes if name in values]
        kinds = {(value.dtype, value.device) for value in ordered}
        if len(kinds) > 1:
            shown = ", ".join(sorted(f"{dtype} on {device}" for dtype, device in kinds))
            raise InputError(f"{quantity!r} has values in {shown}: convert them first, result.to(dtype=…).flat(…)")
        return torch.cat(
            [value.flatten(axes.lead) if value.ndim > axes.lead else value[..., None] for value in ordered], -1
        )

    def total(self, quantity: str) -> torch.Tensor:
        """The sum over all parameters of values that are numbers for each: [N], [N, N], [V, N, V, N], ….

        Of `BatchL2` the squared norms of whole individual gradients, of `BatchDot` and `GGNGram` whole Gram matrices,
        of `NTK` the kernel, of `GGNTrace` traces. Raises `InputError` for values with the parameters' own axes.
        """
        values, axes = self[quantity], self._axes.get(quantity)
        if axes is None or axes.parameter or not values:
            self._refuse(quantity, "no numbers that add up over parameters", "flat(quantity) puts tensors together")
        first, *others = values.values()
        found: torch.Tensor = first.clone()
        for value in others:
            found = found + value.to(found.device)
        return found

    def _refuse(self, quantity: str, what: str, remedy: str) -> NoReturn:
        shown = {
            name: repr(value) if isinstance(value, KroneckerFactors) else list(getattr(value, "shape", ()))
            for name, value in self[quantity].items()
        }
        name = next(iter(shown), None)
        values = "no parameter" if name is None else f"{shown[name]} for {name!r}"
        raise InputError(f"{quantity!r} has {what}: its value is {values}; {remedy}, result[quantity] has them by name")

    def merge(self, other: Result) -> Result:
        """The result of both batches together, as if they had been one, in memory of its own.

        How each value joins follows from its formula: what has the samples on an axis is put one after the other, sums
        add up, means count by samples; of a mean over the kept labels by these. Neither result changes.
        Merge as many as you like, in any order; `tn.over` does it for all batches of a loader.

        Raises `InputError` for what two batches do not tell (pairs of samples), and for results of other programs,
        options, dtypes or shapes. That the parameters, and operands without samples, were the same is up to you.
        """
        if not isinstance(other, Result):
            raise InputError(f"merge: {type(other).__name__} is no tn.Result: give what a program returns")
        merger = Merger(self)
        merger.add(other)
        return merger.result()

    def to(self, device: torch.device | torch.dtype | str | None = None, dtype: torch.dtype | None = None) -> Result:
        """The result on a device, and its real numbers in a dtype; whole numbers and masks keep theirs.

        A dtype alone may come first, as for tensors: ``result.to(torch.float64)``.
        """
        if isinstance(device, torch.dtype) and dtype is None:
            device, dtype = None, device
        try:
            place = None if device is None else torch.device(device)  # type: ignore[arg-type]
        except (RuntimeError, TypeError) as error:
            raise InputError(f"{device!r} is no device: give a device, result.to('cpu'), a dtype, or both") from error

        def moved(value: Any) -> Any:
            if isinstance(value, KroneckerFactors):
                return value.to(dtype, device=place)
            if isinstance(value, torch.Tensor):
                return value.to(device=place, dtype=dtype if value.is_floating_point() else None)
            return value

        return self._mapped(moved, pytree.tree_map(moved, self.output))

    def _mapped(self, function: Callable[[Any], Any], output: Any) -> Result:
        values = {quantity: {name: function(v) for name, v in by.items()} for quantity, by in self.own.items()}
        batch = self.batch and self.batch.moved(function)
        some = {samples: each._mapped(function, each.output) for samples, each in self.some.items()}
        return self.with_values(None if self.loss is None else function(self.loss), output, values, batch, some)

    def with_values(
        self,
        loss: torch.Tensor | None,
        output: Any,
        values: Mapping[str, Mapping[str, Any]],
        batch: Batch | None,
        some: Mapping[tuple[int, ...], Result] | None = None,
    ) -> Result:
        """The same quantities of the same model with other values."""
        return Result(loss, output, values, self._axes, self._shapes, batch, some)

    def state_dict(self) -> dict[str, Any]:
        """All of it as a dict of tensors, texts and numbers, for any torch.load; the tensors themselves, no copies."""
        return {
            "loss": self.loss,
            "output": self.output,
            "values": {quantity: {name: _state(v) for name, v in by.items()} for quantity, by in self.own.items()},
            "axes": {quantity: axes and [axes.lead, axes.parameter] for quantity, axes in self._axes.items()},
            "shapes": {name: list(shape) for name, shape in self._shapes.items()},
            "batch": self.batch and self.batch.plain(),
            "some": [[list(samples), each.state_dict()] for samples, each in self.some.items()],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Result:
        """What `state_dict` was taken of. Raises `InputError` where something is missing."""
        if not isinstance(state, Mapping):
            raise InputError(f"the state of a result is a {type(state).__name__}: give what state_dict() gave")
        missing = [key for key in ("loss", "output", "values", "axes", "shapes") if key not in state]
        if missing:
            raise InputError(f"the state of a result has no {missing[0]!r}: give what state_dict() gave")
        return cls(
            state["loss"],
            state["output"],
            {quantity: {name: _of_state(v) for name, v in by.items()} for quantity, by in state["values"].items()},
            {quantity: axes and Axes(*axes) for quantity, axes in state["axes"].items()},
            {name: tuple(shape) for name, shape in state["shapes"].items()},
            Batch.of_plain(state["batch"]) if state.get("batch") else None,
            {tuple(samples): cls.from_state_dict(each) for samples, each in state.get("some", ())},
        )

    def __repr__(self) -> str:
        loss = "" if self.loss is None else f"loss {float(self.loss):.6g}, "
        shown = (f"{q} of {len(by)} parameters" for q, by in self._values.items())
        return f"Result({loss}{', '.join(shown)})"


def _state(value: Any) -> Any:
    return value.state_dict() if isinstance(value, KroneckerFactors) else value


def _of_state(value: Any) -> Any:
    return KroneckerFactors.from_state_dict(value) if isinstance(value, Mapping) else value


add_safe_globals([Axes, Result])  # what torch.load takes as it is
