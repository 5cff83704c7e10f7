"""Pictures: read back from the text they show the diagram."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.sweep.derived import Extraction, Result
from tnbackprop.diagram.algebra import inline
from tnbackprop.diagram.core import BATCH, Diagram, Leg, N, Part, Tensor
from tnbackprop.drawing import formulas, jacobian, paper, quantity
from tnbackprop.drawing.words import tex
from tnbackprop.errors import InputError
from tnbackprop.quantities.factors import Factors

from ..drawn import DIAGRAMS, PICTURES, ROW, drawable, joined, one, program, read, wanted

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", DIAGRAMS)
def test_reads_back(name: str) -> None:
    assert joined(tn.draw(DIAGRAMS[name]).svg) == wanted(DIAGRAMS[name])


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("name", "what"), [(n, w) for n, w in PICTURES if w in ("formulas", "jacobian", "batch_grad", "kfac", "cotangents")]
)
def test_programs_read_back(name: str, what: str) -> None:
    drawn = drawable(name, what)
    diagrams = drawn.diagrams if isinstance(drawn, Factors) else drawn
    diagrams = diagrams.values() if isinstance(diagrams, dict) else diagrams
    diagrams = [diagrams] if isinstance(diagrams, Diagram) else list(diagrams)
    legs = {leg.name for d in diagrams for p in d.products for leg in p.legs}
    primes = {
        leg: leg.removesuffix("_copy") + "'" for leg in legs if isinstance(drawn, Factors) and leg.endswith("_copy")
    }
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
    x = one((BATCH, ROW), Tensor("x", (BATCH, ROW)))
    D = x - x.sum("n") / N
    drawn = tn.draw(D * D)
    nodes, _ = read(drawn.svg)
    frames = [key for key, node in nodes.items() if node.kind == "sum"]
    assert len(frames) == 2
    for key in frames:
        ends = [node.text for k, node in nodes.items() if k.startswith(f"{key}.") and node.kind == "end"]
        assert sorted(ends) == ["i", "i", "n", "n"]
    assert sorted(joined(drawn.svg))[-1] == ("n'", str(Tensor("x", (Leg("n'", N), ROW))))


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
    shown = tn.draw(factors, names={"input_h": "r", "input_w": "c"})
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


def test_modules_as_boxes() -> None:
    """Calls of a module that follow one another share a box, no box reads one below it, and nothing is lost."""
    made = program("attention")
    nodes, wires = read(tn.draw(made, depth=1).svg)
    boxes = {number: node.text for number, node in nodes.items() if node.kind == "call"}
    calls, parameters = made.compiled.graph.calls, made.model.parameters()
    inside = [call for call in calls if call.path.split(".")[0] == "0"]
    first, *others = boxes.values()
    assert first == f"0 {len(inside)} calls 48 parameters"
    assert sum(p.numel() for p in parameters if p.shape == (4, 4)) == 48
    assert [text.split(":")[0] for text in others] == ["1", "2", "loss"]
    edges = {(nodes[a].text.split(" ")[0], nodes[b].text.split(" ")[0]) for _, a, b in wires}
    chain = {("x", "0"), ("0", "1:"), ("1:", "2:"), ("2:", "loss:"), ("loss:", "loss")}
    assert edges == {*chain, ("y", "loss:"), ("2:", "output")}
    deep = tn.draw(made, depth=9).svg
    assert deep.count('class="call"') >= len({call.path for call in calls})
    for what, depth in ((made, 0), (made, True), (DIAGRAMS["alone"], 1)):
        with pytest.raises(InputError, match=f"depth={depth} of a .*: it is a number from 1 on, for a Program"):
            tn.draw(what, depth=depth)


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
        ("𝟙[a]", r"$\mathbf{1}$[a]"), ("50% & {#$}", r"50\% \& \{\#\$\}"), ("x₁₂", "x${}_1{}_2$"),
        ("a\\b", r"a\textbackslash{}b"),
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
    silent = sum(node.kind in ("dot", "delta", "part", "sum") for node in nodes.values())
    assert text.count(r"\node") == drawn.svg.count("<text") + silent


@pytest.mark.slow
def test_same_input_same_text() -> None:
    """In another process with another hash seed as well."""
    code = (
        "import tnbackprop as tn\nfrom tests.drawn import program, quantity\n"
        "print(tn.draw(quantity(program('linear'), 'second_moment', '0.weight')).svg, end='')"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
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
    with pytest.raises(InputError, match=r"saved as .svg, .dot, .tex, .png, .pdf, not .jpg"):
        drawn.save(tmp_path / "picture.jpg")
    with pytest.raises(InputError, match="without suffix"):
        drawn.save(tmp_path / "picture")
    with pytest.raises(InputError, match="cannot be written: No such file"):
        drawn.save(tmp_path / "nowhere" / "picture.svg")


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".pdf", b"%PDF")])
def test_on_paper(suffix: str, start: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where cairosvg is there; else the extra is named, and no file is left."""
    drawn, path = tn.draw(DIAGRAMS["matrix product"]), tmp_path / f"picture{suffix}"
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    with pytest.raises(InputError, match=rf"a {suffix} is made by cairosvg.*pip install 'tnbackprop\[pictures\]'"):
        drawn.save(path)
    assert not path.exists()

    def missing(name: str) -> object:
        raise OSError("no library called cairo")

    with monkeypatch.context() as changed:
        changed.setattr(paper.importlib, "import_module", missing)
        with pytest.raises(InputError, match="needs the cairo library of the system: no library called cairo"):
            drawn.save(path)
    monkeypatch.delitem(sys.modules, "cairosvg")
    pytest.importorskip("cairosvg")
    assert drawn.save(path).read_bytes().startswith(start)


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
        (nn.Linear(3, 2), r"cannot draw a Linear: .*\n  Of a model draw its program"),
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
    with pytest.raises(
        InputError, match=r"no diagrams for a parameter '9.weight': there are 2.weight, 2.bias, 0.weight"
    ):
        quantity(made, "batch_grad", "9.weight")
    with pytest.raises(InputError, match=r"no diagram of 'ntk' for '0.weight': there are batch_grad, batch_l2"):
        quantity(made, "ntk", "0.weight")
    with pytest.raises(InputError, match="no formula in module '7': there are calls in 0, 1, 2, loss"):
        formulas(made, "7")
    with pytest.raises(InputError, match=r"no formula in module '2' reads a parameter '0.weight'"):
        jacobian(made, "2", "0.weight")


