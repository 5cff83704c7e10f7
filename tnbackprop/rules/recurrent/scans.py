"""Steps of recurrent layers, forward and back. These functions stand next to the programs that call them.

They read torch alone. gates [n, t, ...] or, where `time` is 0, [t, n, ...]; `back`: from the last step to the first.
What a scan keeps is [t, part, n, h], so that each part of a step is dense: kernels are slower across rows.
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
    """(i, f, g, o, tanh c, c, h) of every step."""
    size, steps = hidden.shape[-1], range(gates.shape[time])
    matrices, steps_first = weight.reshape(4, size, size).transpose(1, 2), gates.movedim(time, 0)
    sums = steps_first.reshape(*steps_first.shape[:2], 4, size).transpose(1, 2)
    kept = gates.new_empty(len(steps), 7, *sums.shape[2:])
    torch.add(sums, sums.new_zeros(1) if bias is None else bias.view(4, 1, size), out=kept[:, :4])
    four, two = kept[:, :4].unbind(0), kept[:, :2].unbind(0)
    i, f, g, o, bent, cells, hiddens = (part.unbind(0) for part in kept.unbind(1))
    for t in steps[::-1] if back else steps:
        four[t].baddbmm_(hidden.expand(4, -1, -1), matrices)
        two[t].sigmoid_(), g[t].tanh_(), o[t].sigmoid_()
        cell = torch.mul(f[t], cell, out=cells[t]).addcmul_(i[t], g[t])
        hidden = torch.mul(torch.tanh(cell, out=bent[t]), o[t], out=hiddens[t])
    return kept


def lstm_backward(
    cotangents: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, cell: torch.Tensor, time: int, back: bool
) -> tuple[torch.Tensor, ...]:
    """Cotangents of the gates of every step and of the first state, from those of `states`; columns in front."""
    steps, axis = range(len(kept)), time - 3
    i, f, g, o, bent, cells, _ = kept.unbind(1)
    rest, first = cells.narrow(0, int(back), len(steps) - 1), cell.unsqueeze(0)
    before = torch.cat([rest, first] if back else [first, rest])
    slopes = kept.new_empty(len(steps), kept.shape[2], 4, kept.shape[3])
    by_i, by_f, by_g, by_o = slopes.unbind(2)
    torch.ops.aten.sigmoid_backward.grad_input(g, i, grad_input=by_i)
    torch.ops.aten.sigmoid_backward.grad_input(before, f, grad_input=by_f)
    torch.ops.aten.tanh_backward.grad_input(i, g, grad_input=by_g)
    torch.ops.aten.sigmoid_backward.grad_input(bent, o, grad_input=by_o)
    through, left = torch.ops.aten.tanh_backward(o, bent).unbind(0), f.unbind(0)
    by_cell, by_hidden = slopes[:, :, :3].unbind(0), by_o.unbind(0)
    *own, carried = cotangents.unbind(axis)
    found = cotangents.new_empty(*cotangents.narrow(axis, 0, len(steps)).shape[:-1], 4, cotangents.shape[-1])
    every, parts = found.flatten(-2).unbind(axis), found[..., :3, :].unbind(axis - 1)
    of_output, order = found[..., 3, :].unbind(axis), steps if back else steps[::-1]
    for k, t in enumerate(order):
        hidden = own[t]
        if k:
            later = order[k - 1]
            hidden = torch.addmm(hidden, every[later], weight) if hidden.ndim == 2 else hidden + every[later] @ weight
            carried = carried * left[later]
        carried = torch.addcmul(carried, hidden, through[t])
        torch.mul(carried.unsqueeze(-2), by_cell[t], out=parts[t])
        torch.mul(hidden, by_hidden[t], out=of_output[t])
    found = found.flatten(-2)
    return found, every[order[-1]] @ weight, carried * left[order[-1]]


def gru_forward(
    gates: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, hidden: torch.Tensor, time: int, back: bool
) -> torch.Tensor:
    """(r, z, n, w_hn h + b_hn, h) of every step."""
    size, steps = hidden.shape[-1], range(gates.shape[time])
    matrices, steps_first = weight.reshape(3, size, size).transpose(1, 2), gates.movedim(time, 0)
    own = steps_first.reshape(*steps_first.shape[:2], 3, size).transpose(1, 2)
    shift = own.new_zeros(1) if bias is None else bias.view(3, 1, size)
    kept = gates.new_empty(len(steps), 5, *own.shape[2:])
    r, z, n, mixed, hiddens = (part.unbind(0) for part in kept.unbind(1))
    two, own_two, own_n = kept[:, :2].unbind(0), own[:, :2].unbind(0), own[:, 2].unbind(0)
    for t in steps[::-1] if back else steps:
        recurrent = torch.baddbmm(shift, hidden.expand(3, -1, -1), matrices)
        torch.add(own_two[t], recurrent[:2], out=two[t]).sigmoid_()
        mixed[t].copy_(recurrent[2])
        torch.addcmul(own_n[t], r[t], mixed[t], out=n[t]).tanh_()
        hidden = torch.lerp(n[t], hidden, z[t], out=hiddens[t])
    return kept


def gru_backward(
    cotangents: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, hidden: torch.Tensor, time: int, back: bool
) -> tuple[torch.Tensor, ...]:
    """Cotangents of both linear layers of every step and of the first state, from those of h; columns in front."""
    r, z, n, mixed, hiddens = kept.unbind(1)
    rest, first = hiddens.narrow(0, int(back), len(kept) - 1), hidden.unsqueeze(0)
    before, bent = torch.cat([rest, first] if back else [first, rest]), (1 - z) * (1 - n * n)
    two = [bent * mixed * r * (1 - r), (before - n) * z * (1 - z)]
    by_gates, by_recurrent = torch.stack([*two, bent], -2), torch.stack([*two, bent * r], -2).unbind(0)
    left, axis = z.unbind(0), time - 3
    found = cotangents.new_empty(*cotangents.shape[:-1], 3, cotangents.shape[-1])
    totals = torch.empty_like(cotangents, memory_format=torch.contiguous_format)
    every, total, own = found.unbind(axis - 1), totals.unbind(axis), cotangents.unbind(axis)
    order = range(len(kept)) if back else range(len(kept))[::-1]
    for k, t in enumerate(order):
        total[t].copy_(own[t])
        if k:
            total[t].add_(every[order[k - 1]].flatten(-2) @ weight).addcmul_(total[order[k - 1]], left[order[k - 1]])
        torch.mul(total[t].unsqueeze(-2), by_recurrent[t], out=every[t])
    last = order[-1]
    first = torch.addcmul(every[last].flatten(-2) @ weight, total[last], left[last])
    return (totals.unsqueeze(-2) * by_gates.movedim(0, time)).flatten(-2), found.flatten(-2), first


def rnn_forward(
    gates: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    hidden: torch.Tensor,
    relu: bool,
    time: int,
    back: bool,
) -> torch.Tensor:
    """(h,) of every step."""
    sums = (gates if bias is None else gates + bias).movedim(time, 0)
    kept, steps = gates.new_empty(len(sums), 1, *sums.shape[1:]), range(len(sums))
    hiddens = kept[:, 0].unbind(0)
    for t in steps[::-1] if back else steps:
        hidden = torch.addmm(sums[t], hidden, weight.t(), out=hiddens[t])
        hidden.relu_() if relu else hidden.tanh_()
    return kept


def rnn_backward(
    cotangents: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, relu: bool, time: int, back: bool
) -> tuple[torch.Tensor, ...]:
    """Cotangents of the sums of every step and of the first state, from those of h; columns in front."""
    hiddens, axis = kept[:, 0], time - 3
    slopes = ((hiddens > 0).to(kept.dtype) if relu else 1 - hiddens * hiddens).unbind(0)
    found = torch.empty_like(cotangents, memory_format=torch.contiguous_format)
    every, own = found.unbind(axis), cotangents.unbind(axis)
    order = range(len(own)) if back else range(len(own))[::-1]
    for k, t in enumerate(order):
        total = own[t] + every[order[k - 1]] @ weight if k else own[t]
        torch.mul(total, slopes[t], out=every[t])
    return found, every[order[-1]] @ weight


def states(kept: torch.Tensor, cells: bool, time: int, back: bool) -> torch.Tensor:
    """h of every step and, where there are cells, after them c of the last one: [n, t, h] or [t, n, h]."""
    found = [kept[:, -1], *([kept[:1, -2] if back else kept[-1:, -2]] if cells else [])]
    return torch.cat([each.movedim(0, time) for each in found], time)
