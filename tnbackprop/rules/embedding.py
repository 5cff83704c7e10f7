"""Look-ups: rows of a table, entries at constant or computed places. Every row is a selection by an integer tensor."""

from __future__ import annotations

from typing import Any

import torch

from ..notation.rule import Rule
from ..table import Table
from .writing.text import refuse

TABLE = Table()
aten = torch.ops.aten


@TABLE.rule(aten.embedding.default)
def embedding(call: Any) -> Rule:
    """output[*s, d] = weight[indices[*s], d]; the row `padding_idx` is read, but gets no gradient."""
    if call.arguments.get("scale_grad_by_freq"):
        what = "it mixes samples: scale_grad_by_freq divides by how often the batch has an index"
        refuse(call, what, "Leave the option out.")
    size, padding = call.weight.shape[0], call.arguments.get("padding_idx", -1)
    if padding < 0:
        return Rule("output[*s, d] = select(indices[*s], v) * weight[v, d]")
    return Rule(
        jacobian={"weight": "select(trained[*s], v)"},
        legs={"weight": "v, d", "output": "*s, d"},
        saved={"trained[*s]": f"{{indices}}.masked_fill({{indices}} == {padding}, {size})"},
        constants={"V": size},
    )
