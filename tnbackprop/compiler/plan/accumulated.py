"""Accumulated: squares and factors in another dtype than the model's, of copies of what they read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from ...diagram.algebra import all_parts, inline, of_tensors
from ...diagram.core import Diagram, Operand, Selection, Tensor, leaves, operand_tensors
from ..lower.arrange import copy_work, legs_of
from ..program import functions as f
from ..program.cost import Kernel
from ..program.expr import Call
from ..program.store import Store
from ..sweep.derived import Extraction, Result
from .choose import Choice


def accumulated(store: Store, item: Extraction) -> Extraction:
    """The extraction, of copies where it is not linear in what is propagated."""
    dtype = store.accumulate
    if dtype is None or item.streams or item.native is not None:
        return item

    def other(by: Mapping[Result, Diagram]) -> dict[Result, Diagram]:
        plain = {q for q, d in by.items() if q.factor is None and linear(d, item.carriers)}
        return {q: d if q in plain else _of_copies(store, d, dtype) for q, d in by.items()}

    return replace(item, diagrams=other(item.diagrams), condensed=other(item.condensed))


def as_read(store: Store, choice: Choice, item: Extraction) -> Choice:
    """What was chosen for copies, told of what they are copies of."""
    own = {there: store.copies.get(here, here) for there, here in choice.names.items()}
    return replace(choice, item=item, names=own or dict(store.copies))


def linear(diagram: Diagram, names: frozenset[str]) -> bool:
    """Whether every product reads one of these values once, and not inside of a formula."""
    for product in inline(diagram).products:
        reading = [op for op in product.operands if names & set(_names(op))]
        if len(reading) != 1 or not isinstance(reading[0], Tensor):
            return False
    return True


def _of_copies(store: Store, diagram: Diagram, dtype: torch.dtype) -> Diagram:
    indices = {name for operand in _operands(diagram) if isinstance(operand, Selection) for name in _names(operand)}
    return of_tensors(diagram, {name: _copy(store, name, dtype) for name in leaves(diagram) if name not in indices})


def _operands(diagram: Diagram) -> list[Operand]:
    """All of them, those of its parts included."""
    inner = [part.diagram for part in all_parts(diagram)]
    return [op for each in (diagram, *inner) for product in each.products for op in product.operands]


def _names(operand: Operand) -> list[str]:
    return [tensor.name for tensor in operand_tensors(operand)]


def _copy(store: Store, name: str, dtype: torch.dtype) -> str:
    """The name of a value's copy, made once."""
    copy = f":{dtype}:{name}"
    if copy not in store:
        value = store.find(name)
        note, store.note = store.note, f"{name} in {dtype}"
        made = store.add(Call(f.TO, (value, dtype)), value.shape, Kernel.COPY, copy_work(legs_of(value)), dtype=dtype)
        store.name(copy, made)
        store.copies[copy] = name
        store.note = note
    return copy
