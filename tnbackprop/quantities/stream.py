"""Streams: torch code on a few samples of a value at a time, where all of it would be too large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..diagram.core import Diagram


@dataclass(frozen=True)
class Stream:
    """What `extract` returns for what no diagram says: torch code on slices of a diagram along the samples.

    A histogram of all elements of all individual gradients, say, of which a few samples are there at a time:

        def extract(self, J, g):
            return tn.Stream(J.T @ g, lambda G: torch.histc(G.flatten(), 20, -1, 1))

    diagram   with a leg n, legs [n, *p]: the individual gradients
    function  from some samples of it, [samples, *p], to a tensor. It is traced once for each shape of a parameter
    rows      whether that has a row for each sample: then they are put one after the other, else slices are summed
    """

    diagram: Diagram
    function: Callable[[Any], Any]
    rows: bool = False
