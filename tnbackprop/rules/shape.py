"""Views and moves of elements: every row is a selection of the input's elements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.text import access, axis, join, leg_names, literal, refuse

TABLE = Table()
aten = torch.ops.aten

# the same elements in the same order
TABLE.row(
    Rule("output[...] = input[...]"),
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    aten.view_as.default,
    aten.reshape_as.default,
)

TABLE.row(
    Rule("output[...] = input[...]", vjp={"input": "{cotangents}.to({input})"}),
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten._to_copy.default,
)


def _permuted(call: Any, order: Sequence[int]) -> Rule:
    """Axis k of the output is axis order[k] of the input."""
    legs = leg_names(call.input)
    return Rule(f"output[{join([legs[k] for k in order])}] = input[{join(legs)}]")


@TABLE.rule(aten.permute.default)
def permute(call: Any) -> Rule:
    return _permuted(call, [axis(d, len(call.input.axes)) for d in call.dims])


@TABLE.rule(aten.transpose.int)
def transpose(call: Any) -> Rule:
    order = list(range(len(call.input.axes)))
    a, b = (axis(d, len(order)) for d in (call.dim0, call.dim1))
    order[a], order[b] = order[b], order[a]
    return _permuted(call, order)


MATRICES = (aten.mT.default, aten.mH.default, aten.adjoint.default, aten.matrix_H.default)


@TABLE.rule(aten.t.default, aten.numpy_T.default, *MATRICES)
def t(call: Any) -> Rule:
    order = list(range(len(call.input.axes)))
    matrices = call.target in MATRICES
    return _permuted(call, [*order[:-2], order[-1], order[-2]] if matrices else order[::-1])


@TABLE.rule(aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist)
def movedim(call: Any) -> Rule:
    rank = len(call.input.axes)
    sources, targets = ((v,) if isinstance(v, int) else v for v in (call.source, call.destination))
    moved = {axis(d, rank): axis(s, rank) for s, d in zip(sources, targets, strict=True)}
    rest = iter([k for k in range(rank) if k not in moved.values()])
    return _permuted(call, [moved[k] if k in moved else next(rest) for k in range(rank)])


@TABLE.rule(aten.expand.default, aten.expand_as.default)
def expand(call: Any) -> Rule:
    legs = leg_names(call.output)
    return Rule(f"output[{join(legs)}] = {access('input', call.input, call.output, legs)}")


@TABLE.rule(aten.slice.Tensor, aten.narrow.default)
def slice_(call: Any) -> Rule | str:
    """output[x] = input[step*x + start]."""
    legs = leg_names(call.output)
    dim = axis(call.dim, len(legs))
    if call.input.axes[dim] == call.output.axes[dim]:
        return "output[...] = input[...]"
    if any(not isinstance(v.shape[dim], int) for v in (call.input, call.output)):
        refuse(call, "it takes some of the samples", "Slice the inputs before the model.")
    start = axis(call.start or 0, call.input.shape[dim])
    items = [f"{call.arguments.get('step', 1)}*{leg} + {start}" if k == dim else leg for k, leg in enumerate(legs)]
    return Rule(f"output[{join(legs)}] = input[{join(items)}]")


@TABLE.rule(aten.select.int)
def select(call: Any) -> Rule:
    rank = len(call.input.axes)
    dim = axis(call.dim, rank)
    if not isinstance(call.input.shape[dim], int):
        refuse(call, "it takes one of the samples", "Select from the inputs before the model.")
    legs = leg_names(call.output)
    items = [*legs[:dim], str(axis(call.index, call.input.shape[dim])), *legs[dim:]]
    return Rule(f"output[{join(legs)}] = input[{join(items)}]")


@TABLE.rule(aten.cat.default)
def cat(call: Any) -> Rule | str:
    """A sum of the parts, each moved to its place; a window is zero outside of its part."""
    legs = leg_names(call.output)
    dim = axis(call.dim, len(legs))
    start, terms = 0, []
    for name, value in call.tensors.items():
        if value.shape == (0,) != call.output.shape:  # torch takes an empty tensor of one axis with any other
            continue
        items = [f"{leg} - {start}" if k == dim else leg for k, leg in enumerate(legs)]
        terms.append(f"{name}[{join(items)}]")
        if not isinstance(value.shape[dim], int):
            refuse(call, "it concatenates samples", "Concatenate the inputs before the model.")
        start += value.shape[dim]
    if len(terms) == 1:
        return f"output[...] = {terms[0].partition('[')[0]}[...]"
    return Rule(f"output[{join(legs)}] = " + " + ".join(terms))


@TABLE.rule(aten.stack.default)
def stack(call: Any) -> Rule:
    """A sum of the tensors, each at its place on the new axis."""
    legs = leg_names(call.output)
    dim = axis(call.dim, len(legs))
    rest = join(legs[:dim] + legs[dim + 1 :])
    terms = [f"delta[{legs[dim]}, {k}] * {name}[{rest}]" for k, name in enumerate(call.tensors)]
    return Rule(f"output[{join(legs)}] = " + " + ".join(terms))


@TABLE.rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(call: Any) -> Rule | str:
    """Constant: output[x] = input[x - left]. Other modes: output[x] = input[source(x)]."""
    legs = leg_names(call.output)
    mode = call.arguments.get("mode", "constant")
    value = call.arguments.get("value") or 0
    items, factors, saved = list(legs), "", {}
    amounts = list(zip(call.pad[::2], call.pad[1::2], strict=True))
    padded = {len(legs) - 1 - k: pair for k, pair in enumerate(amounts) if tuple(pair) != (0, 0)}
    for k, (left, right) in padded.items():
        size, leg = call.input.shape[k], legs[k]
        if not isinstance(size, int):
            refuse(call, "it pads the batch axis", "Pad the inputs before the model.")
        if mode == "constant":
            items[k] = f"{leg} - {literal(left)}"
            continue
        items[k] = f"{leg}{leg}"
        factors += f"select(source{k}[{leg}], {items[k]}) * "
        line = f"torch.arange({size}, dtype=torch.float32, device={{input}}.device)[None]"
        saved[f"source{k}[{leg}]"] = f"torch.nn.functional.pad({line}, ({left}, {right}), mode={mode!r})[0].long()"
    if not padded:
        return "output[...] = input[...]"
    text = f"output[{join(legs)}] = {factors}input[{join(items)}]"
    if mode == "constant" and math.isinf(value):  # it is in no formula
        own = [leg * 2 if k in padded else leg for k, leg in enumerate(legs)]
        inside = " * ".join(f"delta[{legs[k]}, 1*{own[k]} + {literal(left)}]" for k, (left, _) in padded.items())
        return Rule(jacobian={"input": inside}, legs={"input": join(own), "output": join(legs)})
    if mode == "constant" and value:
        outside = f"outside[{join([legs[k] for k in sorted(padded)])}]"
        extent = [call.input.shape[k] for k in sorted(padded)]
        flat = [amount for k in sorted(padded, reverse=True) for amount in padded[k]]
        zeros = f"torch.zeros({extent}, dtype={{input}}.dtype, device={{input}}.device)"
        saved[outside] = f"torch.nn.functional.pad({zeros}, {flat}, value=1.0)"
        text += f" + {literal(value)} * {outside}"
    return Rule(text, saved=saved)
