"""Steps of recurrent layers, forward and back. These functions stand next to the programs that call them.

They read torch alone. gates [n, t, ...] or, where `time` is 0, [t, n, ...]; `back`: from the last step to the first.
"""

import torch


def lstm_forward(
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    time: int,
    back: bool,
) -> torch.Tensor:
    """[..., (i, f, g, o, h, c)] of every step. Steps work in memory of their own: kernels are slower across rows."""
    size, steps = hidden.shape[-1], range(gates.shape[time])
    sums = gates.movedim(time, 0).contiguous() if bias is None else (gates + bias).movedim(time, 0).contiguous()
    news, hiddens, cells = sums.new_empty(3, *sums.shape[:2], size).unbind(0)
    for t in steps[::-1] if back else steps:
        own, new = sums[t].addmm_(hidden, weight.t()), news[t]
        torch.tanh(own[:, 2 * size : 3 * size].contiguous(), out=new)
        i, f, _, o = own.sigmoid_().chunk(4, 1)
        cell = torch.mul(f, cell, out=cells[t]).addcmul_(i, new)
        hidden = torch.tanh(cell, out=hiddens[t]).mul_(o)
    kept = sums.new_empty(*gates.shape[:2], 6 * size)
    for place, part in ((0, sums), (2, news), (4, hiddens), (5, cells)):
        kept[..., place * size : place * size + part.shape[-1]] = part.movedim(0, time)
    return kept


def lstm_backward(
    cotangents: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, cell: torch.Tensor, time: int, back: bool
) -> tuple[torch.Tensor, ...]:
    """Cotangents of the gates of every step and of the first state, from those of [..., (h, c)]; columns in front."""
    size, steps, axis = weight.shape[1], range(kept.shape[time]), time - 3
    i, f, g, o = kept[..., : 4 * size].chunk(4, -1)
    bent, first = kept[..., 5 * size :].tanh(), cell.unsqueeze(time)
    rest = kept[..., 5 * size :].narrow(time, int(back), len(steps) - 1)
    before = torch.cat([rest, first] if back else [first, rest], time)
    slopes = kept.new_empty(*kept.shape[:2], 5, size)
    by_i, by_f, by_g, by_o, through = slopes.unbind(2)
    torch.ops.aten.sigmoid_backward.grad_input(g, i, grad_input=by_i)
    torch.ops.aten.sigmoid_backward.grad_input(before, f, grad_input=by_f)
    torch.ops.aten.tanh_backward.grad_input(i, g, grad_input=by_g)
    torch.ops.aten.sigmoid_backward.grad_input(bent, o, grad_input=by_o)
    torch.ops.aten.tanh_backward.grad_input(o, bent, grad_input=through)
    by_cell, by_hidden, into, left = (each.unbind(time) for each in (slopes[:, :, :3], by_o, through, f))
    found = cotangents.new_empty(*cotangents.shape[:-1], 4, size)
    every, parts, of_output = (
        found.flatten(-2).unbind(axis),
        found[..., :3, :].unbind(axis - 1),
        found[..., 3, :].unbind(axis),
    )
    own, cells = cotangents[..., :size].unbind(axis), cotangents[..., size:].unbind(axis)
    order = steps if back else steps[::-1]
    later, carried = order[0], cells[order[0]]
    for t in order:
        hidden, total = own[t], cells[t]
        if t != later:
            hidden = torch.addmm(hidden, every[later], weight) if hidden.ndim == 2 else hidden + every[later] @ weight
            total = torch.addcmul(total, carried, left[later])
        carried = torch.addcmul(total, hidden, into[t])
        torch.mul(carried.unsqueeze(-2), by_cell[t], out=parts[t])
        torch.mul(hidden, by_hidden[t], out=of_output[t])
        later = t
    found = found.flatten(-2)
    return found, found, every[later] @ weight, carried * left[later]


