"""Every test draws the same numbers, whatever ran before it, and plans for the same processor."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from zlib import crc32

import pytest
import torch

from tnbackprop import api, compiler
from tnbackprop.compiler import processor, single

from .captured import Captures
from .cases import EVERY, RANDOM_CASES

torch.manual_seed(0)  # what modules draw when they are imported
SEED = torch.manual_seed if torch.cuda.is_available() else torch.default_generator.manual_seed
"""`manual_seed` writes down the stack for every kind of device that is not there."""

for logger in [each for name, each in logging.Logger.manager.loggerDict.items() if name.split(".")[0] == "torch"]:
    if isinstance(logger, logging.Logger):
        logger.propagate = True  # else pytest listens to each of them, and torch writes down each step of an export


PROVED = (
    "test_all_quantities", "test_hostile_names", "test_random_programs", "test_random_readings", "test_check",
    "test_check_faults", "test_docs", "test_examples",
)  # fmt: skip
"""Where programs prove themselves as they do for a user. Elsewhere a test compares with its own oracle."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--prove", action="store_true", help="every program that a test compiles proves itself")


CASES = {case.name for case in EVERY + RANDOM_CASES}


@pytest.hookimpl(tryfirst=True)  # before those that are slow are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one case follow one another, whatever their file: so one process has them, and captures it once."""
    _thin(items)
    order: dict[str, int] = {}
    items.sort(key=lambda item: order.setdefault(_case_of(item) or str(item.path), len(order)))


def _thin(items: list[pytest.Item]) -> None:
    """All but every `step`-th case of a test with `thinned(step)` are slow."""
    seen: Counter[tuple[object, ...]] = Counter()
    for item in items:
        marker = item.get_closest_marker("thinned")
        if marker is None or item.get_closest_marker("slow") is not None:
            continue
        function = (item.path, item.getparent(pytest.Class), getattr(item, "originalname", item.name))
        if seen[function] % marker.args[0]:
            item.add_marker(pytest.mark.slow)
        seen[function] += 1


def _case_of(item: pytest.Item) -> str | None:
    values = item.callspec.params.values() if isinstance(item, pytest.Function) and hasattr(item, "callspec") else ()
    return next((name for value in values if (name := str(value)) in CASES), None)


def pytest_collection_finish() -> None:
    """What was imported and collected stays; Python looks for cycles in what tests make, and less often.

    What torch keeps of shapes while it exports is of use where a model has equal layers, which is not so here.
    """
    torch._dynamo.config.fake_tensor_cache_enabled = False
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 20)


ONCE = (
    "derive", "emit", "explain", "linalg", "lower", "notation", "plan", "program", "quantities", "rules", "runtime",
    "verification",
)  # fmt: skip
"""Rooms of what comes after the capture, and changes nothing of it."""
ANEW = (
    "test_captured", "test_check_faults", "test_differentiated", "test_errors", "test_errors_options", "test_warnings",
)  # fmt: skip
"""Files there that plant a fault in the capture, or are about what it says."""
CAPTURES = Captures(compiler.capture)


@pytest.fixture(autouse=True)
def prepared(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same numbers and the same processor for every test; what is proved, and what is captured once."""
    SEED(crc32(request.node.nodeid.encode()))
    monkeypatch.setattr(processor, "made", lambda: ("GenuineIntel", 6))
    if not request.config.getoption("--prove") and request.path.stem not in PROVED:
        monkeypatch.setattr(api, "prove", lambda *_: "not checked: the test does that")
    if request.path.parent.name in ONCE and request.path.stem not in ANEW:
        for module in (compiler, single):
            monkeypatch.setattr(module, "capture", CAPTURES)
