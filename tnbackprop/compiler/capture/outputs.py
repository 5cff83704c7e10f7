"""What a model returns, as a tree that torch knows: objects of its own classes by their attributes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


class Fields(SimpleNamespace):
    """The attributes of an object that a model returned, a dataclass or a namespace."""


def _flatten(fields: Fields) -> tuple[list[Any], tuple[str, ...]]:
    return list(vars(fields).values()), tuple(vars(fields))


def _flatten_with_keys(fields: Fields) -> tuple[list[tuple[Any, Any]], tuple[str, ...]]:
    return [(pytree.GetAttrKey(key), value) for key, value in vars(fields).items()], tuple(vars(fields))


def _unflatten(values: Any, keys: Any) -> Fields:
    return Fields(**dict(zip(keys, values, strict=True)))


pytree.register_pytree_node(
    Fields,
    _flatten,
    _unflatten,
    serialized_type_name="tnbackprop.Fields",
    flatten_with_keys_fn=_flatten_with_keys,
)


def as_tree(output: Any) -> Any:
    """The same, with objects as `Fields`, and None for what holds no tensors that anyone knows (a cache, a text)."""
    return pytree.tree_map(_leaf, output)


def _leaf(leaf: Any) -> Any:
    if dataclasses.is_dataclass(leaf) or isinstance(leaf, SimpleNamespace):
        return Fields(**{key: as_tree(value) for key, value in vars(leaf).items()})
    return leaf if isinstance(leaf, Tensor | int | float) else None
