"""The guide: its Python blocks run and print what stands below them; the generated page has every operation."""

from __future__ import annotations

import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import tnbackprop as tn
from tnbackprop.rules.declared import TABLE as MODULES

from ..cases import CASES
from .test_examples import blocks, same_text

DOCS = Path(__file__).parent.parent.parent / "docs"
PAGES = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
LANGUAGES = ("python", "text", "py", "sh")
"""`text title="prints"` is what the block before it prints; `py` is another library's code, which is not run here."""
OWN = {"batch_norm_eval", "cross_entropy", "cnn", "where", "softmax"}


@pytest.fixture(autouse=True)
def empty_registry() -> Iterator[None]:
    """Nothing that a page registers outlives it."""
    with tn.registered():
        yield


@pytest.mark.thinned(24)
@pytest.mark.parametrize("page", PAGES)
def test_blocks(page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One page is one script."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "guide"}
    text = PAGES[page]
    for source, shown in re.findall(
        r'^```python\n(.*?)^```\n(?:\n```text title="prints"\n(.*?)^```\n)?', text, flags=re.MULTILINE | re.DOTALL
    ):
        line = text[: text.index(source)].count("\n")
        exec(compile("\n" * line + source, str(DOCS / page), "exec", dont_inherit=True), namespace)
        same_text(capsys.readouterr().out, shown)


@pytest.mark.parametrize("page", PAGES)
def test_fences(page: str) -> None:
    """No block is of a kind that would silently not be run, and none that prints goes without its output."""
    fences = re.findall(r"^```(\w*)(.*)$", PAGES[page], flags=re.MULTILINE)
    assert {language for language, _ in fences} <= {*LANGUAGES, ""}
    assert all(not info for language, info in fences if language == "python")
    outputs = re.findall(r'^```text title="prints"$', PAGES[page], flags=re.MULTILINE)
    assert len(re.findall(r'^```\n\n```text title="prints"$', PAGES[page], flags=re.MULTILINE)) == len(outputs)


def test_every_quantity_is_described() -> None:
    """In the table of quantities, with its key."""
    kinds = {name: kind for name in tn.__all__ if isinstance(kind := getattr(tn, name), type)}
    for name, kind in kinds.items():
        if issubclass(kind, tn.Quantity) and kind is not tn.Quantity:
            assert f"`{name}`" in PAGES["quantities.md"] and f"`{kind().name}`" in PAGES["quantities.md"], name


def test_every_public_name_is_mentioned() -> None:
    guide = "\n".join(PAGES.values())
    assert [name for name in tn.__all__ if not re.search(rf"\b{name}\b", guide)] == []


def test_operations() -> None:
    """Every target has a row; the formula is that of the rule, and a case stands beside the operations it has."""
    made = runpy.run_path(str(DOCS / "generate.py"))
    page = made["operations"](case for case in CASES if case.name in OWN)
    rows = re.findall(r"^\| `(\S+?)` \| (.*) \| (.*) \|$", page, flags=re.MULTILINE)
    assert {name for name, _, _ in rows} == {str(target) for target in tn.RULES if target not in MODULES}
    by_name = {name: (formula, case) for name, formula, case in rows}
    assert by_name["aten.where.self"][1] == "`where`"
    softmax = '<code class="formula">∂output/∂input = output[n, c] &#42; (delta[c, k] - output[n, k])</code>'
    assert by_name["aten.softmax.int"] == (softmax, "`softmax`")
    assert by_name["aten._softmax.default"] == ("as `aten.softmax.int`", "")
    assert by_name["aten.gelu.default"] == ("", "")


def test_pictures() -> None:
    made = runpy.run_path(str(DOCS / "generate.py"))["pictures"]()
    guide = "\n".join(PAGES.values())
    for name, svg in made.items():
        assert svg.startswith("<svg") and f"pictures/{name}" in guide, name


def test_reference() -> None:
    """Every public name once, and docstrings as Markdown."""
    pytest.importorskip("griffe")
    made = runpy.run_path(str(DOCS / "reference.py"))
    names = re.findall(r"^::: tnbackprop\.(\w+)$", made["reference"](), flags=re.MULTILINE)
    assert sorted(names) == sorted(tn.__all__)
    text = "A [N, *p], `[*q]`.\n\nfirst   a thing\n        goes on\nother_  b\n\nRaises.\n\n    code[*s]"
    want = "A [N, \\*p], `[*q]`.\n\n\n- `first`: a thing\n    goes on\n- `other_`: b\n\nRaises.\n\n    code[*s]"
    assert "\n".join(made["markdown"](text)) == want


def test_gallery() -> None:
    """Every example has a title; one of them as it stands in the page."""
    made = runpy.run_path(str(DOCS / "gallery.py"))
    assert set(made["TITLES"]) == {path.stem for path in (DOCS.parent / "examples").glob("*.py")}
    printed, drawn = made["run"]("add_a_lowering")
    section = "\n".join(made["section"]("add_a_lowering", printed, drawn))
    assert section.startswith("A lowering from outside") and "```text\nbatched matrix products" in section
    assert '??? quote "examples/add_a_lowering.py"\n\n    ```python\n    """A lowering' in section


def test_links_between_pages() -> None:
    """Those that MkDocs would call broken, and files of the repository that are named."""
    known = {*PAGES, "operations.md", "api.md", "gallery.md"}
    for page, text in PAGES.items():
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert target.startswith(("https://", "pictures/")) or target in known, f"{page}: {target}"
        for path in re.findall(r"`((?:examples|tests|benchmarks|tnbackprop)/[\w./]+)`", text):
            assert (DOCS.parent / path).exists(), f"{page}: {path}"


def test_every_page_has_blocks() -> None:
    assert [page for page, text in PAGES.items() if not blocks("python", text)] == []
