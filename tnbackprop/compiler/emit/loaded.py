"""Loaded: a source as a function, known to linecache so that tracebacks show it, and what is said where it fails."""

from __future__ import annotations

import linecache
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from weakref import finalize

import torch

from ...errors import InputError
from ..running.torch_quiet import UNWARNED

_serial = count(1)
FILENAME = "<tnbackprop program"
"""How the name begins under which a source is known to linecache."""


def load(source: str) -> Callable[[dict[str, torch.Tensor]], Any]:
    """The function that the source defines. While it lives, linecache knows its lines."""
    filename = f"{FILENAME} {next(_serial)}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {}
    exec(compile(source, filename, "exec"), namespace)
    function: Callable[[dict[str, torch.Tensor]], Any] = namespace["program"]
    finalize(function, linecache.cache.pop, filename, None).atexit = False
    return function


def _about(source: str, number: int) -> str:
    """What a line of a source is for: the comment before it."""
    before = reversed(source.splitlines()[:number])
    return next((line.strip(" #") for line in before if line.strip().startswith("# ")), "")


@contextmanager
def running(source: str, called: str = "program.source") -> Iterator[None]:
    """What torch or Python raises in the emitted function is told with the place in the source, and what it is for."""
    try:
        with UNWARNED:
            yield
    except (ZeroDivisionError, IndexError, RuntimeError, ValueError, TypeError) as error:
        found = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(FILENAME)]
        if not found or isinstance(error, torch.OutOfMemoryError):
            raise
        lines = source.splitlines()[: found[-1].lineno]
        about = " > ".join(dict.fromkeys(_about(source, frame.lineno or 0) for frame in found))
        zero = "a scale divides by zero at this batch size, as 1/(N - 1) does at N = 1: give more samples"
        what = zero if isinstance(error, ZeroDivisionError) else error
        raise InputError(
            f"the batch fails in {about}: {what}\n  line {len(lines)} of {called}: {lines[-1].strip()}"
        ) from error
