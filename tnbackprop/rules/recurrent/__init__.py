"""Recurrent layers: steps over positions that native code scans, between two linear layers of all positions.

    gates[n, t] = w_ih x[n, t] + b_ih              a linear layer
    recurrent[n, t] = w_hh h[n, t-1] + b_hh        another: h of the step before is known, and no derivative goes there
    h[n, t] = cell(gates[n, t], recurrent[n, t])   a scan; its VJP is the whole of what comes back through later steps

Where the step reads the sum of both, that is its operand: what comes back to it is one value for both layers.

So quantities of the weights see positions, as those of any shared weight. Where second derivatives or matrices are
propagated, and in a layer that projects h, the steps are written out. Where gradients alone are asked of an LSTM's
weights, an operator of ours is the whole layer in one direction, `layer`, which has kernels (compiler/recurrence.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...notation.rule import Rule
from ...table import Composite, Table
from . import fused, scans

TABLE = Table()
aten = torch.ops.aten

State = tuple[Tensor, ...]
Step = Callable[[Tensor, State, Tensor, Tensor | None], State]
"""(input's part of the gates, state, recurrent weight and bias) -> the next state, its output first."""


def _lstm(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """Hochreiter & Schmidhuber 1997."""
    i, f, g, o = (gates + F.linear(state[0], weight, bias)).chunk(4, -1)
    cell = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


def _gru(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """Cho et al. 2014, arXiv:1406.1078."""
    (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), F.linear(state[0], weight, bias).chunk(3, -1)
    z, n = (z + hz).sigmoid(), torch.tanh(n + (r + hr).sigmoid() * hn)
    return (n + z * (state[0] - n),)


def _tanh(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    """Elman 1990."""
    return (torch.tanh(gates + F.linear(state[0], weight, bias)),)


def _relu(gates: Tensor, state: State, weight: Tensor, bias: Tensor | None) -> State:
    return (torch.relu(gates + F.linear(state[0], weight, bias)),)


@dataclass(frozen=True)
class Cell:
    """A layer's step, written out, and the code of a scan over all of them.

    keeps     how many parts the scan keeps of a step, the states at the end
    forward   code for it; `PLACE` is where time and direction stand
    backward  code for the cotangents of what the step reads of both linear layers, and of first states
    summed    whether that is their sum
    """

    step: Step
    keeps: int
    states: int
    forward: str
    backward: str
    summed: bool = True


PLACE = "time, back"
CELLS = {
    "lstm": Cell(
        _lstm, 7, 2,
        f"lstm_forward({{gates}}, {{weight}}, {{bias}}, {{hidden}}, {{state}}, {PLACE})",
        f"lstm_backward({{cotangents}}, {{kept}}, {{weight}}, {{state}}, {PLACE})",
    ),
    "gru": Cell(
        _gru, 5, 1,
        f"gru_forward({{gates}}, {{weight}}, {{bias}}, {{hidden}}, {PLACE})",
        f"gru_backward({{cotangents}}, {{kept}}, {{weight}}, {{hidden}}, {PLACE})",
        summed=False,
    ),
    "tanh": Cell(
        _tanh, 1, 1,
        f"rnn_forward({{gates}}, {{weight}}, {{bias}}, {{hidden}}, False, {PLACE})",
        f"rnn_backward({{cotangents}}, {{kept}}, {{weight}}, False, {PLACE})",
    ),
    "relu": Cell(
        _relu, 1, 1,
        f"rnn_forward({{gates}}, {{weight}}, {{bias}}, {{hidden}}, True, {PLACE})",
        f"rnn_backward({{cotangents}}, {{kept}}, {{weight}}, True, {PLACE})",
    ),
}  # fmt: skip

LIBRARY = torch.library.Library("tnbackprop", "DEF")  # type: ignore[no-untyped-call]
FIRST = "str cell, Tensor gates, "
LAST = "Tensor hidden, Tensor? state, int time, bool back) -> Tensor"
LIBRARY.define(f"scan({FIRST}Tensor weight, Tensor? bias, {LAST}")  # type: ignore[no-untyped-call]
LIBRARY.define(f"states({FIRST}Tensor? recurrent, Tensor kept, Tensor weight, {LAST}")  # type: ignore[no-untyped-call]
LIBRARY.define(  # type: ignore[no-untyped-call]
    "layer(Tensor x, Tensor hidden, Tensor state, Tensor w_ih, Tensor w_hh, Tensor? b_ih, Tensor? b_hh, "
    "int time, bool back) -> Tensor"
)


def _run(code: str, time: int, back: bool, **values: Any) -> Any:
    """What a cell's code gives for these values."""
    names = {name: name for name in values}
    return eval(code.format(**names), {"time": time, "back": back, **vars(scans)}, values)


def _scan(
    cell: str, gates: Tensor, weight: Tensor, bias: Any, hidden: Tensor, state: Any, time: int, back: bool
) -> Tensor:
    values = {"gates": gates, "weight": weight, "bias": bias, "hidden": hidden, "state": state}
    found: Tensor = _run(CELLS[cell].forward, time, back, **values)
    return found


def _kept(cell: str, gates: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    time, size = rest[-2], weight.shape[1]
    return gates.new_empty(gates.shape[time], CELLS[cell].keeps, gates.shape[1 - time], size)


def _states(cell: str, gates: Tensor, recurrent: Any, kept: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return scans.states(kept, CELLS[cell].states > 1, *rest[-2:])


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cell, _, _, kept, weight, hidden, state, ctx.time, ctx.back = inputs
    ctx.cell = CELLS[cell]
    ctx.save_for_backward(kept, weight, hidden, state)


def _back(context: Any, cotangent: Tensor) -> tuple[Any, ...]:
    values = dict(zip(("kept", "weight", "hidden", "state"), context.saved_tensors, strict=True))
    found = iter(_run(context.cell.backward, context.time, context.back, cotangents=cotangent, **values))
    read = next(found), None if context.cell.summed else next(found)
    return None, *read, None, None, next(found), next(found, None), None, None


LIBRARY.impl("scan", _scan, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
LIBRARY.impl("states", _states, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("tnbackprop::scan", _kept, lib=LIBRARY)
torch.library.register_fake("tnbackprop::states", _states, lib=LIBRARY)
torch.library.register_autograd("tnbackprop::states", _back, setup_context=_remember, lib=LIBRARY)
OPS = torch.ops.tnbackprop


def _placed(code: str, call: Any) -> str:
    return code.replace(PLACE, f"{call.time}, {call.back}")


@TABLE.rule(OPS.scan.default)
def scan(call: Any) -> Rule:
    code = CELLS[call.cell].forward
    return Rule(forward=_placed(code, call), legs={"output": "t, k, n, h"}, functions=(_called(code),))


@TABLE.rule(OPS.states.default)
def states(call: Any) -> Rule:
    cell = CELLS[call.cell]
    operands = [name for name in ("gates", "recurrent", "hidden", "state") if call.arguments[name] is not None]
    return Rule(
        forward=_placed(f"states({{kept}}, {cell.states > 1}, {PLACE})", call),
        vjp={", ".join(operands): _placed(cell.backward, call)},
        legs={"output": "n, t, h" if call.time else "t, n, h"},
        functions=(scans.states, _called(cell.backward)),
    )


OPERANDS = ("x", "hidden", "state", "w_ih", "w_hh", "b_ih", "b_hh")


@TABLE.rule(OPS.layer.default)
def layer(call: Any) -> Rule:
    """What `states` gives, by kernels that have no formula."""
    given = ", ".join(f"{{{name}}}" for name in OPERANDS)
    kernel = _placed(f"lstm_layer_backward({{cotangent}}, {{every}}, {PLACE})", call)
    return Rule(
        saved={"every": _placed(f"lstm_layer_forward({given}, {PLACE})", call)},
        forward="{every}[0]",
        vjp={", ".join(OPERANDS[:3]): kernel},
        backward={", ".join(OPERANDS): kernel},
        legs={"output": "n, t, h" if call.time else "t, n, h"},
        functions=(fused.lstm_layer_forward, fused.lstm_layer_backward),
    )


def _called(code: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(scans, code.partition("(")[0])
    return function


Weights = tuple[Tensor, Tensor | None, Tensor | None]
"""The recurrent weight, its bias, and what projects h."""
Layer = Callable[[str, Tensor, Weights, State, int, bool], tuple[Tensor, State]]
"""(cell, gates, weights, first states, axis of the steps, backwards) -> all h, last states."""


def _written_out(cell: str, gates: Tensor, own: Weights, state: State, time: int, back: bool) -> tuple[Tensor, State]:
    steps, hidden = gates.unbind(time), []
    weight, bias, projection = own
    for each in steps[::-1] if back else steps:
        state = CELLS[cell].step(each, state, weight, bias)
        if projection is not None:
            state = F.linear(state[0], projection), *state[1:]
        hidden.append(state[0])
    return torch.stack(hidden[::-1] if back else hidden, time), state


def _whole(
    x: Tensor, hidden: Tensor, state: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Any, b_hh: Any, time: int, back: bool
) -> Tensor:
    own = w_hh, b_hh, None
    every, (_, end) = _written_out("lstm", F.linear(x, w_ih, b_ih), own, (hidden, state), time, back)
    return torch.cat([every, end.unsqueeze(time)], time)


LIBRARY.impl("layer", _whole, "CompositeImplicitAutograd")  # type: ignore[no-untyped-call]


def _scanned(cell: str, gates: Tensor, own: Weights, state: State, time: int, back: bool) -> tuple[Tensor, State]:
    weight, bias, projection = own
    if projection is not None:
        return _written_out(cell, gates, own, state, time, back)
    known = weight.detach(), None if bias is None else bias.detach()
    first = tuple(each.detach() for each in state)
    start, last = (each[1] if len(each) > 1 else None for each in (state, first))
    kept = OPS.scan(cell, gates.detach(), *known, first[0], last, time, back)
    steps, hidden = gates.shape[time], kept.select(1, -1).movedim(0, time)
    rest, before = hidden.narrow(time, int(back), steps - 1), first[0].unsqueeze(time)
    recurrent = F.linear(torch.cat([rest, before] if back else [before, rest], time), weight, bias)
    read = (gates + recurrent, None) if CELLS[cell].summed else (gates, recurrent)
    found = OPS.states(cell, *read, kept, known[0], state[0], start, time, back)
    hidden = found.narrow(time, 0, steps)
    ends = (hidden.select(time, 0 if back else -1), found.select(time, -1))
    return hidden, ends[: len(state)]


def _layers(
    one: Layer,
    cell: str,
    x: Tensor,
    start: Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...]:
    """(outputs, final states). The last weight of an LSTM's layer may project h_t."""
    time, directions = int(batch_first), 1 + bidirectional
    each = len(params) // (num_layers * directions)
    final: list[State] = []
    for layer in range(num_layers):
        if layer and dropout and train:
            x = torch.dropout(x, dropout, True)
        outputs = []
        for back in range(directions):
            k = layer * directions + back
            into, weight, *rest = params[k * each : (k + 1) * each]
            own, bias = rest[:2] if has_biases else (None, None)
            projection = rest[-1] if each % 2 else None
            state = tuple(s[k] for s in start)
            hidden, state = one(cell, F.linear(x, into, own), (weight, bias, projection), state, time, bool(back))
            outputs.append(hidden)
            final.append(state)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
    return x, *(torch.stack(states) for states in zip(*final, strict=True))


def _layer(cell: str) -> Composite:
    def of(one: Layer) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x, hx, *options: _layers(one, cell, x, (hx,) if isinstance(hx, Tensor) else hx, *options)

    return Composite(of(_scanned), inside=of(_written_out))


def _cell(step: Step) -> Composite:
    def cell(
        x: Tensor, hx: Any, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None = None, b_hh: Tensor | None = None
    ) -> Any:
        state = step(F.linear(x, w_ih, b_ih), (hx,) if isinstance(hx, Tensor) else tuple(hx), w_hh, b_hh)
        return state if len(state) > 1 else state[0]

    return Composite(cell)


TABLE.rule(aten.lstm.input)(_layer("lstm"))
TABLE.rule(aten.gru.input)(_layer("gru"))
TABLE.rule(aten.rnn_tanh.input)(_layer("tanh"))
TABLE.rule(aten.rnn_relu.input)(_layer("relu"))
TABLE.rule(aten.lstm_cell.default)(_cell(_lstm))
TABLE.rule(aten.gru_cell.default)(_cell(_gru))
TABLE.rule(aten.rnn_tanh_cell.default)(_cell(_tanh))
TABLE.rule(aten.rnn_relu_cell.default)(_cell(_relu))
