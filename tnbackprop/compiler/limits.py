"""Limits: what does not fit into memory, however it is planned, is refused before it is planned."""

from __future__ import annotations

import os
import sys
from math import isqrt, prod

import torch

from ..diagram.core import Diagram
from ..errors import UnsupportedError
from .sweep.derived import Backward, Derived, Extraction, Native
from .translate.graph import Graph


def machine_bytes(device: torch.device) -> int:
    """The memory of the device; without a bound where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return sys.maxsize
    return int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def check_memory(graph: Graph, derived: Derived, itemsize: int, limit: int) -> None:
    """Refuse before anything is planned, where a single matrix does not fit. Raises `UnsupportedError`."""
    _check_averaged(derived, itemsize, limit)
    _check_blocks(graph, derived, itemsize, limit)


def _check_averaged(derived: Derived, itemsize: int, limit: int) -> None:
    """KFRA has a dense matrix between every two values that are alive together."""
    blocks = [item for item in derived.items if isinstance(item, Backward) and not item.value]
    sizes = {item.note: _elements(item.terms[0]) for item in blocks}
    worst = max(sizes, key=lambda note: sizes[note], default=None)
    if worst is not None and sizes[worst] * itemsize > limit:
        rows = isqrt(sizes[worst])
        amount, value = _shown(sizes[worst] * itemsize), worst.split(" and ")[0]
        raise UnsupportedError(
            f"KFRA needs a matrix of {rows} x {rows} features ({amount}) for {value}, and memory_limit is "
            f"{_shown(limit)}.\n  Ask for KFLR or KFAC, which need no such matrix."
        )


def _check_blocks(graph: Graph, derived: Derived, itemsize: int, limit: int) -> None:
    """A parameter of several legs that stays in one piece has its whole block for a factor, if that fits."""
    items = [item for item in derived.items if isinstance(item, Extraction)]
    for name, quantity, found in ((i.parameter, q, f) for i in items for q, f in i.factors.items()):
        legs = [leg for leg in found.parameter if leg.size != 1]
        size = prod(int(leg.size) for leg in legs)
        whole = len(found.legs) == 1 and len(legs) > 1 and not found.blocks and not any(found.diagonal)
        if whole and size**2 * itemsize > limit:
            raise UnsupportedError(
                f"parameter {graph.parameters[name][0]!r} has no Kronecker factors ({quantity}): its diagram stays in "
                f"one piece when samples and positions are cut,\n  and its whole block, {size} x {size} "
                f"({_shown(size**2 * itemsize)}), is more than memory_limit, {_shown(limit)}.\n"
                "  Ask for DiagGGN, or declare the layer in several steps: what a step leaves alone is a position."
            )


def _elements(term: Diagram | Native) -> int:
    assert isinstance(term, Diagram)
    return prod(int(leg.size) for leg in term.legs)


def _shown(size: int) -> str:
    unit, name = next((u, n) for u, n in ((2**30, "GiB"), (2**20, "MiB"), (1, "bytes")) if size >= u)
    return f"{size / unit:.4g} {name}"
