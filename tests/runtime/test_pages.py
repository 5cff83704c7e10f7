"""Memory that was freed is there for what comes next: the C library keeps it, and of large values the program does."""

from __future__ import annotations

import copy
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import sympy
import torch
from torch import Tensor, nn

import tnbackprop as tn
from tnbackprop.compiler.plan.plan import Plan
from tnbackprop.compiler.program import cost
from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.expr import Call, Expr, Value
from tnbackprop.compiler.program.lines import with_out
from tnbackprop.compiler.program.numbers import Number
from tnbackprop.diagram.core import N
from tnbackprop.runtime.memory import pages
from tnbackprop.runtime.memory.pages import Blocks

from ..programs import shown

A, B, OUT = (Value(name, None, (2, 3, 3), hint=name) for name in "abo")
KEEP = "from tnbackprop.runtime.memory.pages import keep_freed_pages\nkeep_freed_pages()\n"
MAPPED = """
import ctypes, torch
from tnbackprop.runtime.memory import pages

class Mallinfo(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in "arena ordblks smblks hblks hblkhd usmblks b c d e".split()]

mallinfo = ctypes.CDLL(None).mallinfo
mallinfo.restype = Mallinfo

kept = []  # what is freed would teach it, too

def mapped():
    before = mallinfo().hblks
    kept.append(torch.empty(pages.LARGEST - 2**20, dtype=torch.uint8))
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


@pytest.mark.slow
def test_freed_pages_are_kept() -> None:
    """A large block is mapped on its own, and given back when freed, until glibc has learnt of larger ones."""
    if platform.libc_ver()[0] == "glibc":
        assert run(MAPPED).split() == ["1", "0"]
    else:
        assert run(KEEP) == "", "elsewhere nothing happens, without an error"


@pytest.mark.parametrize(
    ("expr", "code", "want"),
    [
        (
            Call(f.MUL, (A, Call(f.UNSQUEEZE, (B, 1)))), "a * b.unsqueeze(1)",
            "torch.mul(a, b.unsqueeze(1), out=o)",
        ),
        (Call(f.MUL, (Number(1 / N), A)), "1 / N * a", "torch.mul(a, 1 / N, out=o)"),
        (Call(f.MUL, (A, Number(sympy.Integer(-1)))), "a * -1", "torch.mul(a, -1, out=o)"),
        (Call(f.BMM, (A, B)), "torch.bmm(a, b)", "torch.bmm(a, b, out=o)"),
        (Call(f.SQUEEZE, (Call(f.BMM, (A, B)), 1)), "torch.bmm(a, b).squeeze(1)", None),
        (Call(f.ADD, (A, B)), "a + b", None),
    ],
    ids=["product", "scale first", "scale", "matmul", "part of it", "sum"],
)  # fmt: skip
def test_written_to_what_is_there(expr: Expr, code: str, want: str | None) -> None:
    assert shown(expr) == code
    found = with_out(expr, OUT)
    assert (found and shown(found)) == want
    if want is not None:
        scope = {"torch": torch, "a": torch.randn(2, 3, 3), "b": torch.randn(2, 3, 3), "N": 4}
        expected = eval(code, scope)
        assert eval(want, scope | {"o": torch.empty_like(expected)}).equal(expected)


needs_advice = pytest.mark.skipif(pages.ADVICE is None, reason="the system knows no MADV_FREE")
LIKE, SHAPE = torch.zeros(1), (3, 2**22)  # 48 MiB


@needs_advice
def test_a_block_comes_back() -> None:
    """To the next value of its size, when nobody holds the one before."""
    blocks = Blocks()
    first = blocks.out(LIKE, SHAPE)
    assert first is not None and first.shape == SHAPE and first.dtype == LIKE.dtype and first.is_contiguous()
    address, first = first.data_ptr(), first.fill_(1)
    assert blocks.idle == 0
    del first
    assert blocks.idle == 4 * 3 * 2**22
    other = blocks.out(LIKE, (3, 2**22 + 1024))
    again = blocks.out(LIKE.to(torch.bfloat16), (6, 2**22))
    assert other is not None and other.data_ptr() != address
    assert again is not None and again.data_ptr() == address and again.dtype == torch.bfloat16
    assert blocks.idle == 0


@needs_advice
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t[1, 5:], lambda t: t.numpy(), lambda t: t.view(-1).detach()])
def test_what_somebody_holds_is_left_alone(view: Callable[[Tensor], object]) -> None:
    """A view or an array of the value is enough."""
    blocks = Blocks()
    value = blocks.out(LIKE, SHAPE)
    assert value is not None
    address, kept = value.data_ptr(), view(value.fill_(3))
    del value
    other = blocks.out(LIKE, SHAPE)
    assert other is not None and other.data_ptr() != address and blocks.idle == 0
    other.fill_(5)
    assert torch.as_tensor(kept).eq(3).all()
    del kept
    assert blocks.idle == 4 * 3 * 2**22


@needs_advice
def test_what_a_call_has_no_use_for_goes_back() -> None:
    blocks = Blocks()
    with blocks.call():
        first = blocks.out(LIKE, SHAPE)
    with blocks.call():
        inside = blocks.out(LIKE, SHAPE)
        del inside
    del first  # before the next call: as the result of a call that is assigned to the same name
    assert blocks.idle == 2 * 4 * 3 * 2**22
    with blocks.call():
        again = blocks.out(LIKE, SHAPE)
    assert blocks.idle == 0, "one of them was used, the other one was not"
    del again
    with blocks.call():
        pass
    assert blocks.idle == 0


@needs_advice
def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block is handed out twice, whoever tidies up meanwhile."""
    monkeypatch.setattr(pages, "LARGEST", 0)
    blocks, wrong = Blocks(), []

    def work(mark: int) -> None:
        for _ in range(300):
            with blocks.call():
                mine = [blocks.out(LIKE, (2**10 * (1 + k % 2),)) for k in range(4)]
                for value in mine:
                    assert value is not None
                    value.fill_(mark)
                wrong.extend(value for value in mine if value is not None and not value.eq(mark).all())

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert not wrong