def gru_forward(
    gates: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor, time: int, back: bool
) -> torch.Tensor:
    """[..., (r, z, n, w_hn h + b_hn, h)] of every step."""
    size, steps = hidden.shape[-1], range(gates.shape[time])
    kept = gates.new_empty(*gates.shape[:2], 5 * size)
    for t, own in zip(steps[::-1] if back else steps, gates.unbind(time)[:: -1 if back else 1], strict=True):
        recurrent = torch.nn.functional.linear(hidden, weight, bias)
        step, two = kept.select(time, t), 2 * size
        torch.add(own[:, :two], recurrent[:, :two], out=step[:, :two]).sigmoid_()
        r, z, n, mixed, h = step.chunk(5, 1)
        mixed.copy_(recurrent[:, two:])
        torch.addcmul(own[:, two:], r, mixed, out=n).tanh_()
        torch.lerp(n, hidden, z, out=h)
        hidden = h
    return kept


def gru_backward(
    cotangents: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor, time: int, back: bool
) -> tuple[torch.Tensor, ...]:
    """Cotangents of both linear layers of every step and of the first state, from those of h; columns in front."""
    size, steps = weight.shape[1], range(kept.shape[time])
    r, z, n, mixed, h = kept.chunk(5, -1)
    rest, first = h.narrow(time, 1 if back else 0, len(steps) - 1), hidden.unsqueeze(time)
    before, bent = torch.cat([rest, first] if back else [first, rest], time), (1 - z) * (1 - n * n)
    two = [bent * mixed * r * (1 - r), (before - n) * z * (1 - z)]
    by_gates, by_recurrent = torch.stack([*two, bent], -2), torch.stack([*two, bent * r], -2).unbind(time)
    left, axis = z.unbind(time), time - 3
    found = cotangents.new_empty(*cotangents.shape[:-1], 3, size)
    totals = torch.empty_like(cotangents, memory_format=torch.contiguous_format)
    every, total, own = found.unbind(axis - 1), totals.unbind(axis), cotangents.unbind(axis)
    order = steps if back else steps[::-1]
    for k, t in enumerate(order):
        total[t].copy_(own[t])
        if k:
            total[t].add_(every[order[k - 1]].flatten(-2) @ weight).addcmul_(total[order[k - 1]], left[order[k - 1]])
        torch.mul(total[t].unsqueeze(-2), by_recurrent[t], out=every[t])
    last = order[-1]
    first = torch.addcmul(every[last].flatten(-2) @ weight, total[last], left[last])
    return (totals.unsqueeze(-2) * by_gates).flatten(-2), found.flatten(-2), first


def rnn_forward(
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    relu: bool,
    time: int,
    back: bool,
) -> torch.Tensor:
    """The state of every step."""
    steps, gates = range(gates.shape[time]), gates if bias is None else gates + bias
    kept = torch.empty_like(gates, memory_format=torch.contiguous_format)
    for t, own in zip(steps[::-1] if back else steps, gates.unbind(time)[:: -1 if back else 1], strict=True):
        hidden = torch.addmm(own, hidden, weight.t(), out=kept.select(time, t))
        hidden.relu_() if relu else hidden.tanh_()
    return kept


def rnn_backward(
    cotangents: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, relu: bool, time: int, back: bool
) -> tuple[torch.Tensor, ...]:
    """Cotangents of the sums of every step and of the first state, from those of h; columns in front."""
    slopes, axis = ((kept > 0).to(kept.dtype) if relu else 1 - kept * kept).unbind(time), time - 3
    found = torch.empty_like(cotangents, memory_format=torch.contiguous_format)
    every, own = found.unbind(axis), cotangents.unbind(axis)
    order = range(len(own)) if back else range(len(own))[::-1]
    for k, t in enumerate(order):
        total = own[t] + every[order[k - 1]] @ weight if k else own[t]
        torch.mul(total, slopes[t], out=every[t])
    return found, found, every[order[-1]] @ weight
