"""What can be drawn, and the drawing as a person holds it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..diagram.core import Diagram, Leg, Part, hint_of, operand_tensors
from ..errors import InputError
from ..quantities.factors import Factors
from ..runtime import Program
from .dot import dot
from .flow import flow_scene
from .labels import Names
from .network import diagram_scene, words
from .paper import pdf, png
from .scene import Kind, Scene, Shape, in_lines, side_by_side, stacked
from .svg import svg
from .tikz import tikz

_GAP = 28.0
_WIDEST = 1400.0

Drawable = Diagram | Factors | Program | Mapping[str, Diagram] | Sequence[Diagram | Factors]


@dataclass(frozen=True)
class Drawing:
    """A picture as text: `svg`, `dot` (Graphviz) and `tikz`. A notebook shows it."""

    scene: Scene

    @property
    def svg(self) -> str:
        return svg(self.scene)

    @property
    def dot(self) -> str:
        return dot(self.scene)

    @property
    def tikz(self) -> str:
        return tikz(self.scene)

    def save(self, path: str | Path, *, force: bool = False) -> Path:
        """Write .svg, .dot, .tex, .png or .pdf, by the suffix; an existing file only with `force`. Raises `InputError`.

        .png and .pdf are made by cairosvg: ``pip install 'tnbackprop[pictures]'``.
        """
        path = Path(path)
        check_suffix(path)
        if path.exists() and not force:
            raise InputError(f"{path} exists: choose another name, or save(..., force=True) to replace it")
        try:
            path.write_bytes(FORMATS[path.suffix](self.scene))
        except OSError as error:
            raise InputError(f"{path} cannot be written: {error.strerror}") from error
        return path

    def _repr_svg_(self) -> str:
        return self.svg

    def __repr__(self) -> str:
        shapes = list(_all_shapes(self.scene))
        counts: Counter[Kind] = Counter(shape.kind for shape in shapes if shape.kind not in (Kind.DOT, Kind.END))
        shown = ", ".join(f"{counts[kind]} {kind.value}{'s' * (counts[kind] > 1)}" for kind in Kind if counts[kind])
        return f"Drawing({shown or 'nothing'}; {self.scene.bounds.w:.0f} × {self.scene.bounds.h:.0f})"


FORMATS: Mapping[str, Callable[[Scene], bytes]] = {
    ".svg": lambda scene: svg(scene).encode(),
    ".dot": lambda scene: dot(scene).encode(),
    ".tex": lambda scene: tikz(scene).encode(),
    ".png": png,
    ".pdf": pdf,
}


def check_suffix(path: Path) -> None:
    """Raises `InputError` where a drawing has no such format."""
    if path.suffix not in FORMATS:
        raise InputError(f"{path}: a drawing is saved as {', '.join(FORMATS)}, not {path.suffix or 'without suffix'}")


def draw(what: Drawable, *, title: str = "", names: Names | None = None, depth: int | None = None) -> Drawing:
    """A tensor network picture.

    A `Diagram`; the `Factors` of a Kronecker cut, side by side over their assumption; a mapping from names to diagrams,
    one equation below another; a sequence of diagrams or factors, with arrows between (before and after a rewrite);
    or a `Program`: the captured model, with the operands that are handed in and what is computed between phases.

    Operands are nodes, legs are wires with their names: a wire that ends in a name is an output leg, every other is
    summed, one that joins more than two is a dot. Wires of the batch are thick. A leg of size 1 on which nothing
    depends is left out.

    names  what to show instead of a tensor's or a leg's name: {"g_layer_0": "g"}
    depth  of a program: modules that are so deep are one box each, 1 for those of the model itself; None: every call

    Raises `InputError` for anything else, and for `names` that are not there or would coincide.
    """
    names = dict(names or {})
    if depth is not None and (not isinstance(what, Program) or isinstance(depth, bool) or depth < 1):
        raise InputError(f"depth={depth!r} of {_described(what)}: it is a number from 1 on, for a Program")
    scene = _scene(what, names) if not isinstance(what, Program) else flow_scene(what.compiled, names, depth)
    _check(names, what)
    return Drawing(stacked([words(title, 1.2), scene], 14.0) if title else scene)


def _scene(what: Drawable, names: Names) -> Scene:
    match what:
        case Diagram():
            return diagram_scene(what, names)
        case Factors():
            return _factors(what, names)
        case Mapping() if what and all(isinstance(each, Diagram) for each in what.values()):
            return stacked([_equation(name, each, names) for name, each in what.items()], _GAP, centred=False)
        case Sequence() if what and all(isinstance(each, Diagram | Factors) for each in what):
            return _rewrites([_scene(each, names) for each in what])
    kinds = "a Diagram, Factors, a Program, a mapping from names to diagrams, or a sequence of diagrams"
    remedy = "\n  Of a model draw its program, tn.draw(tn.compile(…))." if isinstance(what, nn.Module) else ""
    raise InputError(f"cannot draw {_described(what)}: draw takes {kinds}{remedy}")


def _described(what: object) -> str:
    if isinstance(what, Mapping | Sequence) and not isinstance(what, str):
        inside = what.values() if isinstance(what, Mapping) else what
        kinds = ", ".join(dict.fromkeys(type(each).__name__ for each in inside))
        return f"a {type(what).__name__} of {kinds}" if kinds else f"an empty {type(what).__name__}"
    return f"a {type(what).__name__}"


def _equation(name: str, diagram: Diagram, names: Names) -> Scene:
    legs = ", ".join(names.get(leg.name, leg.name) for leg in diagram.legs)
    left = words(f"{names.get(name, name)}[{legs}]  =", 1.2)
    return side_by_side([left, diagram_scene(diagram, names)], 16.0)


def _rewrites(scenes: Sequence[Scene]) -> Scene:
    arrowed = [side_by_side([words("→", 1.8), scene], _GAP) for scene in scenes[1:]]
    return in_lines([scenes[0], *arrowed], _GAP, _WIDEST)


def _factors(factors: Factors, names: Names) -> Scene:
    names = _primed(factors, names) | dict(names)
    pictures = []
    for k, diagram in enumerate(factors.diagrams):
        legs = ", ".join(names.get(leg.name, leg.name) for leg in diagram.legs)
        picture = stacked([diagram_scene(diagram, names), words(f"[{legs}]")], 10.0)
        pictures.append(side_by_side([words("⊗", 1.8), picture], _GAP) if k else picture)
    caption = words(factors.assumption)
    return stacked([in_lines(pictures, _GAP, _WIDEST), caption], 14.0)


def _primed(factors: Factors, names: Names) -> dict[str, str]:
    """i' for the second copy of i, where no other leg is shown so."""
    legs = {leg.name for diagram in factors.diagrams for leg in _legs(diagram)}
    taken = {names.get(leg, leg) for leg in legs}
    copies = {leg: leg.removesuffix("_copy") for leg in sorted(legs) if leg.endswith("_copy")}
    shown = {leg: names.get(original, original) + "'" for leg, original in copies.items()}
    return {leg: primed for leg, primed in shown.items() if primed not in taken}


