"""Readable, unique Python names for the values of a graph."""

from __future__ import annotations

import builtins
import keyword
import re
from typing import Any

from torch.fx import Node

from .torch_internals import OpOverload, name_of

RESERVED = frozenset(
    {*keyword.kwlist, *keyword.softkwlist, *dir(builtins), *"N n v torch math loss output parameters buffers".split()}
    | {"x", "y", "aten", "F", "nn", "functional", "window_gram", "sum_of_products", "sum_of_shifted_squares"}
    | {"like", "memory", "progress", "tensors", "results", "added", "one_by_one"}
    | {"receptive_kernels", "receptive_rows", "receptive_vjp", "receptive_vjp_wide"}
)
_OWN = re.compile(r"(both|column|curvature|draw|noise|root|slice|slot|total|weight)_\d\w*|[tu]\d+")
"""How the emitted function calls values of its own."""


class Names:
    """Hands out identifiers, each once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def fresh(self, wanted: str, reserved: bool = False) -> str:
        """`wanted` as an identifier, with a number behind it where it is taken. `reserved`: take a reserved name."""
        base = re.sub(r"\W", "_", wanted, flags=re.ASCII).strip("_") or "value"
        if base[0].isdigit() or _OWN.fullmatch(base):
            base = f"layer_{base}"
        name, count = base, 1
        while name in self._taken or (name in RESERVED and not reserved):
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name)
        return name


def module_of(node: Node) -> tuple[str, str, str]:
    """(key of the module call, dotted path below the model or "loss", class name) of the innermost module."""
    entries: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    stack = [(key, path, kind) for key, (path, kind) in entries.items() if "_empty_nn_module_stack" not in path]
    if not stack:
        return "", "", ""
    inside = next((path for _, path, _ in stack if path.split(".")[0] == "model"), None)
    key, path, kind = stack[-1]
    short = kind.rsplit(".", 1)[-1] if isinstance(kind, str) else kind.__name__
    if inside is None:
        return key, "loss", "" if path == "" else short
    return key, path.removeprefix("model").removeprefix("."), short


def op_name(target: object) -> str:
    """relu for aten.relu_.default"""
    if isinstance(target, OpOverload):
        return name_of(target)[0].strip("_")
    return getattr(target, "__name__", "value").strip("_").lower()
