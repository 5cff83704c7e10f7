"""The API reference: a page that names every public object in groups, and docstrings as Markdown for mkdocstrings."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from typing import Any

import griffe

import tnbackprop as tn

HEAD = """# API reference

Made of the docstrings at build time: every name in `tnbackprop.__all__`. Errors are in [Errors](errors.md), formulas of
the quantities in [Quantities](quantities.md).
"""
GROUPS = {
    "Compile and run": (
        "compile", "compile_many", "compute", "over", "projections", "Program", "Result", "Graphed", "Indefinite",
        "attach", "Attached", "HANDED", "HANDED_MEAN", "Halves", "Saved",
    ),
    "Products and kernels": (
        "ggn_product", "hessian_product", "fisher_product", "CurvatureProduct", "Blocks", "OverData", "Reduction",
        "ntk",
    ),
    "Kronecker factors": (
        "KroneckerFactors", "Role", "Kind", "Damping", "Eigen", "Spectral", "Template", "Fisher", "Sharing", "Bias",
        "Factors",
    ),
    "Declare layers": (
        "einsum_layer", "EinsumLayer", "rule", "registered", "primitive", "Rule", "Root", "Table", "Primitive",
        "Declared", "RULES", "REGISTRY",
    ),
    "Write quantities": (
        "Quantity", "Uses", "Cotangents", "Diagram", "Leg", "N", "Scale", "Stream", "Clipping",
        "Structure",
    ),
    "Write propagations": ("Propagation", "Output", "Residual", "Handed"),
    "Verify, draw, generate": ("verify", "Verification", "draw", "Drawing", "generate", "Generated", "Target"),
    "Errors": ("TnError", "RuleError", "UnsupportedError", "InputError", "InvariantError", "VerificationError"),
}  # fmt: skip
"""What is in no group is a quantity or a propagation, and has a group of its own."""


def reference() -> str:
    """The page. A public name that is in no group, and is no kind of quantity or propagation, is an error."""
    groups = dict(GROUPS)
    listed = {name for names in groups.values() for name in names}
    rest = [name for name in tn.__all__ if name not in listed]
    groups["Quantities"] = tuple(name for name in rest if is_kind(name, tn.Quantity))
    groups["Propagations"] = tuple(name for name in rest if is_kind(name, tn.Propagation))
    missing = set(tn.__all__) ^ {name for names in groups.values() for name in names}
    assert not missing, f"no group of the reference has {missing}"
    lines = [HEAD]
    for title, names in groups.items():
        lines.append(f"\n## {title}\n")
        lines += [f"::: tnbackprop.{name}\n" for name in names]
    return "\n".join(lines)


def is_kind(name: str, kind: type) -> bool:
    value = getattr(tn, name)
    return isinstance(value, type) and issubclass(value, kind)


class Docstrings(griffe.Extension):
    """Docstrings are written for a terminal: names with what they mean in columns become a list, stars stay stars."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(markdown(obj.docstring.value))


def markdown(text: str) -> Iterator[str]:
    """A docstring as Markdown."""
    lines, inside = textwrap.dedent(text).splitlines(), False
    for k, line in enumerate(lines):
        entry = re.match(r"(\w[\w, ]*?|`[^`]+`) {2,}(\S.*)", line)
        if entry:
            if not inside:
                yield ""
            inside = True
            name = entry[1].strip("`")
            yield f"- `{name}`: {escaped(entry[2])}"
        elif inside and line.startswith("  "):
            yield "    " + escaped(line.strip())
        else:
            if inside and line.strip():
                yield ""
            inside = inside and not line.strip() and re.match(r"\w+ {2,}\S", "".join(lines[k + 1 : k + 2])) is not None
            yield line if line.startswith("    ") else escaped(line)


def escaped(line: str) -> str:
    """Without emphasis by the stars and underscores of formulas; code in backticks as it is."""
    parts = re.split(r"(`+[^`]*`+)", line)
    return "".join(part if k % 2 else re.sub(r"([*_<])", r"\\\1", part) for k, part in enumerate(parts))
