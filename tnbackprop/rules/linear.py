"""Linear layers."""

from __future__ import annotations

import torch

from ..notation.rule import Rule
from ..table import Table

TABLE = Table()

TABLE.row(
    Rule("output[*s, o] = weight[o, i] * input[*s, i] + bias[o]"),
    torch.ops.aten.linear.default,
)
TABLE.row(
    Rule("output[*s, o] = weight[o, i, j] * input1[*s, i] * input2[*s, j] + bias[o]"),
    torch.ops.aten.bilinear.default,
)
