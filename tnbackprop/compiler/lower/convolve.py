"""Native convolutions: a product of two tensors joined by windows is a convolution or one of its two VJPs.

Three participants (two tensors and the output) share the windows: one has the images i, one the legs a, one the
legs b, with i = c_a·a + c_b·b + offset. Which of them is the output says which kernel it is. A leg that all three
have is a group: with the batch leg among them, the weight VJP gives individual gradients ("batch as groups").
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod

import torch

from ...diagram.core import Leg, Product, Tensor, Window, ordered_union
from ..program import functions as f
from ..program.cost import Kernel, Work
from ..program.expr import Call, Expr, Ref, Word
from ..program.store import Store
from .arrange import alike, merged, placed
from .candidate import Candidate
from .contract import read
from .windows import padded, reach

Legs = tuple[Leg, ...]

TURNED = 6
"""A copy with another axis last takes as long as plain ones that move so many times its elements (on a CPU)."""


@dataclass(frozen=True)
class Roles:
    """Who has what: `image`, `one`, `two` are the legs of the three participants (None: the output)."""

    windows: tuple[Window, ...]
    images: Legs
    ones: Legs
    twos: Legs
    of_image: Tensor | None
    of_one: Tensor | None
    of_two: Tensor | None
    shared: Legs  # legs of all three: groups
    image_one: Legs
    image_two: Legs
    one_two: Legs

    def step(self, legs: Legs) -> tuple[int, ...]:
        """The coefficients of one leg per window."""
        return tuple(next(c for c, leg in w.terms if leg in legs) for w in self.windows)

    @property
    def dims(self) -> int:
        return len(self.windows)

    def swapped(self) -> Roles:
        return Roles(
            self.windows, self.images, self.twos, self.ones, self.of_image, self.of_two, self.of_one,
            self.shared, self.image_two, self.image_one, self.one_two,
        )  # fmt: skip


def convolutions(store: Store, product: Product, legs: Legs) -> list[Candidate]:
    """Plans for a product that is a convolution: forward, input VJP or weight VJP, each in both readings."""
    roles = find_roles(product, legs)
    if roles is None:
        return []
    if roles.of_image is None:
        # Of two that cost the same, the one with the small kernel comes first.
        readings = sorted((roles, roles.swapped()), key=lambda r: prod(int(leg.size) for leg in r.twos))
        found = [Candidate(partial(_input_vjp, roles=r, legs=legs)) for r in readings]
        flipped = Candidate(partial(_flipped, roles=readings[0], legs=legs))
        return [*found, flipped] if _flips(readings[0]) else found
    if roles.of_one is not None:
        roles = roles.swapped()
    return [Candidate(partial(way, roles=roles, legs=legs)) for way in (_weight_vjp, _forward)]


def find_roles(product: Product, output: Legs) -> Roles | None:
    """The roles, or None if the product is no convolution."""
    windows = tuple(op for op in product.operands if isinstance(op, Window))
    tensors = [op for op in product.operands if isinstance(op, Tensor)]
    if not 1 <= len(windows) <= 3 or len(tensors) != 2 or len(windows) + 2 != len(product.operands):
        return None
    if any(len(w.terms) != 2 or min(c for c, _ in w.terms) < 1 or w.offset > 0 for w in windows):
        return None
    people: list[tuple[Tensor | None, Legs]] = [(t, t.legs) for t in tensors] + [(None, output)]
    images = tuple(w.image for w in windows)
    sliding = ordered_union(*(w.legs for w in windows))
    if len(sliding) != 3 * len(windows) or not all(isinstance(leg.size, int) for leg in sliding):
        return None
    holder = [p for p in people if set(p[1]) & set(images)]
    others = [p for p in people if p not in holder]
    if len(holder) != 1 or not set(images) <= set(holder[0][1]):
        return None
    one, two = others
    ones = _of_each(windows, one[1])
    twos = _of_each(windows, two[1])
    if ones is None or twos is None or set(ones) & set(twos) or set(sliding) & set(holder[0][1]) != set(images):
        return None
    member = {leg: tuple(leg in p[1] for p in (holder[0], one, two)) for leg in ordered_union(*(p[1] for p in people))}
    plain = [leg for leg in member if leg not in sliding]
    if any(sum(member[leg]) < 2 for leg in plain):
        return None

    def having(*who: bool) -> Legs:
        return tuple(leg for leg in plain if member[leg] == who)

    return Roles(
        windows, images, ones, twos, holder[0][0], one[0], two[0],
        having(True, True, True), having(True, True, False), having(True, False, True), having(False, True, True),
    )  # fmt: skip


def _of_each(windows: tuple[Window, ...], legs: Legs) -> Legs | None:
    """The leg of each window that is among `legs`; None unless there is exactly one for each."""
    found = tuple(leg for w in windows for _, leg in w.terms if leg in legs)
    owners = [w for w in windows for _, leg in w.terms if leg in legs]
    return found if owners == list(windows) else None


def _kernel(roles: Roles, sliding: Legs) -> Kernel:
    large = any(int(leg.size) > 11 for leg in sliding)
    return Kernel.GROUPED if merged(roles.shared) != 1 or large else Kernel.CONVOLUTION


def _work(roles: Roles, result: Legs) -> Work:
    everything = (*roles.shared, *roles.image_one, *roles.image_two, *roles.one_two, *roles.ones, *roles.twos)
    image = (*roles.shared, *roles.image_one, *roles.image_two, *roles.images)
    first = (*roles.shared, *roles.image_one, *roles.one_two, *roles.ones)
    second = (*roles.shared, *roles.image_two, *roles.one_two, *roles.twos)
    return Work(flops=((2, everything),), moved=((1, image), (1, first), (1, second)), fresh=((1, result),))


def _image(
    store: Store, roles: Roles, groups: tuple[Legs, ...], stride: Legs, kernel: Legs
) -> tuple[Expr, tuple[int, ...]]:
    """The image operand and the padding: the kernel's own where it is symmetric, else padded and cut here."""
    assert roles.of_image is not None
    ref = read(store, roles.of_image)
    if symmetric(roles, stride, kernel):
        return placed(store, ref, groups), tuple(-w.offset for w in roles.windows)
    expr = padded(store, ref, list(roles.windows))
    lengths = {w.image: Leg(w.image.name, reach(w)[2]) for w in roles.windows}
    legs = tuple(lengths.get(leg, leg) for leg in ref.order)
    value = store.add(expr, tuple(leg.size for leg in legs), Kernel.VIEW, strided=True)
    exact = tuple(tuple(lengths.get(leg, leg) for leg in group) for group in groups)
    return placed(store, Ref(value, legs, legs), exact), (0,) * roles.dims


