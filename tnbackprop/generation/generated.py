"""What `generate` gives: source text, and how it is written to a file."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from ..errors import InputError


class Target(Enum):
    """What the generated file is for."""

    TORCH = "torch"
    BACKPACK = "backpack"
    AUTOGRAD = "autograd"
    MODEL = "model"


@dataclass(frozen=True, repr=False)
class Generated:
    """The source of one file, that does not need this library. `str` of it is the source."""

    source: str
    target: Target
    what: str
    functions: tuple[str, ...]

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write the file; an existing one only with `force`. Raises `InputError`."""
        path = Path(path)
        if path.exists() and not force:
            raise InputError(f"{path} exists: choose another name, or save(..., force=True) to replace it")
        try:
            path.write_text(self.source, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"{path} cannot be written: {error.strerror}. Give a file in a folder that exists and is yours"
            ) from error
        return path

    def __str__(self) -> str:
        return self.source

    def __repr__(self) -> str:
        lines = self.source.count("\n")
        return f"Generated({self.what} for {self.target.value}: {lines} lines; {', '.join(self.functions)})"
