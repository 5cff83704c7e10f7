"""What modules keep besides tensors and modules: lists, mappings and objects that a forward may write to."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import nn

TABLES = ("_parameters", "_buffers", "_modules")

@dataclass(frozen=True)
class Slots:
    """The attributes of an object that has no dict of them."""

    owner: Any
    keys: tuple[str, ...]

    def items(self) -> list[tuple[str, Any]]:
        return [(key, getattr(self.owner, key)) for key in self.keys if hasattr(self.owner, key)]

    def clear(self) -> None:
        for key, _ in self.items():
            object.__delattr__(self.owner, key)

    def update(self, contents: Contents) -> None:
        for key, value in contents:
            object.__setattr__(self.owner, key, value)


Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any] | Slots
Contents = list[tuple[Any, Any]]
"""Of a mapping or an object: keys and values; of another container: None and the items."""


@contextmanager
def attributes_kept(wrapped: nn.Module) -> Iterator[None]:
    """Afterwards modules have the attributes that they had, and `containers` what was in them."""
    before = [(module, _attributes(module)) for module in wrapped.modules()]
    filled = [(each, _contents(each)) for each in containers(wrapped)]
    try:
        yield
    finally:
        for module, attributes in before:
            _restore(module, attributes)
        for each, contents in filled:
            _refill(each, contents)


@contextmanager
def draws_kept(*callables: object) -> Iterator[None]:
    """Afterwards Python, numpy and generators that modules hold draw what they would have drawn before."""
    modules = [each for each in callables if isinstance(each, nn.Module)]
    reached = {id(value): value for module in modules for _, value in _reached(module)}.values()
    of_torch = [(each, each.get_state()) for each in reached if isinstance(each, torch.Generator)]
    of_numpy = [(each, each.bit_generator.state) for each in reached if isinstance(each, numpy.random.Generator)]
    own, legacy = random.getstate(), numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(own)
        numpy.random.set_state(legacy)
        for generator, state in of_torch:
            generator.set_state(state)
        for each, before in of_numpy:
            each.bit_generator.state = before


def containers(wrapped: nn.Module) -> tuple[Container, ...]:
    """Those that modules hold, in each other, too; and the attributes of an object that a module holds, with theirs.

    No objects of objects: they may be a whole program, which other threads write to.
    """
    found = (value for _, value in _reached(wrapped) if isinstance(value, dict | list | set | deque | Slots))
    return tuple({id(value): value for value in found}.values())


def plain_tensors(wrapped: nn.Module) -> dict[str, torch.Tensor]:
    """Those that are no parameters or buffers, by how they are read: "cache[0]", "block.state.mean"."""
    return {name: value for name, value in _reached(wrapped) if isinstance(value, torch.Tensor)}


def _reached(wrapped: nn.Module) -> Iterator[tuple[str, Any]]:
    """What modules hold that is no module, parameter or buffer, by how it is read."""
    seen = set[tuple[int, bool]]()
    ahead = [
        (f"{path}.{key}".removeprefix("."), value, True)
        for path, module in wrapped.named_modules()
        for key, value in vars(module).items()
        if key not in TABLES
    ]
    while ahead:
        name, value, opens = ahead.pop()
        if (id(value), opens) in seen:
            continue
        seen.add((id(value), opens))
        yield name, value
        if isinstance(value, dict):
            ahead += [(f"{name}[{_told(key)}]", each, opens) for key, each in value.items()]
        elif isinstance(value, list | set | deque | tuple):
            ahead += [(f"{name}[{k}]", each, opens) for k, each in enumerate(value)]
        elif opens and not isinstance(value, NOT_OPENED):
            for own in _own(value):
                yield name, own
                ahead += [(f"{name}.{key}", each, False) for key, each in own.items()]


def _own(value: Any) -> Iterator[dict[str, Any] | Slots]:
    """The attributes of an object, where it has any."""
    if isinstance(own := getattr(value, "__dict__", None), dict):
        yield own
    if slots := _slots(value.__class__):
        yield Slots(value, slots)


@lru_cache(maxsize=1024)
def _slots(kind: type) -> tuple[str, ...]:
    """The attributes that a class, or what it is derived from, names in `__slots__`."""
    named = (getattr(each, "__slots__", ()) for each in kind.__mro__)
    keys = (key for each in named for key in ((each,) if isinstance(each, str) else each))
    return tuple(key for key in keys if not key.startswith("__"))


def _told(key: object) -> str:
    return repr(key) if isinstance(key, str | int) else type(key).__name__


NOT_OPENED = (type, ModuleType, torch.Tensor, type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor))
"""Of everybody, or of torch: operators fill tables of their own."""


def _contents(value: Container) -> Contents:
    return list(value.items()) if isinstance(value, dict | Slots) else [(None, item) for item in value]


def _refill(value: Container, contents: Contents) -> None:
    """Left alone if it has what it had: a mapping may refuse to be written to, and then nothing was."""
    now = _contents(value)
    if len(now) == len(contents) and all(a is c and b is d for (a, b), (c, d) in zip(now, contents, strict=True)):
        return
    value.clear()
    if isinstance(value, dict | Slots):
        value.update(contents)
    else:
        (value.update if isinstance(value, set) else value.extend)(item for _, item in contents)


def _attributes(module: nn.Module) -> dict[str, Any]:
    return {key: dict(value) if key in TABLES else value for key, value in vars(module).items()}


def _restore(module: nn.Module, attributes: dict[str, Any]) -> None:
    own = vars(module)
    for key in TABLES:
        table = own[key]
        table.clear()
        table.update(attributes[key])
    for key in own.keys() - attributes.keys():
        del own[key]
    own.update({key: value for key, value in attributes.items() if key not in TABLES})
