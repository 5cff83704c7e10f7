"""Pages: memory that was freed is kept for what comes next, where it would go back to the system."""

from __future__ import annotations

import math
import mmap
from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from weakref import finalize, ref

import torch
from torch import Tensor

LARGEST = 2**25 - 2**16
"""Just below the largest block that glibc learns from, 32 MiB."""
ADVICE: int | None = getattr(mmap, "MADV_FREE", None)


def keep_freed_pages() -> None:
    """Let glibc keep up to 64 MiB that are free at the end of its heap.

    It takes blocks above a threshold (128 KiB at first) from the system, and gives twice as much at the end of the
    heap back to it; what is taken again comes page by page, about 1 µs each. The threshold follows the largest block
    that was freed (mallopt(3), M_MMAP_THRESHOLD): this allocates one of the largest size that counts, touches none
    of its pages, and frees it. Where MALLOC_TRIM_THRESHOLD_ is set, or with another allocator, nothing changes.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")


class Blocks:
    """Memory of large values: what nobody holds any more is handed out again, with its pages.

    The C library takes blocks above `LARGEST` from the system each time. Here one that comes back stays until a whole
    call had no use for it. Meanwhile the system may take its pages where it runs short (madvise(2), MADV_FREE), and
    they come back empty: so nothing is held for good. Where the system knows no such advice nothing is kept.
    """

    def __init__(self) -> None:
        self._free: dict[int, deque[tuple[int, mmap.mmap]]] = defaultdict(deque)  # size -> (call when it came back, it)
        self._calls = 0

    @contextmanager
    def call(self) -> Iterator[None]:
        """Around a call: what was there before and is still there afterwards goes back to the system."""
        self._calls += 1
        yield
        for found in list(self._free.values()):
            for _ in range(len(found)):  # steps are atomic: another thread may be taking blocks
                with suppress(IndexError):
                    back = found.popleft()
                    if back[0] == self._calls:
                        found.append(back)

    def out(self, like: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Memory for a value of this shape, with the dtype of `like`; None where torch is better asked."""
        size = math.prod(shape) * like.itemsize
        if size <= LARGEST or like.device.type != "cpu" or ADVICE is None:
            return None
        block = self._taken(size) or mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        seen = memoryview(block)
        finalize(seen, _come_back, ref(self), block).atexit = False
        return torch.frombuffer(seen, dtype=like.dtype).view(shape)

    @property
    def idle(self) -> int:
        """Bytes that nobody holds."""
        return sum(size * len(found) for size, found in self._free.items())

    def _taken(self, size: int) -> mmap.mmap | None:
        with suppress(IndexError):
            return self._free[size].pop()[1]
        return None

    def keep(self, block: mmap.mmap) -> None:
        """Nobody holds it any more."""
        assert ADVICE is not None
        try:
            block.madvise(ADVICE)
        except OSError:  # an older kernel
            return
        self._free[len(block)].append((self._calls, block))


def _come_back(blocks: ref[Blocks], block: mmap.mmap) -> None:
    if (kept := blocks()) is not None:
        kept.keep(block)
