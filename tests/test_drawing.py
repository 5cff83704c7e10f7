"""Pictures: read back from the text they show the diagram, and nothing in them covers anything else."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from random import Random
from xml.etree import ElementTree

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.algebra import inline
from tnbackprop.approximate import Factors
from tnbackprop.compiler.derived import Backward
from tnbackprop.diagram import (
    BATCH,
    Delta,
    Diagram,
    Leg,
    Map,
    N,
    Operand,
    Part,
    Product,
    Selection,
    Tensor,
    Window,
    argument,
)
from tnbackprop.drawing import formulas, jacobian, quantity
from tnbackprop.drawing.scene import Box, End, Kind, Scene, Wire
from tnbackprop.drawing.words import tex
from tnbackprop.errors import InputError

from .models import Attention

ROOT = Path(__file__).parents[1]
QUANTITIES = (tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(), tn.KFAC(), tn.DiagGGN())
I, J, K = Leg("i", 3), Leg("j", 4), Leg("k", 5)
ONE = sympy.Integer(1)


def one(legs: tuple[Leg, ...], *operands: Operand, scale: sympy.Expr = ONE) -> Diagram:
    return Diagram(legs, (Product(scale, operands),))


@lru_cache(maxsize=3)
def program(name: str) -> tn.Program:
    torch.manual_seed(0)
    loss, y = nn.CrossEntropyLoss(), torch.randint(2, (4,))
    match name:
        case "linear":
            model = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))
            return tn.compile(model, loss, (torch.randn(4, 5), y), QUANTITIES)
        case "conv":
            model = nn.Sequential(nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2))
            return tn.compile(model, loss, (torch.randn(4, 2, 8, 8), y), QUANTITIES)
        case _:
            model = nn.Sequential(Attention(4), nn.Flatten(), nn.Linear(12, 2))
            return tn.compile(model, loss, (torch.randn(4, 3, 4), y), QUANTITIES[:4])


def drawable(name: str, what: str) -> object:
    """Everything of a program that a person may draw."""
    made = program(name)
    parameter = {"linear": "0.weight", "conv": "0.weight"}.get(name, "0.q.weight")
    match what:
        case "formulas":
            return formulas(made, "")
        case "jacobian":
            return jacobian(made, "0", parameter)
        case "model":
            return made
        case "cotangents":
            items = [item for item in made.compiled.derived.items if isinstance(item, Backward)]
            return [term for item in items for term in item.terms if isinstance(term, Diagram)]
        case "rewrite":
            square = quantity(made, "second_moment", parameter)
            assert isinstance(square, Diagram)
            return square, inline(square)
        case _:
            return quantity(made, what, parameter)


WHATS = ("formulas", "jacobian", "model", "cotangents", "rewrite", *(q.name for q in QUANTITIES))
PICTURES = [(name, what) for name in ("linear", "conv", "attention") for what in WHATS]
PICTURES = [case for case in PICTURES if case not in (("attention", "kfac"), ("attention", "diag_ggn"))]


# What a picture shows, read back from the SVG.


@dataclass(frozen=True)
class Node:
    kind: str
    text: str
    note: str


def read(svg: str) -> tuple[dict[str, Node], list[tuple[str, str, str]]]:
    """Nodes by id, and wires (leg, id, id)."""
    space = "{http://www.w3.org/2000/svg}"
    nodes, wires = {}, []
    for group in ElementTree.fromstring(svg).iter(f"{space}g"):
        kind, note = group.get("class", "").split()[0], group.findtext(f"{space}title", "")
        if "data-leg" in group.keys():
            one_end, other = group.get("data-ends", "").split()
            wires.append((group.get("data-leg", ""), one_end, other))
        else:
            nodes[group.get("data-id", "")] = Node(kind, " ".join(t.text or "" for t in group.findall(f"{space}text")), note)
    return nodes, wires


def joined(svg: str) -> list[tuple[str, ...]]:
    """For every leg the notes of the operands that its wires join, sorted; "out" where it has an end."""
    nodes, wires = read(svg)
    groups: list[tuple[str, set[str], list[str]]] = []  # leg, dots, what they reach
    for leg, *ends in wires:
        dots = {end for end in ends if nodes[end].kind == "dot"}
        reached = ["out" if nodes[e].kind == "end" else nodes[e].note for e in ends if e not in dots]
        same = [group for group in groups if group[1] & dots]
        groups = [group for group in groups if group not in same]
        groups.append((leg, dots.union(*(g[1] for g in same)), sum((g[2] for g in same), reached)))
    return sorted((leg, *sorted(reached)) for leg, _, reached in groups)


def wanted(diagram: Diagram) -> list[tuple[str, ...]]:
    """The same from the diagram."""
    found = []
    for product in diagram.products:
        for leg in dict.fromkeys((*product.legs, *diagram.legs)):
            ends = [str(op) for op in product.operands for own in op.legs if own == leg]
            found.append((leg.name, *sorted(ends + ["out"] * (leg in diagram.legs))))
    return sorted(found)


WINDOW = Window(Leg("r", 8), ((2, I), (1, J)), -1)
CHOICE = Selection(Tensor("index", (BATCH,)), (I, J))
SQUARED = Map(argument(0) ** 2 + argument(1), (Tensor("x", (BATCH, I)), Tensor("y", (I,))))
DIAGRAMS = {
    "matrix product": one((I, K), Tensor("A", (I, J)), Tensor("B", (J, K))),
    "alone": one((I,), Tensor("A", (I,))),
    "number": one((), Tensor("A", ())),
    "summed": one((), Tensor("A", (I, J))),
    "hyperedge": one((BATCH, I, J), Tensor("x", (BATCH, I)), Tensor("g", (BATCH, J))),
    "hyperedge of three": one((), Tensor("x", (I,)), Tensor("y", (I,)), Tensor("z", (I,))),
    "parallel": one((), Tensor("x", (I, J, K)), Tensor("y", (I, J, K))),
    "trace": one((), Tensor("A", (I, I))),
    "diagonal": one((I,), Tensor("A", (I, I))),
    "delta": one((I, Leg("i'", 3)), Delta((I, Leg("i'", 3)))),
    "window": one((I, J), Tensor("x", (Leg("r", 8),)), WINDOW),
    "selection": one((BATCH,), CHOICE, Tensor("table", (I, J))),
    "map": one((BATCH,), SQUARED, Tensor("w", (I,))),
    "constant": one((I, J), Tensor("x", (I,))),
    "sum": Diagram((I,), (*one((I,), Tensor("x", (I,))).products, *one((I,), Tensor("y", (I,)), scale=-1 / N).products)),
}  # fmt: skip


@pytest.mark.parametrize("name", DIAGRAMS)
def test_reads_back(name: str) -> None:
    assert joined(tn.draw(DIAGRAMS[name]).svg) == wanted(DIAGRAMS[name])


@pytest.mark.parametrize(
    ("name", "what"), [(n, w) for n, w in PICTURES if w in ("formulas", "jacobian", "batch_grad", "kfac", "cotangents")]
)
def test_programs_read_back(name: str, what: str) -> None:
    drawn = drawable(name, what)
    diagrams = drawn.diagrams if isinstance(drawn, Factors) else drawn
    diagrams = diagrams.values() if isinstance(diagrams, dict) else diagrams
    diagrams = [diagrams] if isinstance(diagrams, Diagram) else list(diagrams)
    legs = {leg.name for d in diagrams for p in d.products for leg in p.legs}
    primes = {leg: leg.removesuffix("_copy") + "'" for leg in legs if isinstance(drawn, Factors) and leg.endswith("_copy")}
    expected = [legs for d in diagrams for legs in wanted(inline(d))]
    expected = sorted((primes.get(leg, leg), *ends) for leg, *ends in expected)
    assert joined(tn.draw(drawn).svg) == expected


def test_a_part_is_drawn_inside_its_frame() -> None:
    """G·G: two frames with both operands inside, and the outer legs reach them through the frame."""
    drawn = tn.draw(quantity(program("linear"), "second_moment", "0.weight"))
    nodes, wires = read(drawn.svg)
    assert sum(node.kind == "part" for node in nodes.values()) == 2
    inside = [key for key, node in nodes.items() if node.kind == "tensor"]
    assert len(inside) == 4 and all("." in key for key in inside)
    (i,) = [key for key, node in nodes.items() if node.kind == "end" and node.text == "i"]
    (dot,) = [a for leg, a, b in wires if b == i]
    assert {nodes[a].text for leg, a, b in wires if b == dot} == {"x"}
    assert ">N</text>" in drawn.svg


def test_a_sum_inside_a_part_keeps_its_ends() -> None:
    x = one((BATCH, I), Tensor("x", (BATCH, I)))
    D = x - x.sum("n") / N
    drawn = tn.draw(D * D)
    nodes, wires = read(drawn.svg)
    frames = [key for key, node in nodes.items() if node.kind == "sum"]
    assert len(frames) == 2
    for key in frames:
        ends = [node.text for k, node in nodes.items() if k.startswith(f"{key}.") and node.kind == "end"]
        assert sorted(ends) == ["i", "i", "n", "n"]
    assert sorted(joined(drawn.svg))[-1] == ("n'", str(Tensor("x", (Leg("n'", N), I))))


def test_terms_and_scales() -> None:
    texts = [w.text for w in tn.draw(DIAGRAMS["sum"]).scene.words]
    assert texts == ["−", "1/N"]
    assert [w.text for w in tn.draw(one((), scale=sympy.Rational(-3, 2))).scene.words] == ["−", "3/2"]
    assert [w.text for w in tn.draw(Diagram((), ())).scene.words] == ["0"]


def test_nodes_say_what_they_are() -> None:
    shown = {name: {node.kind: node.text for node in read(tn.draw(d).svg)[0].values()} for name, d in DIAGRAMS.items()}
    assert shown["window"]["window"] == "r = 2i + j − 1"
    assert shown["selection"]["selection"] == "𝟙[index = i, j]"
    assert shown["map"]["map"] == "x² + y"
    assert shown["matrix product"]["tensor"] == "B"
    assert "delta" in shown["delta"] and "dot" in shown["summed"]


def test_the_batch_is_marked() -> None:
    root = ElementTree.fromstring(tn.draw(DIAGRAMS["hyperedge"]).svg)
    classes = {g.get("data-leg"): g.get("class") for g in root.iter() if g.get("data-leg")}
    assert classes == {"n": "batch", "i": "leg", "j": "leg"}


def test_factors_stand_side_by_side_over_their_assumption() -> None:
    factors = quantity(program("conv"), "kfac", "0.weight")
    assert isinstance(factors, Factors)
    words = [w.text for w in tn.draw(factors).scene.words]
    assert words == ["[o, o']", "⊗", "1/(16·N)", "[i, k, l, i', k', l']", factors.assumption]
    shown = tn.draw(factors, names={"input_2": "r", "input_3": "c"})
    assert "r' = 2h + k' − 1" in {node.text for node in read(shown.svg)[0].values()}


def test_a_rewrite_has_an_arrow() -> None:
    d = DIAGRAMS["alone"]
    assert [w.text for w in tn.draw([d, d, d]).scene.words] == ["→", "→"]


def test_a_model() -> None:
    """Every call a box with its parameters, every edge from where the value is made."""
    made = program("attention")
    nodes, wires = read(tn.draw(made).svg)
    boxes = [node.text for node in nodes.values() if node.kind == "call"]
    assert len(boxes) == len(made.compiled.graph.calls)
    assert "0.q: linear 0.q.weight [4, 4]" in boxes
    edges = {(nodes[a].text.split(" ")[0], nodes[b].text.split(" ")[0]) for _, a, b in wires}
    assert {("x", "0.q:"), ("x", "0.k:"), ("x", "0.v:"), ("0.v:", "0:"), ("y", "loss:"), ("2:", "output")} <= edges
    assert ("[N, 3, 3]" in {leg for leg, _, _ in wires}) and len(wires) == 16


# Nothing covers anything else.


def leaves(scene: Scene, prefix: End = ()) -> Iterator[tuple[End, Box]]:
    """Every box with something written or drawn in it, frames not."""
    for k, shape in enumerate(scene.shapes):
        if shape.inner:
            yield from leaves(shape.inner, (*prefix, k))
        else:
            yield (*prefix, k), shape.box
    yield from (((*prefix, -1 - k), wire.label) for k, wire in enumerate(scene.wires) if wire.label)
    yield from (((*prefix, -1000 - k), words.box) for k, words in enumerate(scene.words))


def frames(scene: Scene, prefix: End = ()) -> Iterator[tuple[End, Box]]:
    for k, shape in enumerate(scene.shapes):
        if shape.inner:
            yield (*prefix, k), shape.box
            yield from frames(shape.inner, (*prefix, k))


def wires_of(scene: Scene, prefix: End = ()) -> Iterator[tuple[End, tuple[End, ...], Wire]]:
    """The wire's own label, its ends, the wire."""
    for k, wire in enumerate(scene.wires):
        yield (*prefix, -1 - k), tuple((*prefix, *end) for end in wire.ends), wire
    for k, shape in enumerate(scene.shapes):
        if shape.inner:
            yield from wires_of(shape.inner, (*prefix, k))


