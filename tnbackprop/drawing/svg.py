"""A scene as SVG: one group per shape and wire, with its class, so that a style sheet or a reader finds it again."""

from __future__ import annotations

from collections.abc import Iterator
from xml.sax.saxutils import escape, quoteattr

from .scene import Box, Kind, Line, Scene, Shape, Wire, Words
from .words import LINE, is_math

MARGIN = 12.0

_STYLE = """
text { font: 12px Helvetica, Arial, 'DejaVu Sans', sans-serif; text-anchor: middle; }
text.math { font: italic 15px 'STIX Two Text', 'Times New Roman', 'DejaVu Serif', serif; }
.leg path, .batch path, .flow path { fill: none; stroke: #333; stroke-width: 1.2; }
.batch path { stroke: #c2410c; stroke-width: 2.2; }
.batch text { fill: #c2410c; }
.halo { fill: #fff; }
.tensor .body { fill: #dbe8f8; stroke: #27548a; }
.map .body { fill: #fdeecb; stroke: #99660a; }
.window .body { fill: #dff1e3; stroke: #2c7a49; }
.selection .body { fill: #f3e2f2; stroke: #85407f; }
.delta .body, .dot .body { fill: #222; }
.dot.batch .body { fill: #c2410c; }
.part > .body, .sum > .body { fill: none; stroke: #777; stroke-dasharray: 5 3; }
.sum > .body { fill: #fbfbfb; }
.call .body { fill: #dbe8f8; stroke: #27548a; }
.value .body { fill: #fff; stroke: #777; }
.phase .body { fill: #fdeecb; stroke: #99660a; }
"""


def svg(scene: Scene) -> str:
    """The whole document, on white."""
    bounds = scene.bounds
    w, h = bounds.w + 2 * MARGIN, bounds.h + 2 * MARGIN
    moved = scene.at(w / 2, h / 2)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_n(w)}" height="{_n(h)}" viewBox="0 0 {_n(w)} {_n(h)}">',
            f"<style>{escape(_STYLE)}</style>",
            '<defs><marker id="tip" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path d="M0 0L8 4L0 8z" fill="#333"/></marker></defs>',
            f'<rect width="{_n(w)}" height="{_n(h)}" fill="#fff"/>',
            *_scene(moved, ""),
            "</svg>\n",
        ]
    )


def _scene(scene: Scene, prefix: str) -> Iterator[str]:
    yield from (_wire(wire, prefix) for wire in scene.wires)
    for k, shape in enumerate(scene.shapes):
        yield from _shape(shape, f"{prefix}{k}")
    yield from (_words(words) for words in scene.words)


def _wire(wire: Wire, prefix: str) -> str:
    ends = " ".join(prefix + ".".join(map(str, end)) for end in wire.ends)
    marker = ' marker-end="url(#tip)"' if wire.kind is Line.FLOW else ""
    points = [f"{_n(x)} {_n(y)}" for x, y in wire.path]
    path = f"M{points[0]}Q{points[1]} {points[2]}" if wire.bent else "M" + "L".join(points)
    name = ""
    if wire.label:
        b = wire.label
        name = f'<rect class="halo" x="{_n(b.left)}" y="{_n(b.top)}" width="{_n(b.w)}" height="{_n(b.h)}"/>'
        name += _text((wire.leg,), b)
    head = f'<g class="{wire.kind.value}" data-leg={quoteattr(wire.leg)} data-ends="{ends}">'
    return f'{head}<title>{escape(wire.note)}</title><path d="{path}"{marker}/>{name}</g>'


def _shape(shape: Shape, name: str) -> Iterator[str]:
    classes = shape.kind.value + (" batch" if shape.batch else "")
    yield f'<g class="{classes}" data-id="{name}"><title>{escape(shape.note)}</title>{_body(shape)}'
    if shape.inner:
        yield from _scene(shape.inner, f"{name}.")
    yield f"{_text(shape.lines, shape.box) if shape.lines else ''}</g>"


def _body(shape: Shape) -> str:
    b = shape.box
    match shape.kind:
        case Kind.END:
            return ""
        case Kind.DOT:
            return f'<circle class="body" cx="{_n(b.x)}" cy="{_n(b.y)}" r="{_n(b.w / 2)}"/>'
        case Kind.WINDOW:
            return _polygon((b.left + 14, b.top), (b.right - 14, b.top), (b.right, b.bottom), (b.left, b.bottom))
        case Kind.SELECTION:
            upper, lower = (
                ((b.left + 16, b.top), (b.right - 16, b.top)),
                ((b.right - 16, b.bottom), (b.left + 16, b.bottom)),
            )
            return _polygon((b.left, b.y), *upper, (b.right, b.y), *lower)
        case _:
            square = {Kind.CALL: 4.0, Kind.PHASE: 4.0, Kind.PART: 6.0, Kind.SUM: 6.0}
            radius = (square | {Kind.TENSOR: b.h / 2, Kind.VALUE: b.h / 2}).get(shape.kind, 0.0)
            place = f'x="{_n(b.left)}" y="{_n(b.top)}" width="{_n(b.w)}" height="{_n(b.h)}"'
            return f'<rect class="body" {place} rx="{_n(radius)}"/>'


def _polygon(*points: tuple[float, float]) -> str:
    return f'<polygon class="body" points="{" ".join(f"{_n(x)},{_n(y)}" for x, y in points)}"/>'


def _text(lines: tuple[str, ...], box: Box) -> str:
    first = box.y - LINE * (len(lines) - 1) / 2
    return "".join(
        f'<text{" class=" + chr(34) + "math" + chr(34) if is_math(line) else ""} x="{_n(box.x)}" '
        f'y="{_n(first + LINE * k)}" dy=".35em">{escape(line)}</text>'
        for k, line in enumerate(lines)
    )


def _words(words: Words) -> str:
    size = f' style="font-size:{_n(12 * words.size)}px"' if words.size != 1 else ""
    return f'<text x="{_n(words.box.x)}" y="{_n(words.box.y)}" dy=".35em"{size}>{escape(words.text)}</text>'


def _n(number: float) -> str:
    """At most one decimal, never -0."""
    return f"{round(number, 1) + 0.0:g}"
