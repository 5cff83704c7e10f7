"""A captured model as a scene: calls from top to bottom, each wire with the shape of its value.

Layers by longest path, places within a layer by the mean of the neighbours (Sugiyama et al. 1981); a wire over
several layers bends around what is between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from ..compiler import Compiled
from ..compiler.translate.graph import Call, Graph
from .between import MODEL, Key, Node, nodes
from .labels import Names
from .scene import Box, Kind, Line, Scene, Shape, Wire
from .words import LINE, width

_BETWEEN = 44.0  # layers, with room for a shape's text
_GAP = 24.0
_SWEEPS = 12


@dataclass
class _Layers:
    """Nodes by layer; a negative number is a bend of a long wire."""

    rows: list[list[int]] = field(default_factory=list)
    up: dict[int, list[int]] = field(default_factory=dict)
    down: dict[int, list[int]] = field(default_factory=dict)
    bends: dict[tuple[int, int, str], list[int]] = field(default_factory=dict)


def flow_scene(compiled: Compiled, names: Names, depth: int | None = None) -> Scene:
    """Inputs, calls, and what the model gives. Parameters stand in the call that reads them.

    Below the loss are phases, with the totals that they read and what they make of them, and the quantities that read
    that, or operands.

    depth   modules that are so deep are one box each
    """
    shapes, edges = _nodes(compiled.graph, names, depth, nodes(compiled))
    layers = _layers(len(shapes), edges)
    widths = {k: shape.box.w for k, shape in enumerate(shapes)}
    labels: dict[int, float] = {}
    for a, b, text in edges:
        for bend in (a, *layers.bends[a, b, text]):
            labels[bend] = max(labels.get(bend, 0.0), width(text) + 8)
    xs = _columns(layers, {k: max(widths.get(k, 8.0), labels.get(k, 0.0)) for row in layers.rows for k in row})
    ys: dict[int, float] = {}
    y = 0.0
    for row in layers.rows:
        high = max((shapes[k].box.h for k in row if k >= 0), default=0.0)
        even = any(k >= 0 and shapes[k].kind is Kind.PHASE for k in row)  # their upper edges: no wire runs below a box
        ys |= {k: y + (shapes[k].box.h if even and k >= 0 else high) / 2 for k in row}
        y += high + _BETWEEN
    placed = tuple(shape.moved(xs[k], ys[k]) for k, shape in enumerate(shapes))
    return Scene(placed, tuple(_wires(placed, edges, layers, xs, ys)))


def _boxes(graph: Graph, depth: int | None) -> Iterator[tuple[Call, ...]]:
    """The calls that share a box: those of a module that follow one another. So no box comes before what it reads."""

    def module(call: Call) -> str:
        return ".".join(call.path.split(".")[:depth])

    for path, calls in groupby(graph.calls, module):
        every = tuple(calls)
        yield from [every] if depth is not None and path else ((call,) for call in every)


def _nodes(
    graph: Graph, names: Names, depth: int | None, others: Sequence[Node]
) -> tuple[list[Shape], list[tuple[int, int, str]]]:
    """All shapes at the origin, and the edges (from, to, shape of the value)."""
    shapes: list[Shape] = []
    source: dict[str, int] = {}
    places: dict[Key, int] = {}
    edges: dict[tuple[int, int, str], None] = {}
    read = {value.name for call in graph.calls for value in call.tensors.values()}
    for name in (*graph.inputs, *graph.constants):
        if name in read:
            source[name] = len(shapes)
            shapes.append(_box(Kind.VALUE, (names.get(name, name),), str(graph.values[name])))
    for calls in _boxes(graph, depth):
        for value in (value for call in calls for value in call.tensors.values()):
            if value.name in source:
                edges[source[value.name], len(shapes), value.axes_text] = None
        for call in calls:
            source[call.output.name] = len(shapes)
        alone = len(calls) == 1
        lines = _lines(calls[0], graph, names) if alone else _summary(calls, graph, depth)
        shapes.append(_box(Kind.CALL, lines, calls[0].where if alone else f"{len(calls)} calls"))
    for name, shown in _given(graph):
        if name in source:
            edges[source[name], len(shapes), graph.values[name].axes_text] = None
            places[MODEL] = len(shapes)
            shapes.append(_box(Kind.VALUE, (shown,), str(graph.values[name])))
    for node in others:
        edges |= {(places[key], len(shapes), text): None for key, text in node.reads}
        places[node.key] = len(shapes)
        first, *rest = node.lines
        shapes.append(_box(node.kind, (names.get(first, first), *rest), ": ".join(node.key)))
    return shapes, list(edges)


def _given(graph: Graph) -> list[tuple[str, str]]:
    """The values that the program gives, with what they are called in the picture."""
    flat = [graph.output] if isinstance(graph.output, str) else _flat(graph.output)
    outputs = [(name, "output" if len(flat) == 1 else f"output {k}") for k, name in enumerate(flat)]
    return outputs + ([(graph.loss, "loss")] if graph.loss else [])


def _flat(output: object) -> list[str]:
    if isinstance(output, str):
        return [output]
    inside = output.values() if isinstance(output, Mapping) else output if isinstance(output, Sequence) else ()
    return [name for item in inside for name in _flat(item)]


def _lines(call: Call, graph: Graph, names: Names) -> tuple[str, ...]:
    """The operator, its module, and the parameters that it reads."""
    target = call.target.__name__ if isinstance(call.target, type) else str(call.target)
    op = target.removeprefix("aten.").partition(".")[0]
    lines = [f"{call.path}: {op}" if call.path else op]
    for value in call.tensors.values():
        if value.name in graph.parameters:
            dotted = graph.parameters[value.name][0]
            lines.append(f"{names.get(value.name, dotted)} {value.axes_text}")
    return tuple(lines)


def _summary(calls: Sequence[Call], graph: Graph, depth: int | None) -> tuple[str, ...]:
    """A module, and how much is inside."""
    read = {value.name: value for call in calls for value in call.tensors.values() if value.name in graph.parameters}
    sizes = [math.prod(int(size) for axis in value.axes for size in axis) for value in read.values()]
    inside = [f"{len(calls)} calls", *([f"{sum(sizes):,} parameters"] if sizes else [])]
    return ".".join(calls[0].path.split(".")[:depth]), *inside


def _box(kind: Kind, lines: tuple[str, ...], note: str) -> Shape:
    return Shape(kind, Box(0, 0, max(map(width, lines)) + 24, LINE * len(lines) + 12), lines, note)


def _layers(count: int, edges: Sequence[tuple[int, int, str]]) -> _Layers:
    """Every node below all that it reads, an input just above its first reader; bends in the layers between."""
    layer = dict.fromkeys(range(count), 0)
    for a, b, _ in sorted(edges, key=lambda edge: edge[1]):
        layer[b] = max(layer[b], layer[a] + 1)
    sources = set(range(count)) - {b for _, b, _ in edges}
    for k in sources:
        layer[k] = max(0, min((layer[b] for a, b, _ in edges if a == k), default=1) - 1)
    found = _Layers([[] for _ in range(max(layer.values(), default=0) + 1)])
    for k in range(count):
        found.rows[layer[k]].append(k)
    fresh = -1
    for edge in edges:
        chain = [edge[0]]
        for row in range(layer[edge[0]] + 1, layer[edge[1]]):
            found.rows[row].append(fresh)
            chain.append(fresh)
            fresh -= 1
        found.bends[edge] = chain[1:]
        for one, other in zip(chain, [*chain[1:], edge[1]], strict=True):
            found.down.setdefault(one, []).append(other)
            found.up.setdefault(other, []).append(one)
    return found


def _columns(layers: _Layers, widths: Mapping[int, float]) -> dict[int, float]:
    """The x of every node: order by the mean of the neighbours, then pull toward it without overlap."""
    xs: dict[int, float] = {}
    for row in layers.rows:
        _spread(row, {k: float(i) for i, k in enumerate(row)}, widths, xs)
    for sweep in range(_SWEEPS):
        downward = sweep % 2 == 0
        for row in layers.rows if downward else reversed(layers.rows):
            neighbours = layers.up if downward else layers.down
            wanted = {k: _mean([xs[j] for j in neighbours.get(k, ())] or [xs[k]]) for k in row}
            if sweep < _SWEEPS - 4:
                row.sort(key=lambda k: round(wanted[k], 3))
            _spread(row, wanted, widths, xs)
    return xs


def _spread(row: Sequence[int], wanted: Mapping[int, float], widths: Mapping[int, float], xs: dict[int, float]) -> None:
    """In this order, as close to `wanted` as the widths allow: groups that touch share their mean shift."""
    groups: list[tuple[list[int], float]] = []  # members, x of the first
    offset: dict[int, float] = {}
    for k in row:
        offset[k] = 0.0
        groups.append(([k], wanted[k]))
        while len(groups) > 1 and _end(groups[-2], offset, widths) + widths[groups[-1][0][0]] / 2 > groups[-1][1]:
            (right, _), (left, _) = groups.pop(), groups.pop()
            shift = offset[left[-1]] + (widths[left[-1]] + widths[right[0]]) / 2 + _GAP
            offset |= {j: offset[j] + shift for j in right}
            both = left + right
            groups.append((both, _mean([wanted[j] - offset[j] for j in both])))
    for members, first in groups:
        xs |= {j: first + offset[j] for j in members}


def _end(group: tuple[list[int], float], offset: Mapping[int, float], widths: Mapping[int, float]) -> float:
    last = group[0][-1]
    return group[1] + offset[last] + widths[last] / 2 + _GAP


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _wires(
    shapes: Sequence[Shape],
    edges: Sequence[tuple[int, int, str]],
    layers: _Layers,
    xs: Mapping[int, float],
    ys: Mapping[int, float],
) -> list[Wire]:
    """From the lower edge of one box to the upper edge of the other; a value's shape is shown on its first wire."""
    wires, said = [], set()
    for a, b, text in edges:
        bends = layers.bends[a, b, text]
        enter = shapes[b].box
        path = [(xs[a], shapes[a].box.bottom), *((xs[k], ys[k]) for k in bends)]
        above = sorted(layers.up[b], key=lambda k: xs[k])
        last = bends[-1] if bends else a
        share = (above.index(last) + 1) / (len(above) + 1)
        path.append((enter.left + enter.w * share, enter.top))
        label = None
        if a not in said and text not in ("", "[]"):
            x = path[0][0] + (path[1][0] - path[0][0]) * 0.5
            label = Box(x, (path[0][1] + path[1][1]) / 2, width(text) + 4, LINE)
            said.add(a)
        wires.append(Wire(((a,), (b,)), tuple(path), Line.FLOW, text, f"{shapes[a].note}", False, label))
    return wires