def overlap(a: Box, b: Box) -> bool:
    return abs(a.x - b.x) < (a.w + b.w) / 2 - 0.5 and abs(a.y - b.y) < (a.h + b.h) / 2 - 0.5


def within(x: float, y: float, box: Box) -> bool:
    return abs(x - box.x) < box.w / 2 - 1 and abs(y - box.y) < box.h / 2 - 1


def covered(scene: Scene) -> list[str]:
    """What overlaps: boxes, boxes and foreign frames, wires and boxes in which they do not end."""
    boxes, found = dict(leaves(scene)), []
    found += [f"{a} {b}" for (a, p), (b, q) in combinations(boxes.items(), 2) if overlap(p, q)]
    for frame, outer in frames(scene):
        found += [f"frame {frame} {b}" for b, q in boxes.items() if b[: len(frame)] != frame and overlap(outer, q)]
        inner = [q for b, q in boxes.items() if b[: len(frame)] == frame]
        found += [f"out of {frame}" for q in inner if q.left < outer.left or q.right > outer.right or q.top < outer.top]
    for label, ends, wire in wires_of(scene):
        for (x0, y0), (x1, y1) in zip(wire.points, wire.points[1:], strict=False):
            dots = [(x0 + (x1 - x0) * t / 60, y0 + (y1 - y0) * t / 60) for t in range(61)]
            for b, q in boxes.items():
                if b != label and b not in ends and any(within(x, y, q) for x, y in dots):
                    found.append(f"wire {wire.leg} {ends} {b}")
    return found


