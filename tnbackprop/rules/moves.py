"""Moves of elements to other places: flips, rolls, repeats, gathers, scatters, shuffles of pixels, patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.text import access, axis, broadcast_sizes, join, leg_names, per_axis, refuse

TABLE = Table()
aten = torch.ops.aten


def _size(call: Any, dim: int) -> int:
    """The size of an axis of the input, which must not hold the batch."""
    size = call.input.shape[dim]
    if not isinstance(size, int):
        refuse(call, "it moves samples", "Move along another axis.")
    return int(size)


def _dim(call: Any) -> int:
    """The axis of the input along which it moves."""
    dim = axis(call.dim, len(call.input.axes))
    _size(call, dim)
    return dim


def _sourced(call: Any, sources: Mapping[int, str]) -> Rule:
    """output[x] = input[source(x)] along some axes: torch code of the source index of each."""
    legs = leg_names(call.output)
    items, factors, saved = list(legs), "", {}
    for dim, code in sources.items():
        items[dim] = f"{legs[dim]}{legs[dim]}"
        factors += f"select(source{dim}[{legs[dim]}], {items[dim]}) * "
        saved[f"source{dim}[{legs[dim]}]"] = code
    return Rule(f"output[{join(legs)}] = {factors}input[{join(items)}]", saved=saved)


def _places(call: Any, dim: int) -> str:
    return f"torch.arange({_size(call, dim)}, device={{input}}.device)"


@TABLE.rule(aten.flip.default)
def flip(call: Any) -> Rule:
    dims = sorted(axis(d, len(call.input.axes)) for d in call.dims)
    return _sourced(call, {d: f"{_places(call, d)}.flip(0)" for d in dims})


@TABLE.rule(aten.roll.default)
def roll(call: Any) -> Rule:
    if not call.dims:
        refuse(call, "it rolls all axes as one", "Say dims=.")
    shifts: dict[int, Any] = {}
    for dim, by in zip(call.dims, call.shifts, strict=True):  # shifts along one axis that is there twice add up
        dim = axis(dim, len(call.input.axes))
        shifts[dim] = shifts.get(dim, 0) + by
    return _sourced(call, {dim: f"{_places(call, dim)}.roll({by})" for dim, by in shifts.items()})


@TABLE.rule(aten.index_select.default)
def index_select(call: Any) -> Rule:
    return _sourced(call, {_dim(call): "{index}"})


@TABLE.rule(aten.rot90.default)
def rot90(call: Any) -> Rule:
    """A transpose and flips."""
    legs = leg_names(call.output)
    a, b = (axis(d, len(legs)) for d in call.dims)
    turned = list(legs)
    if call.k % 2:
        turned[a], turned[b] = legs[b], legs[a]
    factors, saved = "", {}
    for dim, back in ((a, call.k % 4 in (2, 3)), (b, call.k % 4 in (1, 2))):
        if back:
            leg, into = turned[dim], turned[dim] * 2
            factors += f"select(source{dim}[{leg}], {into}) * "
            saved[f"source{dim}[{leg}]"] = f"{_places(call, dim)}.flip(0)"
            turned[dim] = into
    return Rule(f"output[{join(legs)}] = {factors}input[{join(turned)}]", saved=saved)


@TABLE.rule(aten.repeat.default)
def repeat(call: Any) -> Rule:
    """Copies of the whole axis, the copy outermost; new axes come first."""
    legs = leg_names(call.input, skip="r")
    new = len(call.repeats) - len(legs)
    left = [f"r{k}" for k in range(new)]
    copies = enumerate(zip(legs, call.repeats[new:], strict=True), start=new)
    left += [leg if r == 1 else f"r{k}.{leg}" for k, (leg, r) in copies]
    constants = {f"R{k}": r for k, r in enumerate(call.repeats) if k < new or r != 1}
    return Rule(f"output[{join(left)}] = input[{join(legs)}]", constants=constants)


@TABLE.rule(aten.repeat_interleave.self_int)
def repeat_interleave(call: Any) -> Rule:
    """Copies of each element, side by side."""
    legs = leg_names(call.input, skip="r")
    dim = axis(call.dim, len(legs))
    left = [f"{leg}.r" if k == dim else leg for k, leg in enumerate(legs)]
    return Rule(f"output[{join(left)}] = input[{join(legs)}]", constants={"R": call.repeats})


@TABLE.rule(aten.tril.default, aten.triu.default)
def triangle(call: Any) -> Rule:
    """The elements on one side of a diagonal, zeros elsewhere."""
    legs, (rows, columns) = leg_names(call.input), call.input.shape[-2:]
    if not (isinstance(rows, int) and isinstance(columns, int)):
        refuse(call, "the matrix has the batch as an axis", "Put the batch first.")
    ones = f"torch.ones(({rows}, {columns}), dtype={{input}}.dtype, device={{input}}.device)"
    name = "tril" if call.target == aten.tril.default else "triu"
    saved = {f"mask[{join(legs[-2:])}]": f"{ones}.{name}({call.diagonal})"}
    vjp = {"input": f"{{cotangents}}.{name}({call.diagonal})"}
    return Rule(f"output[{join(legs)}] = mask[{join(legs[-2:])}] * input[{join(legs)}]", saved=saved, vjp=vjp)


@TABLE.rule(aten.diagonal.default)
def diagonal(call: Any) -> Rule:
    """The diagonal becomes the last axis."""
    legs = leg_names(call.output)
    a, b = (axis(d, len(legs) + 1) for d in (call.dim1, call.dim2))
    rest = iter(legs[:-1])
    shift = {a: max(0, -call.offset), b: max(0, call.offset)}
    items = [f"{legs[-1]} + {shift[k]}" if k in shift else next(rest) for k in range(len(legs) + 1)]
    for k in shift:
        _size(call, k)
    return Rule(f"output[{join(legs)}] = input[{join(items)}]")


@TABLE.rule(aten.unfold.default)
def unfold(call: Any) -> Rule:
    """Overlapping pieces of an axis, their elements on a new last axis."""
    legs = leg_names(call.output)
    dim = axis(call.dimension, len(call.input.axes))
    _size(call, dim)
    items = [f"{call.step}*{leg} + {legs[-1]}" if k == dim else leg for k, leg in enumerate(legs[:-1])]
    return Rule(f"output[{join(legs)}] = input[{join(items)}]")


@TABLE.rule(aten.pixel_shuffle.default)
def pixel_shuffle(call: Any) -> Rule:
    """Shi et al. 2016, arXiv:1609.05158."""
    r = call.upscale_factor
    return Rule("output[*s, c, h.a, w.b] = input[*s, c.a.b, h, w]", constants={"A": r, "B": r})


@TABLE.rule(aten.pixel_unshuffle.default)
def pixel_unshuffle(call: Any) -> Rule:
    r = call.downscale_factor
    return Rule("output[*s, c.a.b, h, w] = input[*s, c, h.a, w.b]", constants={"A": r, "B": r})


@TABLE.rule(aten.channel_shuffle.default)
def channel_shuffle(call: Any) -> Rule:
    """Zhang et al. 2018, arXiv:1707.01083."""
    return Rule("output[n, c.g, *s] = input[n, g.c, *s]", constants={"G": call.groups})


def _patches(call: Any, image: Sequence[int]) -> dict[str, int]:
    """The numbers of the positions that a kernel takes in an image."""
    found: dict[str, int] = {}
    names = ("kernel_size", "dilation", "padding", "stride")
    for a, numbers in enumerate(zip(*(per_axis(call.arguments[name], 2) for name in names), strict=True)):
        kernel, dilation, padding, stride = numbers
        positions = (image[a] + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
        found |= {f"s{a}": stride, f"d{a}": dilation, f"p{a}": padding, "KL"[a]: kernel, "HW"[a]: positions}
    return found


@TABLE.rule(aten.im2col.default)
def im2col(call: Any) -> Rule:
    """The patches of a convolution as columns."""
    text = "output[n, c.k.l, h.w] = input[n, c, s0*h + d0*k - p0, s1*w + d1*l - p1]"
    return Rule(text, constants=_patches(call, call.input.shape[-2:]))


@TABLE.rule(aten.col2im.default)
def col2im(call: Any) -> Rule:
    """Columns added up at their places in an image."""
    places = "delta[y, s0*h + d0*k - p0] * delta[x, s1*w + d1*l - p1]"
    text = f"output[n, c, y, x] = input[n, c.k.l, h.w] * {places}"
    return Rule(text, constants=_patches(call, call.output_size))


# by computed indices


@TABLE.rule(aten.gather.default)
def gather(call: Any) -> Rule:
    """output[…, p, …] = input[…, index[…, p, …], …]."""
    legs, dim = leg_names(call.output, skip="k"), _dim(call)
    if any(a != b for k, (a, b) in enumerate(zip(call.index.shape, call.input.shape, strict=True)) if k != dim):
        refuse(call, f"index {call.index.shape} is smaller than input {call.input.shape}", "Slice the input first.")
    into = [*legs[:dim], "k", *legs[dim + 1 :]]
    return Rule(f"output[{join(legs)}] = select(index[{join(legs)}], k) * input[{join(into)}]")


def _along(call: Any, legs: list[str], dim: int) -> tuple[str, str]:
    """The legs of the index and of the source, and what says which of the input's they meet, where they are smaller."""
    if call.src.shape != call.index.shape:  # torch has no derivative either
        refuse(call, f"src {call.src.shape} is larger than index {call.index.shape}", "Slice src first.")
    index, inside = list(legs), ""
    index[dim] = "k"
    for k, (size, leg) in enumerate(zip(call.index.shape, legs, strict=True)):
        if k != dim and size != call.input.shape[k]:
            index[k] = leg * 2
            inside += f" * delta[{leg}, 1*{index[k]} + 0]"
    return join(index), inside


