"""The gallery: every example with what it prints and draws, made at build time by running it."""

from __future__ import annotations

import ast
import contextlib
import io
import runpy
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

EXAMPLES = Path(__file__).parent.parent / "examples"
TITLES = {
    "tour": "A tour of the stages",
    "layers": "Six layers",
    "add_a_layer": "Add a layer",
    "add_a_quantity": "Add a quantity",
    "new_quantities": "Three quantities more",
    "quantity_in_phases": "A quantity in two phases, with tensors that are handed in",
    "training_step": "A training loop of one's own, with curvature",
    "add_a_propagation": "Add a propagation",
    "add_a_lowering": "Add a lowering",
    "mixture_of_experts": "Mixtures of experts",
    "second_order": "Second-order optimisers",
    "draw": "Pictures",
}
ARGUMENTS = {"draw": ["{folder}"], "second_order": ["--quick", "--output", "{folder}/second_order.png"]}
MOST_LINES = 40
HEAD = """# Gallery

The programs in `examples/`, with what they print and draw. Each is run when this page is built, and is a test. They use
nothing but the public names, so each is a start for one of your own.
"""


def gallery() -> tuple[str, dict[str, bytes]]:
    """The page, and the pictures that stand in it: file name -> content."""
    assert set(TITLES) == {path.stem for path in EXAMPLES.glob("*.py")}
    lines, pictures = [HEAD], {}
    for name, title in TITLES.items():
        printed, drawn = run(name)
        pictures |= drawn
        lines += [f"\n## {title}\n", *section(name, printed, drawn)]
    return "\n".join(lines) + "\n", pictures


def run(name: str) -> tuple[str, dict[str, bytes]]:
    """What an example prints, and the pictures that it writes."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as printed:
        arguments = [argument.format(folder=folder) for argument in ARGUMENTS.get(name, [])]
        with mock.patch.object(sys, "argv", [name, *arguments]):
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        files = [path for path in sorted(Path(folder).iterdir()) if path.suffix in (".svg", ".png")]
        return printed.getvalue().replace(folder, "pictures"), {path.name: path.read_bytes() for path in files}


def section(name: str, printed: str, drawn: dict[str, bytes]) -> Iterator[str]:
    """The docstring, the pictures, what was printed (its first lines), and the source behind a click."""
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    yield ast.get_docstring(ast.parse(source)) or ""
    for file in drawn:
        title = Path(file).stem.replace("_", " ")
        yield f'\n<figure markdown="span">\n  ![{title}](pictures/{file})'
        yield f"  <figcaption>{title}</figcaption>\n</figure>"
    shown = printed.rstrip("\n").splitlines()
    if not drawn or len(shown) <= MOST_LINES // 2:
        rest = ["…"] if len(shown) > MOST_LINES else []
        yield "\n```text\n" + "\n".join([*shown[:MOST_LINES], *rest]) + "\n```"
    yield f'\n??? quote "examples/{name}.py"\n'
    yield "    ```python"
    yield from ("    " + line if line else "" for line in source.rstrip("\n").splitlines())
    yield "    ```"
