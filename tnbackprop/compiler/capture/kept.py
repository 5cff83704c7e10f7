"""What modules keep besides tensors and modules: lists, mappings and objects that a forward may write to."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import nn

TABLES = ("_parameters", "_buffers", "_modules")

Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]
Contents = list[tuple[Any, Any]]
"""Of a mapping: keys and values; of another container: None and the items."""


@contextmanager
def attributes_kept(wrapped: nn.Module) -> Iterator[None]:
    """Afterwards modules have the attributes that they had, and `containers` what was in them."""
    before = [(module, _attributes(module)) for module in wrapped.modules()]
    filled = [(each, _contents(each)) for each in containers(wrapped.modules())]
    try:
        yield
    finally:
        for module, attributes in before:
            _restore(module, attributes)
        for each, contents in filled:
            _refill(each, contents)


def containers(modules: Iterable[nn.Module]) -> tuple[Container, ...]:
    """Those that modules hold, in each other, too; and the attributes of an object that a module holds, with theirs.

    No objects of objects: they may be a whole program, which other threads write to.
    """
    found: dict[int, Container] = {}
    seen = set[tuple[int, bool]]()
    ahead = [(value, True) for module in modules for key, value in vars(module).items() if key not in TABLES]
    while ahead:
        value, opens = ahead.pop()
        if (id(value), opens) in seen:
            continue
        seen.add((id(value), opens))
        if isinstance(value, dict | list | set | deque):
            found[id(value)] = value
        if isinstance(value, dict | list | set | deque | tuple):
            ahead += [(each, opens) for each in (value.values() if isinstance(value, dict) else value)]
        elif opens and not isinstance(value, NOT_OPENED) and isinstance(own := getattr(value, "__dict__", None), dict):
            ahead.append((own, False))
    return tuple(found.values())


NOT_OPENED = (type, ModuleType, torch.Tensor, type(torch.ops.aten.add), type(torch.ops.aten.add.Tensor))
"""Of everybody, or of torch: operators fill tables of their own."""


def _contents(value: Container) -> Contents:
    return list(value.items()) if isinstance(value, dict) else [(None, item) for item in value]


def _refill(value: Container, contents: Contents) -> None:
    """Left alone if it has what it had: a mapping may refuse to be written to, and then nothing was."""
    now = _contents(value)
    if len(now) == len(contents) and all(a is c and b is d for (a, b), (c, d) in zip(now, contents, strict=True)):
        return
    value.clear()
    if isinstance(value, dict):
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
