"""Words: what is named in the code has the field's names, and none of the private ones that the design rules out."""

from __future__ import annotations

import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "tnbackprop"
PRIVATE = {
    "ride", "rides", "riding", "beside", "apart", "owes", "held", "pinned", "follows", "tail", "tails", "outs",
}  # fmt: skip
KNOWN = {"diagram/core.py": ["held"]}  # the earlier name of Diagram.part, which others' code has
FILES = sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def private(source: str) -> list[str]:
    """The names of a source that have such a word in them."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    names = (token.string for token in tokens if token.type == tokenize.NAME)
    return [name for name in names if PRIVATE & set(re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower().split("_"))]


@pytest.mark.parametrize("file", FILES)
def test_names(file: str) -> None:
    assert private((PACKAGE / file).read_text(encoding="utf-8")) == KNOWN.get(file, [])
    assert not PRIVATE & set(re.split(r"[/._]", file))


def test_a_name_is_found() -> None:
    assert private("def _taken_apart(BesideIt, routs): pass  # held") == ["_taken_apart", "BesideIt"]