@TABLE.rule(aten.scatter_add.default)
def scatter_add(call: Any) -> Rule:
    """output = input, and each element of the source added at its index."""
    legs, dim = leg_names(call.output, skip="k"), _dim(call)
    (index, inside), out = _along(call, legs, dim), join(legs)
    return Rule(f"output[{out}] = input[{out}] + select(index[{index}], {legs[dim]}) * src[{index}]{inside}")


@TABLE.rule(aten.index_add.default)
def index_add(call: Any) -> Rule:
    """output = input, and each slice of the source added at its index."""
    legs, dim = leg_names(call.output, skip="k"), _dim(call)
    into = join([*legs[:dim], "k", *legs[dim + 1 :]])
    text = f"output[{join(legs)}] = input[{join(legs)}] + alpha * select(index[k], {legs[dim]}) * source[{into}]"
    return Rule(text, constants={"alpha": call.alpha})


@TABLE.rule(aten.scatter.src, aten.scatter.value)
def scatter(call: Any) -> Rule:
    """output = input, but at the index; of several elements for one place, the one that torch takes is `live`."""
    legs, dim = leg_names(call.output, skip="k"), _dim(call)
    kept = f"output[{join(legs)}] = keep[{join(legs)}] * input[{join(legs)}]"
    saved = {f"keep[{join(legs)}]": f"torch.ones_like({{input}}).scatter({dim}, {{index}}, 0)"}
    if call.target == aten.scatter.value:  # the value may be infinite, so it is in no formula
        both = {"input": join(legs), "output": join(legs)}
        return Rule(jacobian={"input": f"keep[{join(legs)}]"}, legs=both, saved=saved)
    index, inside = _along(call, legs, dim)
    order = f"torch.arange({call.index.shape[dim]}, device={{index}}.device).view({[-1, *[1] * (len(legs) - 1 - dim)]})"
    order = f"{order}.expand_as({{index}})"
    last = f"torch.zeros_like({{input}}, dtype=torch.int64).scatter({dim}, {{index}}, {order})"
    saved[f"live[{index}]"] = f"({last}.gather({dim}, {{index}}) == {order}).to({{input}}.dtype)"
    return Rule(f"{kept} + select(index[{index}], {legs[dim]}) * live[{index}] * src[{index}]{inside}", saved=saved)


