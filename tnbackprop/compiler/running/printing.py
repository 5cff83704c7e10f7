"""What a forward prints: it runs several times while it is compiled, and is read once."""

from __future__ import annotations

import builtins
import threading
from collections.abc import Callable
from threading import get_ident
from types import TracebackType
from typing import Any


class Silence:
    """While a thread has entered it, `print` does nothing there; other threads print."""

    def __init__(self) -> None:
        self.lock, self.depths = threading.Lock(), dict[int, int]()
        self.own: Callable[..., None] = builtins.print

        def prints(*args: Any, **options: Any) -> None:  # a function, of which torch.export makes deep copies
            if get_ident() not in self.depths:
                self.own(*args, **options)

        self.prints = prints

    def __enter__(self) -> None:
        with self.lock:
            if not self.depths:
                self.own, builtins.print = builtins.print, self.prints
            self.depths[get_ident()] = self.depths.get(get_ident(), 0) + 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.lock:
            self.depths[get_ident()] -= 1
            if not self.depths[get_ident()]:
                del self.depths[get_ident()]
            if not self.depths:
                builtins.print = self.own


SILENT = Silence()
