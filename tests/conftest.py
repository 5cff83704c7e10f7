"""Every test draws the same numbers, whatever ran before it, and plans for the same processor."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

from tnbackprop.compiler.plan import processor

torch.manual_seed(0)  # what modules draw when they are imported


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    torch.manual_seed(crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are the same on every machine."""
    monkeypatch.setattr(processor, "vendor", lambda: "GenuineIntel")
