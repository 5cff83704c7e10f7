"""Receptive fields: behind max pooling, the chosen place picks a kernel instead of a position.

Max pooling sends g[n, o, h, w] to one place of its window, and the convolution before it spreads that over the images
of that place: all of them lie in the receptive field of (h, w), which is the same for every choice. A kernel for each
choice, put at its place in the field, makes this a matmul for each (n, h, w) over o, for all columns at once:

    out[step·h + first + a, i, v] += Σ_o kernel[o, choice[n, o, h]][a, i] · g[n, h, o, v]

The scattered cotangent has zeros for all other places and is never made: for windows of 3×3 with stride 2 and a kernel
of 3×3 that is 25 of 36 products, for windows of 2×2 16 of 36. Looking kernels up pays where there are many columns.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import sympy

from ...diagram.core import BATCH, COLUMN, Diagram, Leg, Operand, Product, Selection, Tensor, Window, ordered_union
from ..program import functions as f
from ..program.cost import Kernel, Work
from ..program.expr import Call, Expr, Ref, Value
from ..program.functions import Memory, helper
from ..program.store import Store
from .arrange import arranged, merged, sizes_of
from .candidate import Candidate
from .contract import as_tensor, indices, read

Legs = tuple[Leg, ...]

KERNELS = """\
def receptive_kernels(weight, choices, gap, dilation, field):
    # For each choice weight[o, i, k, l] at gap·choice + dilation·k of a field: [(o, choice, choice, row), (column, i)].
    kernels = weight.new_zeros((weight.shape[0], *choices, *field, weight.shape[1]))
    weight = weight.permute(0, 2, 3, 1)
    rows, columns = (slice(0, d * (size - 1) + 1, d) for d, size in zip(dilation, weight.shape[1:3], strict=True))
    for k in range(choices[0]):
        for l in range(choices[1]):
            kernels[:, k, l, gap[0] * k :, gap[1] * l :][:, rows, columns] = weight
    return kernels.flatten(4).flatten(0, 3)"""

ROWS = """\
def receptive_rows(places, choices, step, gap, first, field):
    # The places [n, o, h, w] on both axes, step·h + gap·choice + first -> [n, w, h, o]: where their kernels begin.
    rows = torch.arange(places[0].shape[1], device=places[0].device)[:, None, None]
    for axis, (place, many) in enumerate(zip(places, choices, strict=True)):
        start = step[axis] * torch.arange(place.shape[2 + axis], device=place.device) + first[axis]
        choice = place - (start if axis else start[:, None])
        rows = rows * many + (choice // gap[axis] if gap[axis] > 1 else choice)
    return (rows * field).permute(0, 3, 2, 1).contiguous()"""

VJP = """\
def receptive_vjp(g, rows, kernels, step, first, field, size):
    # g[n, w, h, o, v] -> [n, y, x, i, v]: what reaches a row y of the image is multiplied by the kernels chosen there.
    across, down, outer, inner = *g.shape[1:4], kernels.shape[1] // field[1]
    out = g.new_empty((len(g), size[0], size[1] * inner, g.shape[-1]))
    above = step[0] * torch.arange(down, device=g.device)[:, None] + first[0]
    starts = [first[1] + step[1] * w for w in range(across)]
    fields = [(max(0, start), min(size[1], start + field[1]), start) for start in starts]
    for n, pooled in enumerate(g.flatten(2, 3)):
        for y in range(size[0]):
            image = out[n, y].zero_()
            low, high = max(0, -((first[0] + field[0] - 1 - y) // step[0])), min(down, (y - first[0]) // step[0] + 1)
            if low < high:
                chosen = kernels.index_select(0, (rows[n, :, low:high] + y - above[low:high]).flatten())
                chosen = chosen.unflatten(0, (across, -1)).mT
                for w, (left, right, start) in enumerate(fields):
                    if left < right:
                        kernel = chosen[w, (left - start) * inner : (right - start) * inner]
                        image[left * inner : right * inner].addmm_(kernel, pooled[w, low * outer : high * outer])
    return out.unflatten(2, (size[1], inner))"""

_ADDED = "image[left * inner : right * inner].addmm_(kernel, pooled[w, low * outer : high * outer])"
_BY_ONEDNN = """\
columns = pooled[w, low * outer : high * outer].t()
                        product = torch.ops.mkldnn._linear_pointwise(kernel, columns, None, "none", [], "")
                        image[left * inner : right * inner].add_(product)"""
WIDE_VJP = VJP.replace("receptive_vjp(", "receptive_vjp_wide(").replace(_ADDED, _BY_ONEDNN)
"""The same by oneDNN's matmul: it uses all of AVX-512 on any processor, and is worth a pass more for many columns."""
MANY = 192
"""So many columns."""

OF_KERNELS = helper("receptive_kernels", KERNELS, memory=Memory.OWN)
OF_ROWS = helper("receptive_rows", ROWS)
OF_VJP = helper("receptive_vjp", VJP, memory=Memory.OWN)
OF_WIDE_VJP = helper("receptive_vjp_wide", WIDE_VJP, memory=Memory.OWN)


@dataclass(frozen=True)
class Axis:
    """One space axis: the window of the pool, y = step·position + gap·choice + first, and that of the convolution."""

    pool: Window
    convolution: Window

    @property
    def _stride(self) -> int:
        """Of the convolution."""
        return next(c for c, leg in self.convolution.terms if leg == self.pool.image)

    @property
    def kernel(self) -> tuple[int, Leg]:
        """Its dilation and its kernel leg."""
        return next(term for term in self.convolution.terms if term[1] != self.pool.image)

    @property
    def position(self) -> Leg:
        return self.pool.terms[0][1]

    @property
    def choices(self) -> int:
        return int(self.pool.terms[1][1].size)

    @property
    def gap(self) -> int:
        """Between the fields' images of two choices."""
        return self._stride * self.pool.terms[1][0]

    @property
    def step(self) -> int:
        """From one receptive field to the next."""
        return self._stride * self.pool.terms[0][0]

    @property
    def first(self) -> int:
        """Where the first field begins."""
        return self._stride * self.pool.offset + self.convolution.offset

    @property
    def field(self) -> int:
        """How long a field is."""
        dilation, kernel = self.kernel
        return self.gap * (self.choices - 1) + dilation * (int(kernel.size) - 1) + 1

    @property
    def size(self) -> int:
        """Of the image."""
        return int(self.convolution.image.size)

    @property
    def inside(self) -> int:
        """How many places of all fields lie inside the image."""
        starts = [self.first + self.step * position for position in range(int(self.position.size))]
        return sum(max(0, min(self.size, start + self.field) - max(0, start)) for start in starts)


@dataclass(frozen=True)
class Fields:
    """A product that is the VJP of a convolution after the one of max pooling.

    carried are the operands with the columns, `there` those that are read at the chosen places
    """

    selection: Selection
    axes: tuple[Axis, ...]  # two: the rows of the result, and what lies in a row
    weight: Tensor
    carried: tuple[Operand, ...]
    there: tuple[Operand, ...]
    outer: Leg  # the channel in which a place is chosen
    inner: Legs  # the channels of the image
    columns: Legs

    @property
    def order(self) -> Legs:
        """Of what is pooled, in memory."""
        return (BATCH, *(axis.position for axis in reversed(self.axes)), self.outer, *self.columns)

    @property
    def result(self) -> Legs:
        """The same of what it gives."""
        return (BATCH, *(axis.convolution.image for axis in self.axes), *self.inner, *self.columns)

    def of_axes(self, name: str) -> tuple[int, ...]:
        """A number of each axis."""
        return tuple(getattr(axis, name) for axis in self.axes)

    def turned(self) -> Fields:
        """With the axes the other way round: what it gives is in the order that the next convolution reads."""
        return replace(self, axes=self.axes[::-1])


def receptive_fields(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """The plans for a product that is such a pair of VJPs, row by row or column by column of the image."""
    fields = find_fields(product, legs)
    ways = (fields, fields.turned()) if fields is not None else ()
    return [Candidate(partial(_gathered, fields=way, legs=legs)) for way in ways]


def find_fields(product: Product, legs: Legs) -> Fields | None:
    """The roles of the operands, or None if the product is anything else."""
    selections = [op for op in product.operands if isinstance(op, Selection)]
    windows = [op for op in product.operands if isinstance(op, Window)]
    if len(selections) != 1 or len(windows) != 2 or len(selections[0].near) != 2:
        return None
    (selection,) = selections
    axes = tuple(Axis(near, w) for near in selection.near for w in windows if near.image in w.legs)
    index = selection.index.legs
    if len(axes) != 2 or len(index) != 4 or not all(_fits(axis, index, legs) for axis in axes):
        return None
    kernels = {axis.kernel[1] for axis in axes}
    others = [op for op in product.operands if op not in (selection, *windows)]
    weights = [op for op in others if kernels <= set(op.legs)]
    there = tuple(op for op in others if set(op.legs) & set(selection.choice))
    carried = tuple(op for op in others if op not in weights and op not in there)
    outer = [leg for leg in index if leg != BATCH and leg not in [axis.position for axis in axes]]
    if len(weights) != 1 or not isinstance(weights[0], Tensor) or len(outer) != 1 or not carried:
        return None
    inner = tuple(leg for leg in weights[0].legs if leg not in (*kernels, *outer))
    columns = tuple(leg for leg in legs if leg.name == COLUMN and isinstance(leg.size, int))
    fields = Fields(selection, axes, weights[0], carried, there, outer[0], inner, columns)
    return fields if _complete(fields, legs) else None


def _fits(axis: Axis, index: Legs, legs: Legs) -> bool:
    """Whether both windows have two legs, and what they slide over is a leg of the result."""
    pool, convolution = axis.pool, axis.convolution
    plain = len(pool.terms) == 2 == len(convolution.terms) and min(c for c, _ in (*pool.terms, *convolution.terms)) > 0
    return plain and pool.terms[0][1] in index and convolution.image in legs and convolution.image not in pool.legs


def _complete(fields: Fields, legs: Legs) -> bool:
    """Whether the result has all legs that it would have, and every operand only such as are known here."""
    index, choice = set(fields.selection.index.legs), set(fields.selection.choice)
    known = {*fields.order, *choice}
    of_weight = {fields.outer, *fields.inner, *(axis.kernel[1] for axis in fields.axes)}
    separate = set(fields.weight.legs) == of_weight and not set(fields.inner) & (known | index)
    operands = all(set(op.legs) <= known for op in fields.carried) and all(
        set(op.legs) <= index | choice for op in fields.there
    )
    whole = index <= set(ordered_union(*(op.legs for op in fields.carried)))
    return separate and operands and whole and bool(fields.columns) and set(legs) == set(fields.result)


def _gathered(store: Store, fields: Fields, legs: Legs) -> Candidate:
    """What is pooled: read at the chosen places, in the order in which it lies in memory."""
    one, index = sympy.Integer(1), fields.selection.index
    order = _memory(store, fields)

    def weighed(store: Store, *looked_up: Ref) -> Candidate:
        factors = (*fields.carried, *(as_tensor(store, ref) for ref in looked_up))
        pooled = Diagram(order, (Product(one, factors),))
        return Candidate(partial(_over_fields, fields=fields, legs=legs), (pooled,))

    there = (Diagram(index.legs, (Product(one, (fields.selection, *fields.there)),)),) if fields.there else ()
    return Candidate(weighed, there)


def _over_fields(store: Store, carried: Ref, fields: Fields, legs: Legs) -> Ref:
    count = int(merged(fields.columns))
    extra = -count % store.rates.odd
    filled = replace(fields, columns=(Leg(COLUMN, count + extra),))
    g = _in_order(store, carried, fields, extra)
    geometry = tuple(fields.of_axes(name) for name in ("step", "first", "field", "size"))
    wide = store.rates.onednn and store.itemsize == 4 and store.find(fields.weight.name).floating and count >= MANY
    expr = Call(OF_WIDE_VJP if wide else OF_VJP, (g, _rows(store, fields), _kernels(store, fields), *geometry))
    value = store.add(expr, sizes_of(filled.result), Kernel.RECEPTIVE, _work(store, filled))
    if extra:
        narrow = Call(f.NARROW, (value, 4, 0, count))
        value = store.add(narrow, sizes_of(fields.result), Kernel.VIEW, strided=True)
    return Ref(value, fields.result, legs)


def _memory(store: Store, fields: Fields) -> Legs:
    """The order in which what is pooled lies in memory, where that is one tensor; else the one that is read."""
    (first, *others) = fields.carried
    stored = read(store, first).stored if isinstance(first, Tensor) and not others else ()
    return stored if len(stored) == len(fields.order) and set(stored) == set(fields.order) else fields.order


def _in_order(store: Store, ref: Ref, fields: Fields, extra: int) -> Value:
    """What is pooled with its axes in the order that is read, and columns of zeros to fill up an odd number of them."""
    order = fields.order
    expr = arranged(store, ref, tuple((leg,) for leg in order))
    expr = Call(f.PAD, (expr, (0, extra))) if extra else expr
    shape = (*sizes_of(order)[:-1], int(merged(fields.columns)) + extra)
    solid = Call(f.CONTIGUOUS, (expr,))
    if not extra and not ref.value.strided and store.real(ref.stored) == store.real(order):  # nothing is copied
        return store.add(solid, shape, Kernel.VIEW)
    work = Work(moved=((4, order),), fresh=((1, order),))
    return store.add(solid, shape, Kernel.COPY, work, own=True)


def _kernels(store: Store, fields: Fields) -> Value:
    """A kernel for each channel and choice, at its place in the receptive field."""
    rows, columns = fields.axes
    groups = ((fields.outer,), fields.inner, (rows.kernel[1],), (columns.kernel[1],))
    weight = arranged(store, read(store, fields.weight), groups)
    dilation = tuple(axis.kernel[0] for axis in fields.axes)
    choices, gap, field = (fields.of_axes(name) for name in ("choices", "gap", "field"))
    shape = (int(fields.outer.size) * choices[0] * choices[1] * field[0], field[1] * int(merged(fields.inner)))
    legs = tuple(Leg(f"a{k}", size) for k, size in enumerate(shape))
    work = Work(moved=((2, legs),), fresh=((1, legs),), launches=choices[0] * choices[1] + 1)
    return store.add(Call(OF_KERNELS, (weight, choices, gap, dilation, field)), shape, Kernel.COPY, work)


def _rows(store: Store, fields: Fields) -> Value:
    """Where the kernels of all choices begin."""
    positions = tuple((axis.position,) for axis in fields.axes)
    index = indices(store, fields.selection.index)
    at = arranged(store, index, ((BATCH,), (fields.outer,), *positions))
    width, own = int(fields.selection.choice[1].size), (BATCH, fields.outer, *(leg for (leg,) in positions))
    down = store.add(Call(f.FLOOR_DIV, (at, width)), sizes_of(own), Kernel.ELEMENTWISE, Work(moved=((2, own),)))
    places: list[Expr] = [down, Call(f.SUB, (at, Call(f.MUL, (down, width))))]
    pools = [axis.pool for axis in fields.axes]
    if pools[0].image != fields.selection.choice[0]:
        places.reverse()
    step, gap = (tuple(pool.terms[k][0] for pool in pools) for k in (0, 1))
    first = tuple(pool.offset for pool in pools)
    legs = fields.order[:4]
    expr = Call(OF_ROWS, (tuple(places), fields.of_axes("choices"), step, gap, first, fields.axes[0].field))
    return store.add(expr, sizes_of(legs), Kernel.ELEMENTWISE, Work(moved=((12, legs),), launches=12))


def _work(store: Store, fields: Fields) -> Work:
    """Matmuls over the places that lie inside the image, with kernels that are looked up first."""
    rows, columns = fields.axes
    each = (BATCH, fields.outer, *fields.inner)
    looked_up = (*each, columns.position)
    return Work(
        flops=((2 * rows.inside * columns.inside, (*each, *fields.columns)),),
        moved=((2 * rows.inside * columns.field, looked_up), (1, fields.order), (2, fields.result)),
        fresh=((1, fields.result),),
        inside=((-(-rows.field // rows.step) * columns.field, looked_up[1:]),),
        launches=store.batch * rows.size * (int(columns.position.size) + 4),
    )
