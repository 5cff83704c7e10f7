"""Processor: a table tells where oneDNN's matmul is twice MKL's, by what the system says of the processor."""

from __future__ import annotations

from pathlib import Path

import pytest

from tnbackprop.compiler import processor
from tnbackprop.compiler.program.cost import CPU

INFO = "processor\t: {}\nvendor_id\t: {}\ncpu family\t: {}\nmodel\t\t: 17\nmodel name\t: any\n\n"
MADE = processor.made.__wrapped__
"""The function itself: in tests all processors are one (conftest.py), and it remembers what it has read."""


@pytest.mark.parametrize(
    ("text", "made"),
    [
        (INFO.format(0, "AuthenticAMD", 26) + INFO.format(1, "AuthenticAMD", 26), ("AuthenticAMD", 26)),
        (INFO.format(0, "GenuineIntel", 6), ("GenuineIntel", 6)),
        ("processor\t: 0\nBogoMIPS\t: 50.00\n", ("", 0)),  # as ARM's are told
        ("", ("", 0)),
    ],
)
def test_what_the_system_says(
    text: str, made: tuple[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpuinfo").write_text(text, encoding="utf-8")
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    assert MADE() == made


def test_a_system_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "none")
    assert MADE() == ("", 0)


@pytest.mark.parametrize(
    ("made", "fast"), [(("AuthenticAMD", 26), True), (("AuthenticAMD", 25), False), (("", 0), False)]
)
def test_which_are_told_apart(made: tuple[str, int], fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "made", lambda: made)
    monkeypatch.setattr(processor, "has_onednn", lambda: True)
    assert processor.of_processor(CPU).onednn == fast
