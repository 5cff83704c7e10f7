"""A document of headings, text, formulas, tables and pictures; as text, Markdown or HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from ..compiler.explain.text import table
from ..drawing import draw
from ..drawing.picture import Drawable


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 1


@dataclass(frozen=True)
class Words:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Formulas:
    """Lines as they are."""

    lines: tuple[str, ...]


@dataclass(frozen=True)
class Grid:
    """A table; the columns in `right` hold numbers."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Picture:
    """Drawn only where pictures can be shown: a layout may take seconds."""

    what: Drawable
    caption: str


Block = Heading | Words | Formulas | Grid | Picture
UNDERLINE = "=-~"


def as_text(blocks: Iterable[Block]) -> str:
    return "\n\n".join(text for block in blocks if (text := block_text(block)))


def block_text(block: Block) -> str:
    match block:
        case Heading():
            return f"{block.text}\n{UNDERLINE[block.level - 1] * len(block.text)}"
        case Words():
            return block.text
        case Formulas():
            return "\n".join(f"  {line}" for line in block.lines)
        case Grid():
            return "\n".join(table([block.header, *block.rows], "  ", block.right))
        case Picture():
            return ""


def as_markdown(blocks: Iterable[Block]) -> str:
    return "\n\n".join(text for block in blocks if (text := _markdown(block))) + "\n"


def _markdown(block: Block) -> str:
    match block:
        case Heading():
            return f"{'#' * block.level} {block.text}"
        case Words():
            return block.text
        case Formulas():
            return "```text\n" + "\n".join(block.lines) + "\n```"
        case Grid():
            rule = ["---:" if k in block.right else "---" for k in range(len(block.header))]
            return "\n".join(_pipes(row) for row in (block.header, rule, *block.rows))
        case Picture():
            return ""


def _pipes(row: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in row) + " |"


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
pre, td.code { font: 13px/1.4 ui-monospace, monospace } pre { background: #f6f6f4; padding: .6rem; overflow-x: auto }
table { border-collapse: collapse; font-size: 13px } th, td { padding: .15rem .6rem; border-bottom: 1px solid #ddd }
th { text-align: left } .right { text-align: right } figure, .wide { margin: 1rem 0; overflow-x: auto }
figcaption { color: #666; font-size: 13px } h2 { margin-top: 2.5rem; border-bottom: 1px solid #bbb }
""".strip()


def as_html(blocks: Iterable[Block], title: str) -> str:
    """One file that needs nothing else: pictures are inside."""
    body = "\n".join(_html(block) for block in blocks)
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'


def _html(block: Block) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{escape(block.text)}</h{block.level}>"
        case Words():
            return f"<p>{escape(block.text)}</p>"
        case Formulas():
            return "<pre>" + escape("\n".join(block.lines)) + "</pre>"
        case Grid():
            rows = [_cells("th", block.header, block.right), *(_cells("td", row, block.right) for row in block.rows)]
            return '<div class="wide"><table>' + "\n".join(rows) + "</table></div>"
        case Picture():
            svg = draw(block.what).svg
            return f"<figure>{svg[svg.index('<svg') :]}<figcaption>{escape(block.caption)}</figcaption></figure>"


def _cells(tag: str, row: Sequence[str], right: frozenset[int]) -> str:
    marked = (f'<{tag} class="right">' if k in right else f"<{tag}>" for k in range(len(row)))
    return "<tr>" + "".join(f"{start}{escape(cell)}</{tag}>" for start, cell in zip(marked, row, strict=True)) + "</tr>"
