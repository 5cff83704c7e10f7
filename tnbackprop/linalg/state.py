"""Frozen dataclasses as dicts of tensors, texts, numbers and lists, and back: what torch.load reads as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor

from ..errors import InputError
from .kinds import Kind, Role
from .operator import ByValue, Joined, Layout

OF = {"kinds": Kind, "roles": Role}
"""Fields that are tuples of members of an enum."""
INNER = {"layout": Layout, "joined": Joined}
"""Fields that are dataclasses, or None."""


def to_plain(value: Any) -> Any:
    """Fields by name; tuples are lists, members of an enum are their values, tensors are themselves."""
    if isinstance(value, ByValue):
        return value.value
    if isinstance(value, tuple):
        return [to_plain(each) for each in value]
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    return value


def from_plain(kind: type[Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that `kind`, a dataclass, is built with again. Raises `InputError`."""
    names = [field.name for field in fields(kind)]
    if not isinstance(state, Mapping) or {*state} != {*names}:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise InputError(f"the state of {kind.__name__} has {names}, and this one {found}: give what state_dict() gave")
    return {name: _field(name, state[name]) for name in names}


def _field(name: str, value: Any) -> Any:
    if name in OF:
        known = {member.value: member for member in OF[name]}
        if unknown := [each for each in value if each not in known]:
            raise InputError(f"the state's {name} has {unknown[0]!r}, which is none of {list(known)}")
        return tuple(known[each] for each in value)
    if name in INNER:
        return None if value is None else INNER[name](**from_plain(INNER[name], value))
    return _tuples(value)


def _tuples(value: Any) -> Any:
    if isinstance(value, Tensor | str) or not isinstance(value, Sequence):
        return value
    return tuple(_tuples(each) for each in value)