def symmetric(roles: Roles, stride: Legs, kernel: Legs) -> bool:
    """Whether the same padding on both sides gives just the output positions `stride`."""
    steps, gaps = roles.step(stride), roles.step(kernel)
    for window, step, gap, out, k in zip(roles.windows, steps, gaps, stride, kernel, strict=True):
        span = int(window.image.size) - 2 * window.offset - gap * (int(k.size) - 1) - 1
        if span < 0 or span // step + 1 != out.size:
            return False
    return True


def _forward(store: Store, roles: Roles, legs: Legs) -> Ref:
    """out[one] = Σ image[c1·one + c2·two] · kernel[two]: torch's conv with `two` as the kernel."""
    assert roles.of_two is not None
    batch, inner, outer, groups = roles.image_one, roles.image_two, roles.one_two, roles.shared
    x, padding = _image(store, roles, (batch, (*groups, *inner), *_each(roles.images)), roles.ones, roles.twos)
    two = read(store, roles.of_two)
    weight = placed(store, two, ((*groups, *outer), inner, *_each(roles.twos)))
    numbers = roles.step(roles.ones), padding, roles.step(roles.twos), merged(groups)
    expr = Call(f.CONV[roles.dims], (x, alike(store, x, weight), None, *numbers))
    order = (*batch, *groups, *outer, *roles.ones)
    axes = (batch, (*groups, *outer))
    return _entered(store, expr, order, legs, _kernel(roles, roles.twos), axes, _work(roles, order))


def _weight_vjp(store: Store, roles: Roles, legs: Legs) -> Ref:
    """out[one] = Σ image[c1·one + c2·two] · g[two]: the weight VJP with stride c2, dilation c1."""
    assert roles.of_two is not None
    batch, inner, outer, groups = roles.image_two, roles.image_one, roles.one_two, roles.shared
    x, padding = _image(store, roles, (batch, (*groups, *inner), *_each(roles.images)), roles.twos, roles.ones)
    two = read(store, roles.of_two)
    g = placed(store, two, (batch, (*groups, *outer), *_each(roles.twos)))
    size = (merged((*groups, *outer)), merged(inner), *(leg.size for leg in roles.ones))
    numbers = roles.step(roles.twos), padding, roles.step(roles.ones), merged(groups)
    expr = Call(f.CONV_WEIGHT[roles.dims], (x, size, alike(store, x, g), *numbers))
    order = (*groups, *outer, *inner, *roles.ones)
    axes = ((*groups, *outer), inner)
    return _entered(store, expr, order, legs, _kernel(roles, roles.ones), axes, _work(roles, order))


