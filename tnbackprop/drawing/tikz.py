"""A scene as a tikzpicture, for \\input in a paper: styles at the top, then wires, nodes and words at their places."""

from __future__ import annotations

from collections.abc import Iterator

from .scene import Kind, Line, Point, Scene, Shape, Wire, Words
from .words import tex

_PT = 0.75
"""A pixel in points."""

_HEAD = r"""% \usepackage{tikz} \usetikzlibrary{shapes.geometric, shapes.symbols}
\begin{tikzpicture}[
  x=0.75pt, y=-0.75pt, font=\footnotesize, every node/.style={inner sep=0pt, align=center},
  tn leg/.style={draw=black!80, line width=0.5pt}, tn batch/.style={draw=orange!75!red!90!black, line width=1.2pt},
  tn flow/.style={tn leg, -latex}, tn name/.style={fill=white, inner sep=1pt},
  tn tensor/.style={draw=blue!50!black, fill=blue!10, rounded corners=12.7pt},
  tn map/.style={draw=brown!70!black, fill=yellow!18}, tn delta/.style={fill=black},
  tn window/.style={draw=green!40!black, fill=green!10, trapezium, trapezium stretches=true, trapezium angle=65},
  tn selection/.style={draw=violet!80!black, fill=violet!12, signal, signal to=east and west},
  tn part/.style={draw=gray, dashed, rounded corners=4pt}, tn sum/.style={tn part, fill=black!2},
  tn dot/.style={fill=black, circle}, tn end/.style={},
  tn call/.style={draw=blue!50!black, fill=blue!10, rounded corners=2pt},
  tn value/.style={draw=gray, fill=white, rounded corners=9pt},
  tn phase/.style={draw=brown!70!black, fill=yellow!18, rounded corners=2pt}]"""


def tikz(scene: Scene) -> str:
    """The environment, with the packages that it needs in a comment."""
    return "\n".join([_HEAD, *(f"  {line}" for line in _scene(scene, "")), "\\end{tikzpicture}\n"])


def _scene(scene: Scene, prefix: str) -> Iterator[str]:
    yield from (_path(wire) for wire in scene.wires)
    for k, shape in enumerate(scene.shapes):
        yield _node(shape, f"{prefix}{k}")
        if shape.inner:
            yield from _scene(shape.inner, f"{prefix}{k}-")
    yield from (_name(wire) for wire in scene.wires if wire.label)
    yield from (_words(words) for words in scene.words)


def _path(wire: Wire) -> str:
    if wire.bent:
        a, c, b = wire.path
        one, other = _between(a, c), _between(b, c)
        return f"\\draw[tn {wire.kind.value}] {_at(a)} .. controls {_at(one)} and {_at(other)} .. {_at(b)};"
    return f"\\draw[tn {wire.kind.value}] {' -- '.join(map(_at, wire.path))};"


def _between(end: Point, control: Point) -> Point:
    """The cubic control that gives the same curve as a quadratic one."""
    return end[0] + (control[0] - end[0]) * 2 / 3, end[1] + (control[1] - end[1]) * 2 / 3


def _node(shape: Shape, name: str) -> str:
    box = shape.box
    size = f"minimum width={_n(_PT * box.w)}pt, minimum height={_n(_PT * box.h)}pt"
    style = f"tn {shape.kind.value}"
    if shape.batch:
        style += ", fill=orange!75!red!90!black" if shape.kind is Kind.DOT else ", text=orange!75!red!90!black"
    text = " \\\\ ".join(map(tex, shape.lines))
    return f"\\node[{style}, {size}] ({name}) at {_at((box.x, box.y))} {{{text}}};"


def _name(wire: Wire) -> str:
    assert wire.label
    colour = ", text=orange!75!red!90!black" if wire.kind is Line.BATCH else ""
    return f"\\node[tn name{colour}] at {_at((wire.label.x, wire.label.y))} {{{tex(wire.leg)}}};"


def _words(words: Words) -> str:
    size = "[font=\\normalsize] " if words.size > 1 else ""
    return f"\\node {size}at {_at((words.box.x, words.box.y))} {{{tex(words.text)}}};"


def _at(point: Point) -> str:
    return f"({_n(point[0])},{_n(point[1])})"


def _n(number: float) -> str:
    return f"{round(number, 1) + 0.0:g}"