def _legs(diagram: Diagram) -> Iterator[Leg]:
    yield from diagram.legs
    for product in diagram.products:
        yield from product.legs
        for op in product.operands:
            if isinstance(op, Part):
                yield from _legs(op.diagram)


def _check(names: Names, what: Drawable) -> None:
    """Every key is there, and no two different names look the same."""
    if not names:
        return
    there = set(_names_in(what))
    for name in names:
        if name not in there:
            raise InputError(f"names: no tensor or leg {name!r} in what is drawn; there are {', '.join(sorted(there))}")
    shown = Counter(names.get(name, name) for name in there)
    for name, count in shown.items():
        if count > 1 and name in names.values():
            same = sorted(old for old in there if names.get(old, old) == name)
            raise InputError(f"names: {' and '.join(map(repr, same))} would both be shown as {name!r}")


def _names_in(what: Drawable) -> Iterator[str]:
    match what:
        case Diagram():
            yield from (leg.name for leg in _legs(what))
            read = (tensor for p in what.products for op in p.operands for tensor in operand_tensors(op))
            yield from (hint_of(tensor.name) for tensor in read)
        case Factors():
            for diagram in what.diagrams:
                yield from _names_in(diagram)
        case Program():
            yield from what.compiled.graph.values
            yield from what.operands
        case Mapping():
            yield from what
            for diagram in what.values():
                yield from _names_in(diagram)
        case _:
            for each in what:
                yield from _names_in(each)


def _all_shapes(scene: Scene) -> Iterator[Shape]:
    for shape in scene.shapes:
        yield shape
        if shape.inner:
            yield from _all_shapes(shape.inner)
