"""The names of the stages, in order."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """What has just been made."""

    CAPTURE = "capture"
    BIND = "bind"
    DERIVE = "derive"
    PLAN = "plan"
    PROGRAM = "program"
    EMIT = "emit"
