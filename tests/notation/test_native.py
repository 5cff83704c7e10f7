"""Native code in the place of lines of a formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import tnbackprop as tn


class Scaled(nn.Module):
    """x / |x|, with its norm from native code."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input / input.square().sum(-1, keepdim=True).sqrt()


UNIT = "square[n] = input[n, i]**2\n output[n, i] = input[n, i] * square[n]**(-1/2)"


@pytest.mark.slow
@pytest.mark.parametrize("native, right", [("{input}.square().sum(1)", True), ("{input}.square().mean(1)", False)])
def test_a_line_from_native_code(native: str, right: bool) -> None:
    """A saved line is what the formula says; verify tells where it is not."""
    rule = tn.Rule(UNIT, saved={"square[n]": native}, vjp={"input": VJP_OF_UNIT})
    assert tn.verify(rule, module=Scaled(), x=(2, 3), check=False).ok == right
    if not right:
        return
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), Scaled(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 2).double()
    rules = tn.RULES | {Scaled: lambda module: rule}
    quantities = [tn.Grad(), tn.DiagGGN(), tn.HessianDiag()]
    ours = tn.compile(model, nn.MSELoss(), (x, y), quantities, rules=rules)(x, y)
    plain = tn.compile(model, nn.MSELoss(), (x, y), quantities)(x, y)
    for key in ("grad", "diag_ggn", "hessian_diag"):
        for name, value in plain[key].items():
            torch.testing.assert_close(ours[key][name], value)


VJP_OF_UNIT = (
    "({cotangent} - {input} * (({cotangent} * {input}).sum(1, keepdim=True) / {square}.unsqueeze(1)))"
    " / {square}.unsqueeze(1).sqrt()"
)