@pytest.mark.parametrize("name", DIAGRAMS)
def test_nothing_is_covered(name: str) -> None:
    assert not covered(tn.draw(DIAGRAMS[name], title="a title").scene)


@pytest.mark.parametrize(("name", "what"), PICTURES)
def test_nothing_is_covered_in_programs(name: str, what: str) -> None:
    assert not covered(tn.draw(drawable(name, what)).scene)


@pytest.mark.parametrize("seed", range(40))
def test_random_networks(seed: int) -> None:
    """Up to seven operands with up to three legs each: no box covers another, and all of it reads back."""
    random = Random(seed)
    legs = [BATCH, *(Leg(name, 2) for name in "abcdefgh")]
    operands = [
        Tensor(f"T{k}", tuple(sorted(random.sample(legs, random.randint(1, 3)), key=str)))
        for k in range(random.randint(1, 7))
    ]
    there = sorted({leg for op in operands for leg in op.legs}, key=str)
    diagram = one(tuple(leg for leg in there if random.random() < 0.4), *operands)
    drawn = tn.draw(diagram)
    assert not [text for text in covered(drawn.scene) if not text.startswith("wire")]
    assert joined(drawn.svg) == wanted(diagram)


def test_the_check_sees_what_is_covered() -> None:
    scene = tn.draw(DIAGRAMS["matrix product"]).scene
    moved = Scene(tuple(s.moved(-s.box.x, -s.box.y) for s in scene.shapes), scene.wires)
    assert any(not text.startswith("wire") for text in covered(moved))
    through = one((), Tensor("A", (I,)), Tensor("B", (I,)))
    drawn = tn.draw(through).scene
    (wire,) = drawn.wires
    between = drawn.shapes[0].moved(wire.path[1][0] / 2, 0.0)
    assert covered(Scene((*drawn.shapes, between), drawn.wires))


