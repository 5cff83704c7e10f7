"""A scene as Graphviz text: nodes and edges without places, parts as clusters."""

from __future__ import annotations

from collections.abc import Iterator

from .scene import Kind, Line, Scene, Shape, Wire

_STYLE = {
    Kind.TENSOR: 'shape=box, style="rounded,filled", fillcolor="#dbe8f8"',
    Kind.MAP: 'shape=box, style=filled, fillcolor="#fdeecb"',
    Kind.DELTA: 'shape=square, style=filled, fillcolor=black, width=0.12, label=""',
    Kind.WINDOW: 'shape=trapezium, style=filled, fillcolor="#dff1e3"',
    Kind.SELECTION: 'shape=diamond, style=filled, fillcolor="#f3e2f2"',
    Kind.DOT: "shape=point, width=0.08",
    Kind.END: "shape=plaintext",
    Kind.CALL: 'shape=box, style=filled, fillcolor="#dbe8f8"',
    Kind.VALUE: "shape=ellipse",
    Kind.PHASE: 'shape=box, style=filled, fillcolor="#fdeecb"',
}
_BATCH = 'color="#c2410c", fontcolor="#c2410c", penwidth=2'


def dot(scene: Scene) -> str:
    """The whole graph. Scales, signs and captions are notes next to the nodes."""
    flow = any(wire.kind is Line.FLOW for wire in scene.wires)
    lines = [
        "digraph tnbackprop {",
        f"  graph [rankdir={'TB' if flow else 'LR'}, compound=true];",
        '  node [fontname="Helvetica", fontsize=11];',
        f'  edge [fontname="Helvetica", fontsize=11{"" if flow else ", dir=none"}];',
        *_scene(scene, "", 1),
    ]
    return "\n".join([*lines, "}\n"])


def _scene(scene: Scene, prefix: str, depth: int) -> Iterator[str]:
    indent = "  " * depth
    for k, shape in enumerate(scene.shapes):
        name = f"{prefix}{k}"
        if shape.inner:
            yield f"{indent}subgraph {quoted('cluster_' + name)} {{"
            yield f'{indent}  graph [style=dashed, color="#777777", tooltip={quoted(shape.note)}];'
            yield f'{indent}  {quoted(name)} [shape=point, style=invis, label=""];'
            yield from _scene(shape.inner, f"{name}.", depth + 1)
            yield f"{indent}}}"
        else:
            yield f"{indent}{quoted(name)} [{_node(shape)}];"
    for k, words in enumerate(scene.words):
        yield f"{indent}{quoted(f'{prefix}w{k}')} [shape=plaintext, label={quoted(words.text)}];"
    yield from (f"{indent}{_edge(wire, scene, prefix)}" for wire in scene.wires)


def _node(shape: Shape) -> str:
    label = f", label={quoted(chr(10).join(shape.lines))}" if shape.lines else ""
    batch = f", {_BATCH}" if shape.batch else ""
    return f"{_STYLE[shape.kind]}{label}{batch}, tooltip={quoted(shape.note)}"


def _edge(wire: Wire, scene: Scene, prefix: str) -> str:
    a, b = (quoted(prefix + ".".join(map(str, end))) for end in wire.ends)
    said = [f"label={quoted(wire.leg)}"] if wire.label else []
    said += [_BATCH] if wire.kind is Line.BATCH else []
    for end, which in zip(wire.ends, ("ltail", "lhead"), strict=True):
        if len(end) == 1 and scene.shapes[end[0]].inner:
            said.append(f"{which}={quoted(f'cluster_{prefix}{end[0]}')}")
    return f"{a} -> {b} [{', '.join([*said, f'tooltip={quoted(wire.note)}'])}];"


def quoted(text: str) -> str:
    """A string of the DOT language."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