def test_torch_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """With small values, on other devices, and where the system cannot be told that its pages are free."""
    blocks = Blocks()
    assert blocks.out(LIKE, (2**10,)) is None
    assert blocks.out(LIKE.to("meta"), SHAPE) is None
    monkeypatch.setattr(pages, "ADVICE", 10**6)  # a number that no kernel knows
    blocks.keep(mmap.mmap(-1, 2**12))
    assert blocks.idle == 0
    monkeypatch.setattr(pages, "ADVICE", None)
    assert blocks.out(LIKE, SHAPE) is None


def poisoned(seen: list[int]) -> Callable[[Blocks, mmap.mmap], None]:
    """What comes back is full of NaN, and is seen."""
    keep = Blocks.keep

    def poison(blocks: Blocks, block: mmap.mmap) -> None:
        keep(blocks, block)
        torch.frombuffer(block, dtype=torch.uint8).fill_(255)
        seen.append(len(block))

    return poison


def values(result: tn.Result) -> list[Tensor]:
    """All tensors of a result."""
    found = [value for by in result.values() for value in by.values()]
    return [t for value in found for t in (getattr(value, "factors", None) or (value,))]


@pytest.mark.thinned(5)
@needs_advice
@pytest.mark.parametrize("rows", [6, 10**6])
@pytest.mark.parametrize(
    "quantity",
    [tn.BatchGrad(), tn.Variance(), tn.BatchDot(), tn.SqrtGGN(), tn.DiagGGN(per_sample=True), tn.KFLR(),
     tn.HessianDiag(), tn.GGNGram(), tn.KFAC(mc_samples=2, fisher=tn.Fisher.EMPIRICAL)],
    ids=lambda q: q.name if isinstance(q, tn.Quantity) else None,
)  # fmt: skip
def test_programs(quantity: tn.Quantity, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing reads what was in its memory before, and no result is written over, however often it is called."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 5))
    loss, x, y = nn.CrossEntropyLoss(), torch.randn(8, 2, 6, 6), torch.randint(5, (8,))
    monkeypatch.setitem(cost.RATES, "cpu", replace(cost.CPU, rows=rows))
    plain = tn.compile(model.double(), loss, (x.double(), y), [quantity])
    monkeypatch.setattr(Plan, "is_large", lambda plan, value: True)
    monkeypatch.setattr(pages, "LARGEST", 0)
    seen: list[int] = []
    monkeypatch.setattr(Blocks, "keep", poisoned(seen))
    program = tn.compile(model, loss, (x.double(), y), [quantity])
    assert "memory(like, " in program.source and "memory" not in plain.source
    kept = []
    for k in range(3):
        batch = (k + 1) * x.double()[: 8 - k // 2], y[: 8 - k // 2]
        got, want = (values(p(*batch)) for p in (program, plain))
        kept.append((got, [value.clone() for value in want]))
    for got, want in kept:
        for one, other in zip(got, want, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
    assert all(map(torch.equal, values(copy.deepcopy(program)(*batch)), kept[-1][0]))
    assert seen, "what was let go of has come back"