class _Places:
    """The places of an input that integer tensors choose, one for each of some axes, broadcast with each other.

    legs, shape  of what is there
    items        legs of the input
    factors      choose the places, from what is saved
    """

    def __init__(self, call: Any) -> None:
        given = {k: v for k, v in enumerate(call.indices) if v is not None}
        if any(value.dtype in (torch.bool, torch.uint8) for value in given.values()):
            refuse(call, "it is indexed by a mask", "Use torch.where, or index with integers.")
        names = [next((f"{{{n}}}" for n, v in call.tensors.items() if v is each), "None") for each in call.indices]
        shown, places = max(len(value.axes) for value in given.values()), sorted(given)
        first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
        padded = [(*(1,) * (shown - len(value.axes)), *value.shape) for value in given.values()]
        common = [next((size for size in along if size != 1), 1) for along in zip(*padded, strict=True)]
        rest = [size for k, size in enumerate(call.input.shape) if k not in given]
        self.shape = (*rest[:first], *common, *rest[first:])
        self.axes = [(size,) for size in self.shape]
        self.legs, self.indices = leg_names(self, skip="k"), f"[{join(names)}]"
        self.common, self.items, self.factors, self.saved = self.legs[first : first + shown], [], "", {}
        left, target = iter(self.legs[:first] + self.legs[first + shown :]), SimpleNamespace(shape=common)
        for k, size in enumerate(call.input.shape):
            counts = not isinstance(size, int)  # capture has seen to it that an index of the batch axis is arange(N)
            if k in given and not counts:
                read = access(f"at{k}", given[k], target, self.common)
                there = "" if given[k].device == call.input.device else ".to({input}.device)"  # a CPU's will do
                self.saved[read] = f"{names[k]}{there} % {size}"
                self.factors += f"select({read}, k{k}) * "
            self.items.append(next(left) if k not in given else "n" if counts else f"k{k}")


