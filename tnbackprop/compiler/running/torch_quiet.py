"""What torch says while it exports, maps and differentiates: what concerns the user is told by errors of ours."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace, TracebackType
from typing import Any

from torch._C._functorch import (  # type: ignore[attr-defined]
    _set_vmap_fallback_warning_enabled as warn_of_loops,
)
from torch.fx import proxy

from ..translate.torch_internals import alone


class Unwarned:
    """While it is entered, vmap does not warn of operators that it calls once for each element.

    The switch is the process's and torch does not tell how it stands: it is on again when the last thread has left.
    """

    def __init__(self) -> None:
        self.inside, self.lock = 0, threading.Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            warn_of_loops(False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.inside -= 1
            if not self.inside:
                warn_of_loops(True)


UNWARNED = Unwarned()


class Quiet:
    """What torch logs, warns of and prints while it exports is said by the error, or concerns nobody."""

    def __init__(self) -> None:
        self.logger, self.guards = logging.getLogger(_EXAMPLE), logging.getLogger(_GUARDS)
        self.before, self.printed = self.logger.disabled, io.StringIO()
        self.redirected = contextlib.redirect_stderr(self.printed)
        self.silent = warnings.catch_warnings(action="ignore")

    def __enter__(self) -> None:
        self.logger.disabled = True
        self.guards.addFilter(_is_news)
        self.silent.__enter__()
        self.redirected.__enter__()
        UNWARNED.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        UNWARNED.__exit__(kind, error, trace)
        self.redirected.__exit__(kind, error, trace)
        self.silent.__exit__(kind, error, trace)
        self.logger.disabled = self.before
        self.guards.removeFilter(_is_news)
        graph = getattr(error, "partial_fx_graph", None)
        printed = self.printed.getvalue()
        sys.stderr.write(printed if graph is None else printed.replace(f"{graph}\n", ""))


_EXAMPLE, _GUARDS = "torch._subclasses.fake_tensor", "torch.fx.experimental.symbolic_shapes"


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Unable to find user code")


@contextmanager
def noting_forwards() -> Iterator[None]:
    """While active, torch notes of each node which forwards it is from, without reading the text of the whole stack.

    It keeps those frames alone; versions that keep them all are left as they are.
    """
    if not hasattr(proxy.TracerBase, "_filter_traceback_frames"):
        yield
        return
    with alone():
        names, thread = vars(proxy), threading.get_ident()
        own = names["CapturedTraceback"]

        def extract(**options: Any) -> Any:
            here = threading.get_ident() == thread
            return SimpleNamespace(summary=_forwards) if here else own.extract(**options)

        try:
            names["CapturedTraceback"] = SimpleNamespace(extract=extract)
            yield
        finally:
            names["CapturedTraceback"] = own


def _forwards() -> traceback.StackSummary:
    """The frames of functions of that name, the innermost last."""
    stack = [frame for frame in traceback.walk_stack(None) if frame[0].f_code.co_name == "forward"]
    return traceback.StackSummary.from_list([(f.f_code.co_filename, line, "forward", None) for f, line in stack[::-1]])
