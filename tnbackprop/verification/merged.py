"""Merged: the results of two parts of a batch together are those of the whole, as the diagrams say how they join."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compiler.merge.join import Way
from ..definitions.defined import SEED
from ..definitions.report import LeftOut, Row, deviation, wrong_entries
from ..diagram.core import N
from ..errors import InputError
from ..linalg import KroneckerFactors
from ..results import Result
from ..runtime import Program
from ..runtime.handed import Handed
from .rules import Finding, first_entry

HOW = "the whole batch: two parts of it give the same"
CAUSE = "the loss is no mean or sum over samples as its rule says, or samples meet each other in the model"


def check_merged(program: Program, x: Any, y: Any, size: int, case: str) -> Iterator[Finding]:
    """A row for each quantity, its worst: a third of the samples and the others. Not of what the seed changes."""
    if size < 2 or program.compiled.draws:
        return
    cut, operands = max(1, size // 3), program.some_operands(x, y)

    def result(own: slice, seed: int = SEED) -> Result:
        each = _part(y, own)
        if isinstance(program.loss, Handed) and program.loss.mean:  # that of a mean over these samples is larger
            each = pytree.tree_map(lambda leaf: leaf * (size / len(leaf)), each)
        return program(_part(x, own), each, seed=seed, operands=_operands(program, operands, own))

    try:
        whole = result(slice(0, size))
        again = result(slice(0, size), SEED + 1) if program.compiled.plan.noises else whole
        keys = [key for key in whole if _merges(whole, key) and _same(whole[key], again[key])]
        whole, one, two = (_kept(each, keys) for each in (whole, result(slice(0, cut)), result(slice(cut, size))))
        found = one.merge(two)
    except InputError as error:
        yield LeftOut("merged", str(error).splitlines()[0])
        return
    for key in whole:
        rows = [
            _row(key, name, got, want, case)
            for name, value in whole[key].items()
            for got, want in zip(_tensors(found[key][name]), _tensors(value), strict=True)
        ]
        yield from sorted(rows, key=lambda row: (row.ok, -row.error))[:1]


def _row(key: str, name: str, got: Tensor, want: Tensor, case: str) -> Row:
    row = Row("merged", key, case, tuple(want.shape), deviation(got, want), how=HOW)
    if got.shape != want.shape:
        return replace(row, wrong=f"  shape {list(got.shape)}, not {list(want.shape)}")
    if not wrong_entries(got, want).any():
        return row
    axes = tuple(f"axis{k}" for k in range(want.ndim))
    entry = first_entry(f"{key} of '{name}'", "two parts merged", "the whole batch", got, want, axes)
    return replace(row, wrong=f"{entry}\n  likely: {CAUSE}")


def _merges(result: Result, key: str) -> bool:
    assert result.batch is not None
    return not any(join.way is Way.REFUSED for by in result.batch.merging.joins[key].values() for join in by)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(torch.equal(a, b) for n in one for a, b in zip(_tensors(one[n]), _tensors(other[n]), strict=True))


def _kept(result: Result, keys: list[str]) -> Result:
    assert result.batch is not None
    merging = result.batch.merging
    batch = replace(result.batch, merging=replace(merging, joins={key: merging.joins[key] for key in keys}))
    return result.with_values(result.loss, None, {key: result[key] for key in keys}, batch)


def _part(tree: Any, own: slice) -> Any:
    return pytree.tree_map(lambda leaf: leaf[own] if isinstance(leaf, Tensor) and leaf.ndim else leaf, tree)


def _operands(program: Program, operands: Mapping[str, Any], own: slice) -> dict[str, Any]:
    """Those of some samples."""
    def cut(tensor: Tensor, shape: tuple[Any, ...]) -> Tensor:
        return tensor[tuple(own if size == N else slice(None) for size in shape)]

    found: dict[str, Any] = {}
    for key, shape in program.operands.items():
        given = operands[key]
        found[key] = {n: cut(given[n], shape[n]) for n in shape} if isinstance(shape, Mapping) else cut(given, shape)
    return found


def _tensors(value: Any) -> tuple[Tensor, ...]:
    return value.factors if isinstance(value, KroneckerFactors) else (value,)