# The three texts.


@pytest.mark.parametrize(("name", "what"), [("linear", "variance"), ("conv", "kfac"), ("attention", "model")])
def test_dot_has_the_same_nodes_and_edges(name: str, what: str) -> None:
    drawn = tn.draw(drawable(name, what))
    nodes, wires = read(drawn.svg)
    bare = re.sub(r'"(\\.|[^"\\])*"', '""', drawn.dot)
    assert bare.count("{") == bare.count("}") and '"' not in bare.replace('""', "")
    edges = re.findall(r'^ *"([\d.]+)" -> "([\d.]+)" \[', drawn.dot, flags=re.MULTILINE)
    assert sorted(edges) == sorted((a, b) for _, a, b in wires)
    named = re.findall(r'^ *"([\d.]+)" \[', drawn.dot, flags=re.MULTILINE)
    assert sorted(named) == sorted(nodes)
    assert drawn.dot.count("subgraph") == sum(node.kind in ("part", "sum") for node in nodes.values())


def test_dot_quotes() -> None:
    dot = tn.draw(one((), Tensor('a"b\\c{', ()))).dot
    assert r'label="a\"b\\c{"' in dot


def test_svg_escapes() -> None:
    nodes, _ = read(tn.draw(one((), Tensor('<&">', ())), title="a < b & c").svg)
    assert next(iter(nodes.values())).text == '<&">'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("W", "$W$"), ("n'", "$n'$"), ("s1", "$s_{1}$"), ("σ", r"$\sigma$"), ("Σ", r"$\Sigma$"), ("δ'", r"$\delta'$"),
        ("layer_0", r"layer\_0"), ("x^a", r"x\^{}a"), ("Π[r=2·h−1]", r"$\Pi $[r$=$2$\cdot $h$-$1]"),
        ("𝟙[a]", r"$\mathbf{1}$[a]"), ("50% & {#$}", r"50\% \& \{\#\$\}"), ("x₁₂", "x${}_1{}_2$"), ("a\\b", r"a\textbackslash{}b"),
        ("Q Kᵀ/√d", r"Q K${}^\top $/$\surd $d"), ("x² ⊗ σ → ∂", r"x${}^2$ $\otimes $ $\sigma $ $\to $ $\partial $"),
    ],
)  # fmt: skip
def test_tex(text: str, shown: str) -> None:
    assert tex(text) == shown
    assert shown.isascii()


