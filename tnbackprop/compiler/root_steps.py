"""Steps for the columns at the model's output: all of them before a loop, or drawn one round at a time inside."""

from __future__ import annotations

from ..diagram import Size
from .arrange import arranged, sizes_of
from .contract import Lowering, build
from .cost import Kernel
from .derived import Columns
from .forward import fill
from .graph import Graph
from .hessian_root import hessian_root
from .store import Store


def root_steps(
    store: Store, graph: Graph, columns: Columns, lowerings: tuple[Lowering, ...], checks: dict[str, str]
) -> tuple[str, str]:
    """What a loop runs over: its variable, and the value whose rows that takes (all columns, or their noise).

    Where all columns ride together there is no loop, and the columns are entered under their own name.
    """
    root, number = columns.start, columns.number
    store.note = "root of the loss Hessian"
    code, shape = root.root.sample if columns.samples else root.root.code, root.output.shape
    if root.curvature is not None:
        ref = build(store, root.curvature, lowerings)
        store.alias[f"curvature_{number}"] = store.resolve(ref.name)
        if ref.order != ref.stored:
            view = arranged(store, ref, tuple((leg,) for leg in ref.order))
            store.alias[f"curvature_{number}"] = store.add(view, sizes_of(ref.order), Kernel.VIEW, strided=True)
        code = code.replace("{curvature}", f"{{curvature_{number}}}")
    if root.calls:
        name, checks[f"indefinite_{number}"] = hessian_root(store, graph, root, number)
        code = code.replace("{hessian_root}", "{" + name + "}")
    return _drawn(store, columns, code, shape) if columns.samples else _exact(store, columns, code, shape)


def _exact(store: Store, columns: Columns, code: str, shape: tuple[Size, ...]) -> tuple[str, str]:
    """All columns at once, with columns of zeros to fill up the last round."""
    filled = fill(code, store.resolve)
    rows = -(-columns.count // columns.width) * columns.width
    if rows > columns.count:
        filled = f"torch.nn.functional.pad({filled}, ({'0, 0, ' * len(shape)}0, {rows - columns.count}))"
    name = columns.variable.replace("column", "root")
    root = store.add(filled, (rows, *shape), Kernel.NATIVE, name=name, alone=True)
    _entered(store, columns, columns.variable, root, shape)
    return columns.variable, root


def _drawn(store: Store, columns: Columns, code: str, shape: tuple[Size, ...]) -> tuple[str, str]:
    """A column for each row of noise."""
    noise, draw = (columns.variable.replace("column", word) for word in ("noise", "draw"))
    store.shapes[noise] = (columns.samples, *shape)
    _entered(store, columns, draw, noise, shape)
    own = "each" if columns.lead else store.resolve(draw)
    filled = fill(code.replace("{noise}", own), store.resolve)
    if columns.lead:
        filled = f"torch.func.vmap(lambda each: {filled})({store.resolve(draw)})"
    scaled = f"({filled}) * {columns.samples**-0.5!r}" if columns.samples > 1 else filled
    store.add(scaled, (*sizes_of(columns.lead), *shape), Kernel.NATIVE, name=columns.variable, alone=True)
    return draw, noise


def _entered(store: Store, columns: Columns, name: str, rows: str, shape: tuple[Size, ...]) -> None:
    """The loop's variable; without a loop, the rows themselves."""
    if columns.width < columns.count:
        store.shapes[name] = (*sizes_of(columns.lead), *shape)
    elif columns.lead:
        store.alias[name] = rows
    else:
        store.add(f"{rows}.squeeze(0)", shape, Kernel.VIEW, name=name)
