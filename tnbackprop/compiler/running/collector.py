"""Python's search for cycles of objects, which takes a fifth of compiling a deep model and finds little there."""

from __future__ import annotations

import gc
from threading import Lock
from types import TracebackType


class Uncollected:
    """While any thread has entered it, no cycles are looked for; afterwards they are, if they were before."""

    def __init__(self) -> None:
        self.inside, self.before, self.lock = 0, False, Lock()

    def __enter__(self) -> None:
        with self.lock:
            self.before = self.before if self.inside else gc.isenabled()
            self.inside += 1
            gc.disable()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.inside -= 1
            if self.before and not self.inside:
                gc.enable()


UNCOLLECTED = Uncollected()
