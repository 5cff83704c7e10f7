"""Every test draws the same numbers, whatever ran before it, and plans for the same processor."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

from tnbackprop import api, compiler
from tnbackprop.compiler.plan import processor

from .captured import Captures

torch.manual_seed(0)  # what modules draw when they are imported


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are the same on every machine."""
    monkeypatch.setattr(processor, "made", lambda: ("GenuineIntel", 6))


PROVED = (
    "test_all_quantities", "test_hostile_names", "test_random_programs", "test_random_readings", "test_check",
    "test_check_faults", "test_docs", "test_examples",
)  # fmt: skip
"""Where programs prove themselves as they do for a user. Elsewhere a test compares with its own oracle."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prove", action="store_true", help="every program that a test compiles proves itself")


@pytest.fixture(autouse=True)
def proved(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.config.getoption("--prove") and request.path.stem not in PROVED:
        monkeypatch.setattr(api, "prove", lambda *_: "not checked: the test does that")


DOWNSTREAM = ("derive", "emit", "linalg", "lower", "plan", "program", "quantities", "rules")
"""Rooms of what comes after the capture, and changes nothing of it."""
CAPTURES = Captures(compiler.capture)


@pytest.fixture(autouse=True)
def captured_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases are tables: most models are compiled by many tests."""
    if request.path.parent.name in DOWNSTREAM:
        monkeypatch.setattr(compiler, "capture", CAPTURES)
