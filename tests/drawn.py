"""Diagrams and programs to draw, and what a picture shows, read back from its SVG."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from xml.etree import ElementTree

import sympy
import torch
from torch import nn

import tnbackprop as tn
from tnbackprop.compiler.sweep.derived import Backward
from tnbackprop.diagram.algebra import inline
from tnbackprop.diagram.core import (
    BATCH,
    Delta,
    Diagram,
    Leg,
    Map,
    N,
    Operand,
    Product,
    Selection,
    Tensor,
    Window,
    argument,
)
from tnbackprop.drawing import formulas, jacobian, quantity

from .models import Attention

QUANTITIES = (tn.BatchGrad(), tn.BatchL2(), tn.SecondMoment(), tn.Variance(), tn.KFAC(), tn.DiagGGN())
ROW, COL, KEY = Leg("i", 3), Leg("j", 4), Leg("k", 5)
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
            model = nn.Sequential(
                nn.Conv2d(2, 3, 3, stride=2, padding=1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 2)
            )
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
            nodes[group.get("data-id", "")] = Node(
                kind, " ".join(t.text or "" for t in group.findall(f"{space}text")), note
            )
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


WINDOW = Window(Leg("r", 8), ((2, ROW), (1, COL)), -1)
CHOICE = Selection(Tensor("index", (BATCH,)), (ROW, COL))
SQUARED = Map(argument(0) ** 2 + argument(1), (Tensor("x", (BATCH, ROW)), Tensor("y", (ROW,))))
DIAGRAMS = {
    "matrix product": one((ROW, KEY), Tensor("A", (ROW, COL)), Tensor("B", (COL, KEY))),
    "alone": one((ROW,), Tensor("A", (ROW,))),
    "number": one((), Tensor("A", ())),
    "summed": one((), Tensor("A", (ROW, COL))),
    "hyperedge": one((BATCH, ROW, COL), Tensor("x", (BATCH, ROW)), Tensor("g", (BATCH, COL))),
    "hyperedge of three": one((), Tensor("x", (ROW,)), Tensor("y", (ROW,)), Tensor("z", (ROW,))),
    "parallel": one((), Tensor("x", (ROW, COL, KEY)), Tensor("y", (ROW, COL, KEY))),
    "trace": one((), Tensor("A", (ROW, ROW))),
    "diagonal": one((ROW,), Tensor("A", (ROW, ROW))),
    "delta": one((ROW, Leg("i'", 3)), Delta((ROW, Leg("i'", 3)))),
    "window": one((ROW, COL), Tensor("x", (Leg("r", 8),)), WINDOW),
    "selection": one((BATCH,), CHOICE, Tensor("table", (ROW, COL))),
    "map": one((BATCH,), SQUARED, Tensor("w", (ROW,))),
    "constant": one((ROW, COL), Tensor("x", (ROW,))),
    "sum": one((ROW,), Tensor("x", (ROW,))) - one((ROW,), Tensor("y", (ROW,))) / N,
}  # fmt: skip
