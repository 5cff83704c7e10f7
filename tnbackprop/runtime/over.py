"""Over all batches of a loader: one result, as if the data had been one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from ..compiler.translate.graph import Graph
from ..errors import InputError
from ..results import Merger, Result
from .given import fits, floating_of
from .noise import is_seed
from .operands import Given
from .program import Program
from .progress import counted

PerBatch = Callable[[Any], Given]


def over(
    program: Program,
    loader: Iterable[Any],
    *,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    operands: Given | PerBatch | None = None,
) -> Result:
    """The result of a program on all data of a loader, as if it had been one batch.

    loader    batches of any sizes: (x, y), x alone, or what a DataLoader makes of them, [x] and [x_1, x_2, y]; run
              through once. Moving them to a device is up to you
    seed      of what Monte-Carlo quantities draw, new numbers for every batch
    generator of it, instead; without both: torch's own
    progress  a bar for the batches
    operands  what quantities read besides, the same for every batch; or a function from a batch to them

    One result is in memory beside what is wanted: what adds up is added in place, and only values with an axis of
    samples, the model's output among them, grow with the data. Raises `InputError` for an empty loader, and for what
    batches do not tell (see `Result.merge`).
    """
    if not isinstance(program, Program):
        raise InputError(f"tn.over: {type(program).__name__} is no program: give what tn.compile returns")
    if not isinstance(loader, Iterable) or isinstance(loader, torch.Tensor | Mapping):
        raise InputError(f"tn.over: a {type(loader).__name__} gives no batches: give a DataLoader, or a list of (x, y)")
    if not (seed is None or is_seed(seed)):
        raise InputError(f"tn.over: seed={seed!r}: give a whole number of 64 bits")
    if seed is not None and generator is not None:
        raise InputError(f"tn.over: seed={seed!r} and a generator: give one of them, as each says what is drawn")
    merger: Merger[Result] | None = None
    for batch in counted(loader, "over batches") if progress else loader:
        given = operands(batch) if callable(operands) else operands
        x, y = _pair(batch, program.compiled.graph)
        if seed is not None and generator is None:
            generator = _seeded(program.tensors(x, y), seed)
        found = program(x, y, generator=generator, operands=given)
        if merger is None:
            merger = Merger(found, own=True)
        else:
            merger.add(found)
        del found  # before the next one is made
    if merger is None:
        raise InputError("tn.over: the loader gives no batch")
    return merger.result()


def _pair(batch: Any, graph: Graph) -> tuple[Any, Any]:
    """x and y of what a loader gives: the way to read it that has the structure of the example."""
    if not isinstance(batch, tuple | list) or not batch:
        return batch, None
    *front, last = batch
    few = [(batch[0], last if front else None)] if len(batch) < 3 else []
    ways: list[tuple[Any, Any]] = [(batch, None), (tuple(batch), None), (tuple(front), last), *few]
    return next((way for way in ways if fits(way, graph)), ways[-1])


def _seeded(tensors: Mapping[str, torch.Tensor], seed: int) -> torch.Generator:
    """A generator where the program draws."""
    return torch.Generator(floating_of(tensors).device).manual_seed(int(seed))