@pytest.mark.parametrize(("name", "what"), [("linear", "variance"), ("conv", "kfac"), ("conv", "formulas")])
def test_tikz(name: str, what: str) -> None:
    """Plain ASCII, balanced, every underscore escaped, a node for every shape and name, a path for every wire."""
    drawn = tn.draw(drawable(name, what))
    text = drawn.tikz
    assert text.isascii() and text.count("{") == text.count("}")
    assert not re.search(r"(?<!\\)_", re.sub(r"\$[^$]*\$", "", text))
    nodes, wires = read(drawn.svg)
    assert text.count(r"\draw[") == len(wires)
    labels = sum(wire.label is not None for _, _, wire in wires_of(drawn.scene))
    inside = text.count(r"\node")
    assert inside == len(nodes) + labels + sum(1 for key, _ in leaves(drawn.scene) if key[-1] <= -1000)


def test_same_input_same_text() -> None:
    """In another process with another hash seed as well."""
    code = (
        "import tnbackprop as tn\nfrom tests.test_drawing import program, quantity\n"
        "print(tn.draw(quantity(program('linear'), 'second_moment', '0.weight')).svg, end='')"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    here = tn.draw(quantity(program("linear"), "second_moment", "0.weight")).svg
    assert texts == [here, here]


# What a person does with a drawing.


def test_save(tmp_path: Path) -> None:
    drawn = tn.draw(DIAGRAMS["matrix product"])
    for suffix, text in ((".svg", drawn.svg), (".dot", drawn.dot), (".tex", drawn.tikz)):
        path = drawn.save(tmp_path / f"picture{suffix}")
        assert path.read_text(encoding="utf-8") == text
    with pytest.raises(InputError, match=r"picture.svg exists: choose another name, or save\(..., force=True\)"):
        drawn.save(tmp_path / "picture.svg")
    tn.draw(DIAGRAMS["alone"]).save(str(tmp_path / "picture.svg"), force=True)
    assert (tmp_path / "picture.svg").read_text(encoding="utf-8") == tn.draw(DIAGRAMS["alone"]).svg
    with pytest.raises(InputError, match=r"saved as .svg, .dot, .tex, not .png"):
        drawn.save(tmp_path / "picture.png")
    with pytest.raises(InputError, match="without suffix"):
        drawn.save(tmp_path / "picture")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        drawn.save(tmp_path / "nowhere" / "picture.svg")


def test_in_a_notebook() -> None:
    drawn = tn.draw(DIAGRAMS["window"])
    assert drawn._repr_svg_() == drawn.svg
    assert repr(drawn).startswith("Drawing(1 tensor, 1 window; ")


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (3, "cannot draw a int"),
        ("a", "cannot draw a str"),
        ([], "an empty list"),
        ({}, "an empty dict"),
        ([DIAGRAMS["alone"], 3], "a list of Diagram, int"),
        ({"a": 3}, "a dict of int"),
    ],
)
def test_what_cannot_be_drawn(what: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tn.draw(what)  # type: ignore[arg-type]


def test_names() -> None:
    d = DIAGRAMS["matrix product"]
    nodes, wires = read(tn.draw(d, names={"A": "weight", "j": "τ"}).svg)
    assert {node.text for node in nodes.values()} == {"weight", "B", "i", "k"}
    assert {leg for leg, _, _ in wires} == {"i", "τ", "k"}
    with pytest.raises(InputError, match="no tensor or leg 'C' in what is drawn; there are A, B, i, j, k"):
        tn.draw(d, names={"C": "D"})
    with pytest.raises(InputError, match="'A' and 'B' would both be shown as 'B'"):
        tn.draw(d, names={"A": "B"})


def test_finding_diagrams() -> None:
    made = program("linear")
    assert str(jacobian(made, "0", "0.weight")) == "[n,o,o',i'] = x[n,i'] δ[o,o']"
    assert list(formulas(made, "0")) == ["layer_0"]
    with pytest.raises(InputError, match="no diagrams for a parameter '9.weight': there are 2.weight, 2.bias, 0.weight"):
        quantity(made, "batch_grad", "9.weight")
    with pytest.raises(InputError, match="no diagram of 'ntk' for '0.weight': there are batch_grad, batch_l2"):
        quantity(made, "ntk", "0.weight")
    with pytest.raises(InputError, match="no formula in module '7': there are calls in 0, 1, 2, loss"):
        formulas(made, "7")
    with pytest.raises(InputError, match="no formula in module '2' reads a parameter '0.weight'"):
        jacobian(made, "2", "0.weight")


def test_a_part_with_a_diagonal_is_sealed() -> None:
    """A part that is read with both legs equal: no leg inside has that name once, so the frame keeps its own."""
    A = one((I, Leg("j", 3)), Tensor("A", (I, Leg("j", 3))))
    drawn = tn.draw(one((I,), Part(A, (I, I)), Tensor("x", (I,))))
    kinds = [node.kind for node in read(drawn.svg)[0].values()]
    assert "sum" in kinds and "part" not in kinds
    assert Kind.SUM in {shape.kind for shape in drawn.scene.shapes}
