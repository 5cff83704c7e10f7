"""`tnbackprop explain`: what a program does and why, as text, Markdown or HTML with pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable

from .compiled import compiled
from .document import Block, Grid, Heading, as_html, as_markdown, as_text, block_text
from .layers import document
from .loading import free, write

try:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ModuleNotFoundError:  # an extra: the text is the same without it
    Console = None  # type: ignore[assignment, misc]


def run(arguments: argparse.Namespace) -> int:
    """0. Raises `InputError` where the file, the quantity or the batch is not there, or the output is."""
    if arguments.output is not None:
        free(arguments.output, arguments.force)
    program = compiled(arguments, ("grad",))
    title = f"{arguments.target}: {', '.join(program.quantities)}"
    blocks = list(document(program, title))
    if arguments.output is None and arguments.format == "text" and Console is not None and sys.stdout.isatty():
        _on_terminal(blocks)
        return 0
    render: dict[str, Callable[[Iterable[Block]], str]]
    render = {"text": as_text, "markdown": as_markdown, "html": lambda blocks: as_html(blocks, title)}
    text = render[arguments.format](blocks)
    if arguments.output is None:
        known = sys.stdout.encoding or "utf-8"  # of a terminal without Greek letters
        print(text.encode(known, "replace").decode(known))
    else:
        write(arguments.output, text, arguments.force)
        print(arguments.output)
    return 0


def _on_terminal(blocks: Iterable[Block]) -> None:
    console = Console()
    for block in blocks:
        match block:
            case Heading():
                console.print(f"\n{block.text}", style="bold", highlight=False, markup=False)
            case Grid():
                shown = Table(box=None, pad_edge=False)
                for k, name in enumerate(block.header):
                    shown.add_column(name, justify="right" if k in block.right else "left", overflow="fold")
                for row in block.rows:
                    shown.add_row(*(Text(cell) for cell in row))
                console.print(shown)
            case _:
                console.print(block_text(block), highlight=False, markup=False, soft_wrap=True)
