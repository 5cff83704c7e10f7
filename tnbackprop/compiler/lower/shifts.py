"""Shifts: two windows that slide together depend on the difference of their kernel legs only, up to border rows.

Σ_p Π[i = s·p + d·k] Π[i' = s·p + d·k'] x[i] y[i'] is a sum over the pairs of rows (s·p + d·k, s·p + d·k'). A step of
s/gcd(s, d) in k and k' moves these rows as p does, so all such (k, k') share their rows but those at the two ends,
and every product of two rows is made once: K(O + (K-1)/2) of them for one tensor and stride 1, where unfolding takes
K²·O and K times the memory. This is the input factor of a convolution in KFAC-expand; one axis is shifted, the others
are unfolded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import gcd

from ...diagram.core import Leg, Product, Tensor, Window
from ..program.cost import Kernel, Work
from ..program.expr import Call, Ref, Value
from ..program.functions import Memory, helper
from ..program.store import Store
from .arrange import Groups, placed, sizes_of, sizes_of_axes
from .candidate import Candidate
from .contract import read
from .windows import slides_over, unfolded

Legs = tuple[Leg, ...]

WINDOW_GRAM = """\
def window_gram(x, y, shape, at, out, dilation):
    # gram[k, l] = Σ_p x[stride·p + dilation·k] y[stride·p + dilation·l]ᵀ; row i is [i % stride, ..., i // stride, :].
    # Equal l - k share their rows: those in the middle belong to all windows, those before and after to some.
    stride, gram = len(x), x.new_empty(shape)
    blocks = gram.movedim(at, (0, 1))
    last = [size - 1 for size in blocks.shape[:2]]

    def rows(image, k, start, count, parts):
        first = dilation * k
        image = image[first % stride].narrow(-2, first // stride + start, count)
        return image.unflatten(-2, (parts, count // parts)).flatten(-2).movedim(-2, 0)

    for k in range(last[0] + 1):
        for l in range(k if x is y else 0, last[1] + 1):
            if min(k, l) < stride:
                steps = min(last[0] - k, last[1] - l) // stride
                edge = dilation * steps
                pieces = [(0, edge, steps), (edge, out - edge, 1), (out, edge, steps)] if steps else [(0, out, 1)]
                products = torch.cat([rows(x, k, *piece) @ rows(y, l, *piece).mT for piece in pieces])
                for t in range(steps + 1):
                    block = products[t : t + steps + 1].sum(0)
                    blocks[k + stride * t, l + stride * t] = block.reshape(blocks.shape[2:])
                    if x is y and k != l:
                        blocks[l + stride * t, k + stride * t] = block.mT.reshape(blocks.shape[2:])
    return gram"""
GRAM = helper("window_gram", WINDOW_GRAM, memory=Memory.OWN)


@dataclass(frozen=True)
class Pair:
    """Two windows i = g·(s·p + d·k) + o over two operands, with s and d coprime: g is `scale`."""

    one: Window
    two: Window
    position: Leg
    kernels: tuple[Leg, Leg]
    scale: int
    stride: int
    dilation: int

    @property
    def out(self) -> int:
        return int(self.position.size)

    def rows(self, window: Window, kernel: Leg) -> tuple[Window, Leg, Leg]:
        """The window over all rows that this one reads, as (row // stride, row % stride)."""
        count = self.out + self.dilation * (int(kernel.size) - 1) // self.stride
        outer, inner = Leg(f"{window.image}.outer", count), Leg(f"{window.image}.inner", self.stride)
        terms = ((self.scale * self.stride, outer), (self.scale, inner))
        return Window(window.image, terms[: 1 if self.stride == 1 else 2], window.offset), outer, inner

    def chains(self, symmetric: bool) -> Iterator[int]:
        """For every first pair of (k, k') how many steps it can take: as the source does."""
        one, two = (int(leg.size) for leg in self.kernels)
        for k in range(one):
            for other in range(k if symmetric else 0, two):
                if min(k, other) < self.stride:
                    yield min(one - 1 - k, two - 1 - other) // self.stride


def shifts(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """A plan for every pair of windows over two tensors that share positions and rows."""
    tensors = [op for op in product.operands if isinstance(op, Tensor)]
    windows = [op for op in product.operands if isinstance(op, Window)]
    if len(tensors) != 2 or len(windows) + 2 != len(product.operands):
        return []
    first, second = ([w for w in windows if slides_over(w, t, product, legs)] for t in tensors)
    one, two = _reads(tensors[0], first), _reads(tensors[1], second)
    alone = (one ^ two) - set(legs)  # legs that are summed in one of them only
    if alone or len(first) + len(second) != len(windows) or any(len(set(t.legs)) < len(t.legs) for t in tensors):
        return []
    pairs = [find_pair(w, v, product, legs) for w in first for v in second]
    return [Candidate(partial(_shifted, product=product, pair=pair, legs=legs)) for pair in pairs if pair is not None]


def _reads(tensor: Tensor, windows: list[Window]) -> set[Leg]:
    """The legs of a tensor that is seen through its windows."""
    return {*tensor.legs, *(leg for w in windows for leg in w.legs)} - {w.image for w in windows}


def find_pair(one: Window, two: Window, product: Product, legs: Legs) -> Pair | None:
    """The pair, if the windows share their positions and both steps, and some rows belong to all of them."""
    own = [leg for _, leg in one.terms if leg not in two.legs]
    its = [leg for _, leg in two.terms if leg not in one.legs]
    shared = [leg for _, leg in one.terms if leg in two.legs]
    if not len(own) == len(its) == len(shared) == 1:
        return None
    steps = [{leg: c for c, leg in window.terms} for window in (one, two)]
    others = [op for op in product.operands if op not in (one, two)]
    outside = {leg for op in others for leg in op.legs}
    free = {*own, *its} <= set(legs) and not outside & {*own, *its, *shared} and shared[0] not in legs
    stride, dilation = steps[0][shared[0]], steps[0][own[0]]
    if not free or (stride, dilation) != (steps[1][shared[0]], steps[1][its[0]]):
        return None
    scale = gcd(stride, dilation)
    pair = Pair(one, two, shared[0], (own[0], its[0]), scale, stride // scale, dilation // scale)
    most = max(pair.chains(False))
    return pair if 0 < pair.dilation * most < pair.out else None


def _shifted(store: Store, product: Product, pair: Pair, legs: Legs) -> Ref:
    """One call: images as [row % stride, head, own legs, row // stride, summed legs], the result in its legs' order."""
    bases = [pair.rows(window, kernel) for window, kernel in zip((pair.one, pair.two), pair.kernels, strict=True)]
    seen = {pair.one: bases[0][0], pair.two: bases[1][0]}
    operands = tuple(seen.get(op, op) if isinstance(op, Window) else op for op in product.operands)
    views = [op for op in unfolded(store, Product(product.scale, operands), legs).operands if isinstance(op, Tensor)]
    one, two = (read(store, next(view for view in views if outer in view.legs)) for _, outer, _ in bases)
    shared = [leg for leg in one.order if leg in two.order]
    head = tuple(leg for leg in legs if leg in shared)
    summed = tuple(leg for leg in shared if leg not in legs)
    images: list[Value] = []
    own: list[Legs] = []
    for ref, (_, outer, inner) in zip((one, two), bases, strict=True):
        own.append(tuple(leg for leg in legs if leg in ref.order and leg not in head))
        rest = (inner,) if inner in ref.order else ()
        images.append(_entered(store, ref, (rest, *((head,) if head else ()), own[-1], (outer,), summed)))
    sides = [tuple(leg for leg in legs if leg in (*mine, k)) for mine, k in zip(own, pair.kernels, strict=True)]
    order = (*head, *sides[0], *sides[1])
    at = tuple(order.index(leg) for leg in pair.kernels)
    expr = Call(GRAM, (*images, sizes_of(order), at, pair.out, pair.dilation))
    work = _work(pair, images[0] is images[1], head, own[0], own[1], summed)
    return Ref(store.add(expr, sizes_of(order), Kernel.SHIFTED, work), order, legs)


def _entered(store: Store, ref: Ref, groups: Groups) -> Value:
    """The arranged value: one for both images, where they are the same."""
    return store.add(placed(store, ref, groups), sizes_of_axes(groups), Kernel.VIEW)


def _work(pair: Pair, symmetric: bool, head: Legs, one: Legs, two: Legs, summed: Legs) -> Work:
    """Products of two rows, and what it takes to add them up and to put them in place."""
    steps = list(pair.chains(symmetric))
    rows = sum(pair.out + pair.dilation * t for t in steps)
    products, sums = sum(2 * t + 1 for t in steps), sum(t + 1 for t in steps)
    blocks = int(pair.kernels[0].size) * int(pair.kernels[1].size)
    block = (*head, *one, *two)
    added = 3 * products + sum((t + 1) ** 2 for t in steps) + sums + 2 * blocks
    pieces = sum(3 if t else 1 for t in steps)
    return Work(
        flops=((2 * rows, (*block, *summed)),),
        moved=((rows, (*head, *one, *summed)), (rows, (*head, *two, *summed)), (added, block)),
        fresh=((blocks, block),),
        inside=((4 * max(steps) + 2, block),),
        launches=2 * (pieces + len(steps) + sums + blocks),  # a view takes about as long as a launch
    )
