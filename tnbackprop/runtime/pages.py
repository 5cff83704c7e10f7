"""Pages: memory that was freed is kept for the next step, where the C library would give it back to the system."""

from __future__ import annotations

import torch

LARGEST = 2**25 - 2**16
"""Just below the largest block that glibc learns from, 32 MiB."""


def keep_freed_pages() -> None:
    """Let glibc keep up to 64 MiB that are free at the end of its heap.

    It takes blocks above a threshold (128 KiB at first) from the system, and gives twice as much at the end of the
    heap back to it; what is taken again comes page by page, about 1 µs each. The threshold follows the largest block
    that was freed (mallopt(3), M_MMAP_THRESHOLD): this allocates one of the largest size that counts, touches none
    of its pages, and frees it. Where MALLOC_TRIM_THRESHOLD_ is set, or with another allocator, nothing changes.
    """
    torch.empty(LARGEST, dtype=torch.uint8, device="cpu")
