"""An LSTM's layer in one direction by oneDNN's kernels, for float32 on a CPU. These functions stand next to programs.

Elsewhere, where somebody takes a program's source, it is autograd that goes through torch's own layer.
They read torch alone. x [n, t, i] or, where `time` is 0, [t, n, i]; `back`: from the last step to the first.
"""

import torch


def lstm_layer_forward(
    x: torch.Tensor,
    hidden: torch.Tensor,
    cell: torch.Tensor,
    w_ih: torch.Tensor,
    w_hh: torch.Tensor,
    b_ih: torch.Tensor | None,
    b_hh: torch.Tensor | None,
    time: int,
    back: bool,
) -> tuple[torch.Tensor, ...]:
    """What `states` gives, and what is for the kernel back: operands, h of all steps, h and c at the end, its own."""
    zero = w_ih.new_zeros(len(w_ih))
    biases = (zero if b_ih is None else b_ih, zero if b_hh is None else b_hh)
    given = [each.detach().contiguous() for each in (x.movedim(time, 0), w_ih, w_hh, *biases, hidden, cell)]
    with torch.enable_grad():  # without, the kernel keeps nothing for the one back
        if (x.dtype, x.device.type) != (torch.float32, "cpu"):
            first, *weights, hidden, cell = (each.requires_grad_() for each in given)
            first, states = first.flip(0) if back else first, (hidden.unsqueeze(0), cell.unsqueeze(0))
            every, _, end = torch.lstm(first, states, weights, True, 1, 0.0, False, False, False)
            found = torch.cat([every.flip(0) if back else every, end]).movedim(0, time)
            return found.detach(), *given, found
        every, last, end, kept = torch.ops.aten.mkldnn_rnn_layer(
            *given, back, [], 2, hidden.shape[-1], 1, True, False, False, True
        )
    found = torch.cat([every.movedim(0, time), end.reshape_as(cell).unsqueeze(time)], time)
    return found, *given, every, last, end, kept


def lstm_layer_backward(
    cotangent: torch.Tensor, saved: tuple[torch.Tensor, ...], time: int, back: bool
) -> tuple[torch.Tensor, ...]:
    """Gradients by x, hidden, cell, w_ih, w_hh, b_ih, b_hh, from the cotangent of what `states` gives."""
    if len(saved) == 9:
        x, *weights, hidden, cell = torch.autograd.grad(saved[8], saved[1:8], cotangent, retain_graph=True)
        return x.movedim(0, time), hidden, cell, *weights
    _, *given, every, last, end, kept = saved
    every_step = cotangent.movedim(time, 0)
    x, w_ih, w_hh, b_ih, b_hh, hidden, cell = torch.ops.aten.mkldnn_rnn_layer_backward(
        *given, every, last, end, every_step[:-1].contiguous(), None,
        every_step[-1].reshape_as(end).contiguous(), back, 2, given[5].shape[-1], 1, True, True, False, [], False, kept
    )  # fmt: skip
    return x.movedim(0, time), hidden.reshape_as(given[5]), cell.reshape_as(given[6]), w_ih, w_hh, b_ih, b_hh