@TABLE.rule(aten.index.Tensor)
def index(call: Any) -> Rule:
    """output = input[indices]."""
    at = _Places(call)
    text = f"output[{join(at.legs)}] = {at.factors}input[{join(at.items)}]"
    return Rule(text, saved=at.saved, constants=broadcast_sizes(join([*at.saved])))


@TABLE.rule(aten.index_put.default)
def index_put(call: Any) -> Rule:
    """output = input, but at the indices; of several values for one place, the one that torch takes is `live`."""
    at, put = _Places(call), "torch.ops.aten.index_put"
    legs, keep = join(at.items), "1" if call.accumulate else f"keep[{join(at.items)}]"
    saved = {keep: f"{put}(torch.ones_like({{input}}), {at.indices}, {{input}}.new_zeros(()))"} if keep != "1" else {}
    if not call.values.differentiable:  # what is written may be infinite, so it is in no formula
        return Rule(jacobian={"input": keep}, legs={"input": legs, "output": legs}, saved=saved)
    written = at.factors + access("values", call.values, at, at.legs)
    if saved and {*at.common} - {"n"}:
        read = f"torch.ops.aten.index({{input}}, {at.indices})"
        order = f"torch.arange({read}.numel(), device={{input}}.device).view({read}.shape)"
        last = f"{put}(torch.zeros_like({{input}}, dtype=torch.int64), {at.indices}, {order})"
        live = f"live[{join(at.legs)}]"
        saved[live] = f"(torch.ops.aten.index({last}, {at.indices}) == {order}).to({{input}}.dtype)"
        written = f"{live} * {written}"
    sizes = {leg.upper(): size for leg, size in zip(at.legs, at.shape, strict=True) if isinstance(size, int)}
    text = f"output[{legs}] = {keep} * input[{legs}] + {written}"
    return Rule(text, saved=saved | at.saved, constants=sizes | broadcast_sizes(written))