def _input_vjp(store: Store, roles: Roles, legs: Legs) -> Ref:
    """out[image] = Σ g[one] · weight[two]: the input VJP with stride c1, dilation c2."""
    assert roles.of_one is not None and roles.of_two is not None
    batch, inner, outer, groups = roles.image_one, roles.image_two, roles.one_two, roles.shared
    one, two = read(store, roles.of_one), read(store, roles.of_two)
    g = placed(store, one, (batch, (*groups, *outer), *_each(roles.ones)))
    weight = placed(store, two, ((*groups, *outer), inner, *_each(roles.twos)))
    fits = symmetric(roles, roles.ones, roles.twos)
    lengths = [w.image.size if fits else reach(w)[2] for w in roles.windows]
    padding = tuple(-w.offset if fits else 0 for w in roles.windows)
    size = (merged(batch), merged((*groups, *inner)), *lengths)
    numbers = roles.step(roles.ones), padding, roles.step(roles.twos), merged(groups)
    expr: Expr = Call(f.CONV_INPUT[roles.dims], (size, weight, alike(store, weight, g), *numbers))
    if not fits:
        expr = _cut(expr, roles)
    order = (*batch, *groups, *inner, *roles.images)
    axes = (batch, (*groups, *inner))
    return _entered(store, expr, order, legs, _kernel(roles, roles.twos), axes, _work(roles, order))


def _around(roles: Roles) -> tuple[int, ...]:
    """The padding of the output with which the flipped kernel covers the image."""
    own = [-w.offset if symmetric(roles, roles.ones, roles.twos) else 0 for w in roles.windows]
    gaps = roles.step(roles.twos)
    return tuple(gap * (int(k.size) - 1) - p for gap, k, p in zip(gaps, roles.twos, own, strict=True))


def _flips(roles: Roles) -> bool:
    """Whether the input VJP is a plain convolution of two dimensions: stride 1, no groups, a kernel of usual size."""
    plain = roles.dims == 2 and not roles.shared and _kernel(roles, roles.twos) is Kernel.CONVOLUTION
    return plain and set(roles.step(roles.ones)) == {1} and min(_around(roles)) >= 0


def _flipped(store: Store, roles: Roles, legs: Legs) -> Ref:
    """The input VJP as a convolution: out[image] = Σ g[image + padding - c2·two] · weight[two], channels last.

    That kernel multiplies channels as matrices: where they are many, copying g and the result is paid for.
    """
    assert roles.of_one is not None and roles.of_two is not None
    batch, inner, outer = roles.image_one, roles.image_two, roles.one_two
    g = placed(store, read(store, roles.of_one), (batch, outer, *_each(roles.ones)))
    weight = placed(store, read(store, roles.of_two), (outer, inner, *_each(roles.twos)))
    shape = (merged(inner), merged(outer), *(leg.size for leg in roles.twos))
    turned = Work(moved=((2 * TURNED, (*inner, *outer, *roles.twos)),))
    flipped = Call(f.TRANSPOSE, (Call(f.FLIP, (weight, (2, 3))), 0, 1))
    kernel = store.add(_channels_last(flipped), shape, Kernel.COPY, turned, strided=True)
    numbers = 1, _around(roles), roles.step(roles.twos)
    expr: Expr = Call(f.CONV[2], (_channels_last(g), alike(store, g, kernel), None, *numbers))
    if not symmetric(roles, roles.ones, roles.twos):
        expr = _cut(expr, roles)
    order = (*batch, *inner, *roles.images)
    copied = (*batch, *outer, *roles.ones), order
    moved, inside = (tuple((times, each) for each in copied) for times in (TURNED, 1))
    work = replace(_work(roles, order), moved=moved, inside=inside)
    return _entered(store, Call(f.CONTIGUOUS, (expr,)), order, legs, Kernel.CHANNELS_LAST, (batch, inner), work)


def _channels_last(expr: Expr) -> Expr:
    return Call(f.CONTIGUOUS, (expr,), (("memory_format", Word("torch.channels_last", torch.channels_last)),))


def _cut(expr: Expr, roles: Roles) -> Expr:
    """From the length that the pattern covers back to the image: cut what was padding, put zeros for the rest."""
    pads: list[int] = []
    for axis, window in enumerate(roles.windows, start=2):
        left, _, length = reach(window)
        size = int(window.image.size)
        kept, left = max(0, min(size, length - left)), min(left, length)
        expr = Call(f.NARROW, (expr, axis, left, kept))
        pads = [0, size - kept, *pads]
    return Call(f.PAD, (expr, tuple(pads))) if any(pads) else expr


def _each(legs: Legs) -> tuple[Legs, ...]:
    return tuple((leg,) for leg in legs)


def _entered(
    store: Store, expr: Expr, order: Legs, legs: Legs, kernel: Kernel, axes: tuple[Legs, Legs], work: Work
) -> Ref:
    sliding = order[len(axes[0]) + len(axes[1]) :]
    shape = (merged(axes[0]), merged(axes[1]), *(leg.size for leg in sliding))
    return Ref(store.add(expr, shape, kernel, work, own=True), order, legs)
