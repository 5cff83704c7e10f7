"""The product with the matrix of all batches of a loader, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, overload

import torch
from torch import Tensor

from ..compiler.translate.torch_modes import Random
from ..errors import InputError, check_member
from ..runtime.progress import counted
from .parts import Reduction
from .product import CurvatureProduct, Vector

Batch = tuple[Any, Any]


class OverData:
    """v -> M v for the matrix of all batches: ``tn.OverData(partial(tn.ggn_product, model, loss), loader) @ v``.

    M = (1/N) Σ_b N_b M_b for a loss that is a mean over samples, Σ_b M_b for a sum: that of all data in one batch. With
    `count` W_b a batch, M = (1/W) Σ_b W_b M_b, and (N/W²) Σ_b (W_b²/N_b) M_b of an empirical Fisher.

    product    makes the product M_b of a batch (x, y): `ggn_product`, `hessian_product` or `fisher_product`
    loader     batches, run through at each product: a DataLoader, a list; no generator
    reduction  of the loss; told by the batches, each in two parts and with the first one, unless it is given
    count      what a batch counts in a mean, if not its samples: with `ignore_index` or class weights the sum of the
               weights, ``lambda batch: (batch[1] != -100).sum()``
    progress   a bar for the batches

    Vectors as in `CurvatureProduct`. One batch is in memory at a time; its forward pass runs at each product, with the
    parameters as they are then. What torch's own generator draws (shuffling, labels, masks) is the same each time, so
    that M is one matrix. Raises `InputError` where batches, or their number, do not fit.
    """

    def __init__(
        self,
        product: Callable[[Batch], CurvatureProduct],
        loader: Iterable[Any],
        *,
        reduction: Reduction | None = None,
        count: Callable[[Batch], Any] | None = None,
        progress: bool = False,
    ) -> None:
        if isinstance(product, CurvatureProduct) or not callable(product):
            raise InputError(
                f"OverData: {product!r} makes no products; give what does of a batch, "
                "functools.partial(tn.ggn_product, model, loss)"
            )
        if isinstance(loader, Iterator) or not isinstance(loader, Iterable):
            raise InputError(
                f"OverData: a {type(loader).__name__} is not run through again and again; give a DataLoader or a list"
            )
        if reduction is not None:
            check_member("reduction", reduction, Reduction)
        self.product, self.loader, self.count, self.progress = product, loader, count, progress
        self._given = reduction or (None if count is None else Reduction.MEAN)
        self._told, self._samples = self._given, 0
        self._sample: tuple[Any, Any] | None = None  # the first one: the output, and y
        with Random.of(torch.device("cpu")).again():
            self.label, self.names, self.shape, self.dtype, self.device = self._first()
        self._random = Random.of(self.device)

    def _first(self) -> tuple[str, tuple[str, ...], tuple[int, int], torch.dtype, torch.device]:
        """What the first batch tells; or the first ones, of the reduction, where they are single samples."""
        found = None
        for batch in self.loader:
            made = self._made(batch)
            found = found or (made.label, made.names, made.shape, made.dtype, made.device)
            if self._told is None:
                ways = self._ways(made)
                self._told = ways.pop() if len(ways) == 1 else None
            if self._told is not None or made.samples > 1:
                break
        if found is None:
            raise InputError("OverData: the loader gives no batch")
        if self._told is None:
            self._refuse(found[0])
        return found

    def _ways(self, made: CurvatureProduct) -> set[Reduction]:
        """What the loss may be, as a batch tells in two parts and with a sample of the first one."""
        parts = made.parts()
        if parts is None:
            return set()
        first, self._sample = self._sample, self._sample or parts.some(0, 1).values
        return parts.ways(first)

    def _refuse(self, label: str) -> None:
        was = "neither the mean nor the sum of those of its samples, as two parts of a batch tell"
        if self._told is not None:
            was = f"a {self._told.value} over the samples of one batch, and another one does not join with it so"
        raise InputError(
            f"{label} over data: the loss is {was} (class weights, ignore_index, lengths, one sample alone?).\n"
            "  Give reduction=tn.Reduction.MEAN or SUM; and count=, what a batch counts, where that is not its samples"
        )

    def _made(self, batch: Any) -> CurvatureProduct:
        made: object = self.product(batch)
        if not isinstance(made, CurvatureProduct):
            raise InputError(
                f"OverData: the product of a batch is {type(made).__name__}; give what makes a tn.CurvatureProduct"
            )
        return made

    @property
    def T(self) -> Self:
        """Itself: M is symmetric."""
        return self

    @overload
    def __call__(self, vector: Tensor) -> Tensor: ...

    @overload
    def __call__(self, vector: Vector) -> dict[str, Tensor]: ...

    def __call__(self, vector: Tensor | Vector) -> Tensor | dict[str, Tensor]:
        total: list[Tensor] = []
        names: list[str] | None = None
        weights, samples, degree = 0.0, 0, 1
        with self._random.again():
            for batch in counted(self.loader, f"{self.label} over batches") if self.progress else self.loader:
                made = self._made(batch)
                self._check_reduction(made)
                found = made(vector)
                weight = 1.0 if self._told is Reduction.SUM else self._weight(batch, made)
                weights, samples, degree = weights + weight, samples + made.samples, made.degree
                weight *= 1.0 if degree == 1 or self._told is Reduction.SUM else weight / made.samples
                del made  # before the next one is made
                names = None if isinstance(found, Tensor) else list(found)
                pieces = [found] if isinstance(found, Tensor) else list(found.values())
                total = total or [torch.zeros_like(piece) for piece in pieces]
                for sum_, piece in zip(total, pieces, strict=True):
                    sum_.add_(piece, alpha=weight)
        self._check_samples(samples)
        if self._told is Reduction.MEAN:
            whole = weights if degree == 1 else weights**2 / samples
            total = [sum_.div_(whole) for sum_ in total]
        return total[0] if names is None else dict(zip(names, total, strict=True))

    __matmul__ = __call__

    def _weight(self, batch: Any, made: CurvatureProduct) -> float:
        found = float(made.samples if self.count is None else self.count(batch))
        if not 0 <= found < float("inf"):
            raise InputError(f"{self.label} over data: count gives {found} for a batch; give a finite number ≥ 0")
        return found

    def _check_reduction(self, made: CurvatureProduct) -> None:
        """The first time that the batch is seen."""
        if self._given is None and not self._samples and self._told not in self._ways(made):
            self._refuse(made.label)

    def _check_samples(self, samples: int) -> None:
        if samples != (self._samples or samples):
            raise InputError(
                f"{self.label} over data: the loader gave {self._samples} samples, and now {samples}: another matrix.\n"
                "  Make it again for other data"
            )
        self._samples = samples

    def to_dense(self) -> Tensor:
        """M [P, P], by as many products at once: for small models."""
        return self(torch.eye(self.shape[0], dtype=self.dtype, device=self.device))

    def __repr__(self) -> str:
        kind = "" if self._told is None else f"a {self._told.value} over samples, "
        return f"OverData({self.label}: {list(self.shape)}, {kind}{len(self.names)} parameters)"
