"""Steps for the columns at the model's output: all of them before a loop, or drawn one round at a time inside."""

from __future__ import annotations

import sympy
import torch

from ..diagram import BATCH, N, Size
from .arrange import arranged, sizes_of, text
from .contract import Lowering, build
from .cost import Kernel
from .definite import in_double, smallest_eigenvalue
from .derived import Arriving, Basis, Columns, Given
from .forward import fill
from .graph import Graph
from .hessian_root import hessian_root
from .roots import LossRoot
from .store import Ref, Store


def root_steps(
    store: Store, graph: Graph, columns: Columns, lowerings: tuple[Lowering, ...], checks: dict[str, str]
) -> dict[str, str]:
    """What a loop runs over: variable -> the value whose rows it takes (the columns or their noise; their weights).

    Where all columns ride together there is no loop, and the rows are entered under the variable's name.
    """
    if isinstance(columns.start, Given):
        store.shapes |= {columns.variable: columns.start.shape, columns.weight: (columns.count, N)}
        return {}
    if isinstance(columns.start, Basis):
        return _basis(store, graph, columns, columns.start, lowerings)
    root, number = columns.start, columns.number
    store.note = "root of the loss Hessian"
    code, shape = root.root.sample if columns.samples else root.root.code, root.output.shape
    rows: dict[str, str] = {}
    if root.curvature is not None:
        _curvature(store, root, number, lowerings, checks)
        code = code.replace("{curvature}", f"{{curvature_{number}}}")
    if root.calls:
        name, extra = hessian_root(store, graph, root, number)
        code = code.replace("{hessian_root}", "{" + name + "}")
        if root.signed:
            rows |= _rows(store, columns, columns.weight, extra, (N,))
        else:
            checks[f"indefinite_{number}"] = extra
    if columns.samples:
        return _drawn(store, columns, code, shape)
    return _rows(store, columns, columns.variable, fill(code, store.resolve), shape) | rows


def _curvature(
    store: Store, root: LossRoot, number: str, lowerings: tuple[Lowering, ...], checks: dict[str, str]
) -> None:
    """A diagonal loss Hessian. Its entries are blocks of their own; in float64, so that their signs are right."""
    assert root.curvature is not None
    name, products = f"curvature_{number}", root.curvature.products
    if not any(p.operands for p in products) and sympy.Add(*(p.scale for p in products)).subs(N, 1) >= 0:
        _named(store, build(store, root.curvature, lowerings), name)
        return
    lower = root.output.dtype != torch.float64
    diagram = in_double(store, root.curvature) if lower else root.curvature
    _named(store, build(store, diagram, lowerings), name)
    exact, output = store.resolve(name), store.resolve(root.output.name)
    entries = (exact, f"{exact}.abs()")
    checks[f"indefinite_{number}"] = smallest_eigenvalue(store, entries, output, root.scale, torch.float64)
    if lower:
        store.alias[name] = store.add(f"{exact}.to({output}.dtype)", store.shapes[exact], Kernel.NATIVE)


def _named(store: Store, ref: Ref, name: str) -> None:
    """Call a built value `name`, in the order of its legs."""
    store.alias[name] = store.resolve(ref.name)
    if ref.order != ref.stored:
        view = arranged(store, ref, tuple((leg,) for leg in ref.order))
        store.alias[name] = store.add(view, sizes_of(ref.order), Kernel.VIEW, strided=True)


def _basis(
    store: Store, graph: Graph, columns: Columns, basis: Basis, lowerings: tuple[Lowering, ...]
) -> dict[str, str]:
    """One-hot columns with what arrives where they are, and their weights."""
    store.note = f"columns at {basis.value}"
    several = basis.value in graph.values and not store.floating  # the value's may not be that of the parameters
    dtype = graph.values[basis.value].dtype if several else "like.dtype"
    code = f"torch.eye({basis.own}, dtype={dtype}, device=like.device)"
    legs = tuple(leg for leg in columns.legs if leg not in columns.lead)
    shape, once = sizes_of(legs), tuple(1 if leg == BATCH else leg.size for leg in legs)
    code = f"{code}.reshape({text((basis.own, *once))})"
    if basis.arriving:
        others = (f"{store.resolve(a.cotangent)}.reshape({text((a.columns, *shape))})" for a in basis.arriving)
        code = f"torch.cat([{', '.join([f'{code}.expand({text((basis.own, *shape))})', *others])}])"
    rows = _rows(store, columns, columns.variable, code, shape)
    if basis.weight is not None:
        ref = build(store, basis.weight, lowerings)
        code = arranged(store, ref, (tuple(leg for leg in ref.order if leg != BATCH), (BATCH,)))
        if basis.arriving:
            code = f"torch.cat([{', '.join([code, *(_weights(store, a) for a in basis.arriving)])}])"
        rows |= _rows(store, columns, columns.weight, code, (N,))
    return rows


def _weights(store: Store, arriving: Arriving) -> str:
    size = text((arriving.columns, N))
    return f"{store.resolve(arriving.weight)}.reshape({size})" if arriving.weight else f"like.new_ones({size})"


def _rows(store: Store, columns: Columns, variable: str, code: str, shape: tuple[Size, ...]) -> dict[str, str]:
    """All rows at once, with rows of zeros to fill up the last round."""
    rows = columns.rounds * int(columns.width)
    if rows > columns.count:
        code = f"torch.nn.functional.pad({code}, ({'0, 0, ' * len(shape)}0, {rows - int(columns.count)}))"
    name = variable.replace("column", "root") if variable == columns.variable else f"{variable}_rows"
    root = store.add(code, (rows, *shape), Kernel.NATIVE, name=name)
    _entered(store, columns, variable, root, shape)
    return {variable: root}


def _drawn(store: Store, columns: Columns, code: str, shape: tuple[Size, ...]) -> dict[str, str]:
    """A column for each row of noise, which has more bits than a column of 16: those draw too few different numbers."""
    noise, draw = (columns.variable.replace("column", word) for word in ("noise", "draw"))
    store.shapes[noise] = (columns.samples, *shape)
    _entered(store, columns, draw, noise, shape)
    own = "each" if columns.lead else store.resolve(draw)
    filled = fill(code.replace("{noise}", own), store.resolve)
    if columns.lead:
        filled = f"torch.func.vmap(lambda each: {filled})({store.resolve(draw)})"
    scaled = f"({filled}) * {columns.samples**-0.5!r}" if columns.samples > 1 else filled
    if isinstance(columns.start, LossRoot) and columns.start.output.dtype.itemsize == 2:
        scaled = f"({scaled}).to({columns.start.output.dtype})"
    store.add(scaled, (*sizes_of(columns.lead), *shape), Kernel.NATIVE, name=columns.variable, alone=True)
    return {draw: noise}


def _entered(store: Store, columns: Columns, name: str, rows: str, shape: tuple[Size, ...]) -> None:
    """The loop's variable; without a loop, the rows themselves."""
    if columns.looped:
        store.shapes[name] = (*sizes_of(columns.lead), *shape)
    elif columns.lead:
        store.alias[name] = rows
    else:
        store.add(f"{rows}.squeeze(0)", shape, Kernel.VIEW, name=name)
