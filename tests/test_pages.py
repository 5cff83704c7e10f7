"""Memory that a step freed is there for the next one: the C library keeps it, and maps no block of its own for it."""

import os
import platform
import subprocess
import sys

KEEP = "from tnbackprop.runtime.pages import keep_freed_pages\nkeep_freed_pages()\n"
MAPPED = """
import ctypes, torch
from tnbackprop.runtime import pages

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks hblks hblkhd usmblks b c d e".split()]

mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = Mallinfo

held = []  # what is freed would teach it, too

def mapped():
    before = mallinfo().hblks
    held.append(torch.empty(pages.LARGEST - 2**20, dtype=torch.uint8))
    return mallinfo().hblks - before

first = mapped()
pages.keep_freed_pages()
print(first, mapped())
"""


def run(script: str) -> str:
    """In a process whose C library has its own settings, and has learnt nothing yet."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120).stdout


def test_freed_pages_are_kept() -> None:
    """A large block is mapped on its own, and given back when freed, until glibc has learnt of larger ones."""
    if platform.libc_ver()[0] == "glibc":
        assert run(MAPPED).split() == ["1", "0"]
    else:
        assert run(KEEP) == "", "elsewhere nothing happens, without an error"