@TABLE.rule(
    aten.topk.default, aten.sort.default, aten.sort.stable, aten.kthvalue.default, aten.median.dim,
    aten.nanmedian.dim, aten.mode.default, aten.cummax.default, aten.cummin.default,
)  # fmt: skip
def ordered(call: Any) -> Rule:
    """The values in their order along one axis; the saved index says where they are."""
    legs, dim = leg_names(call.input, skip="k"), _dim(call)
    into = [*legs[:dim], "k", *legs[dim + 1 :]]
    options = {
        aten.topk.default: f"topk({call.arguments.get('k')}, {dim}, {call.arguments.get('largest')})",
        aten.kthvalue.default: f"kthvalue({call.arguments.get('k')}, {dim})",
        aten.median.dim: f"median({dim})",
        aten.nanmedian.dim: f"nanmedian({dim})",
        aten.mode.default: f"mode({dim})",
        aten.cummax.default: f"cummax({dim})",
        aten.cummin.default: f"cummin({dim})",
    }
    code = options.get(call.target, f"sort({dim}, {call.arguments.get('descending')})")
    one = call.target in (aten.kthvalue.default, aten.median.dim, aten.nanmedian.dim, aten.mode.default)
    left = legs if not one else [*legs[:dim], *(["u"] if call.keepdim else []), *legs[dim + 1 :]]
    chosen = [leg for leg in left if leg != "u"]
    shown, back = (f".unsqueeze({dim})", f".squeeze({dim})" * (not call.keepdim)) if one else ("", "")
    return Rule(
        f"output[{join(left)}] = select(index[{join(chosen)}], k) * input[{join(into)}]",
        saved={f"index[{join(chosen)}]": f"{{input}}.{code}[1]"},
        forward=f"{{input}}.gather({dim}, {{index}}{shown}){back}",
        kinks="where elements are equal, as torch orders them",
    )


@TABLE.rule(aten.amax.default, aten.amin.default)
def extremum(call: Any) -> Rule:
    """The largest element over some axes; equal ones have equal shares."""
    legs = leg_names(call.input)
    dims = sorted(axis(d, len(legs)) for d in call.dim) or list(range(len(legs)))
    for d in dims:
        _size(call, d)
    left = [f"u{k}" if k in dims else leg for k, leg in enumerate(legs) if call.keepdim or k not in dims]
    name = "amax" if call.target == aten.amax.default else "amin"
    equal = f"({{input}} == {{input}}.{name}({dims}, True)).to({{input}}.dtype)"
    return Rule(
        f"output[{join(left)}] = share[{join(legs)}] * input[{join(legs)}]",
        saved={f"equal[{join(legs)}]": equal, f"share[{join(legs)}]": f"{{equal}} / {{equal}}.sum({dims}, True)"},
        kinks="equal extrema have equal shares",
    )


@TABLE.rule(aten.slice_scatter.default, aten.select_scatter.default)
def placed(call: Any) -> Rule:
    """The input with a piece of it replaced."""
    legs, dim = leg_names(call.output, skip="k"), _dim(call)
    size, leg = _size(call, dim), legs[dim]
    ones = f"torch.ones({size}, dtype={{input}}.dtype, device={{input}}.device)"
    if call.target == aten.select_scatter.default:
        start = axis(call.index, size)
        piece, place = [*legs[:dim], *legs[dim + 1 :]], f"delta[{leg}, {start}]"
        inside = str(start)
    else:
        start, end, step = slice(call.start, call.end, call.step).indices(size)
        piece, place = [*legs[:dim], "k", *legs[dim + 1 :]], f"delta[{leg}, {step}*k + {start}]"
        inside = f"torch.arange({start}, {end}, {step}, device={{input}}.device)"
    keep = f"{ones}.index_fill(0, torch.as_tensor({inside}, device={{input}}.device), 0)"
    return Rule(
        f"output[{join(legs)}] = keep[{leg}] * input[{join(legs)}] + {place} * src[{join(piece)}]",
        saved={f"keep[{leg}]": keep},
    )