def test_finding_sums_and_tied_names() -> None:
    """The diagonal of the Hessian has a term for each sweep of columns; a tied parameter has several names."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    batch = torch.randn(4, 3), torch.randn(4, 3)
    made = tn.compile(model, nn.MSELoss(), batch, [tn.HessianDiag(), tn.DiagGGN()])
    terms = [
        i.diagrams[Result("hessian_diag")]
        for i in made.compiled.derived.items
        if isinstance(i, Extraction) and i.parameter == "p_0_weight" and "hessian_diag" in i.quantities
    ]
    found = quantity(made, "hessian_diag", "0.weight")
    assert isinstance(found, Diagram) and len(terms) > 1
    assert len(found.products) == sum(len(term.products) for term in terms)
    model[2].weight = model[0].weight
    tied = tn.compile(model, nn.MSELoss(), batch, [tn.Grad()])
    assert quantity(tied, "grad", "2.weight") == quantity(tied, "grad", "0.weight")


def test_a_leg_of_size_one_that_nothing_depends_on_is_left_out() -> None:
    x = one((Leg("v", 1), ROW), Tensor("x", (ROW,)))
    squared = one((ROW,), Part(x, (Leg("v", 1), ROW)), Part(x, (Leg("v", 1), ROW)))
    assert {leg for leg, _, _ in read(tn.draw(squared).svg)[1]} == {"i"}
    there = one((ROW,), Tensor("y", (Leg("v", 1), ROW)), Part(x, (Leg("v", 1), ROW)))
    assert {leg for leg, _, _ in read(tn.draw(there).svg)[1]} == {"i", "v"}


def test_a_part_with_a_diagonal_is_sealed() -> None:
    """A part that is read with both legs equal: no leg inside has that name once, so the frame keeps its own."""
    A = one((ROW, Leg("j", 3)), Tensor("A", (ROW, Leg("j", 3))))
    drawn = tn.draw(one((ROW,), Part(A, (ROW, ROW)), Tensor("x", (ROW,))))
    kinds = [node.kind for node in read(drawn.svg)[0].values()]
    assert "sum" in kinds and "part" not in kinds
