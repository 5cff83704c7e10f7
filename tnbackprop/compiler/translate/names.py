"""Readable, unique names for the values of a graph."""

from __future__ import annotations

import re
from typing import Any

from torch.fx import Node

from .torch_internals import OpOverload, name_of


class Names:
    """Hands out names of values, each once. What they are called in a source is the business of `emit.naming`."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def fresh(self, wanted: str) -> str:
        """`wanted` as an identifier, with a number behind it where it is taken."""
        base = re.sub(r"\W", "_", wanted, flags=re.ASCII).strip("_") or "value"
        base = f"layer_{base}" if base[0].isdigit() else base
        name, count = base, 1
        while name in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


TRACED = "Traced"
"""The class of a whole forward, model and loss, as plain operators: nothing says any more whose each is."""


def module_of(node: Node) -> tuple[str, str, str]:
    """(key of the module call, dotted path below the model or "loss", class name) of the innermost module."""
    entries: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    stack = [(key, path, kind) for key, (path, kind) in entries.items() if "_empty_nn_module_stack" not in path]
    if not stack:
        return "", "", ""
    inside = next((path for _, path, _ in stack if path.split(".")[0] == "model"), None)
    key, path, kind = stack[-1]
    short = kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__
    if inside is None and short == TRACED:
        return "", "", ""
    if inside is None:
        return key, "loss", "" if path == "" else short
    return key, path.removeprefix("model").removeprefix("."), short


def op_name(target: object) -> str:
    """relu for aten.relu_.default"""
    if isinstance(target, OpOverload):
        return name_of(target)[0].strip("_")
    return getattr(target, "__name__", "value").strip("_").lower()
