"""Every model of the zoo, unchanged: first order, Kronecker factors, the GGN's diagonal."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import tnbackprop as tn

from . import outcomes, table
from .outcomes import CHECKS, asked, close
from .rows import KNOWN, ZOO
from .zoo import MSE, Row, normal

OURS = [check for check in CHECKS if check != "vmap"]
PAIRS = [(row, check) for row in ZOO for check in OURS if asked(row, check)]
LINEAR = Row("linear", lambda: torch.nn.Linear(3, 2), normal(3), normal(2), MSE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize(("row", "check"), PAIRS, ids=[f"{row.name}-{check}" for row, check in PAIRS])
def test_zoo(row: Row, check: str) -> None:
    """Right, or known not to run: then refused, in the words that are listed."""
    reason = KNOWN.get((row.name, check))
    if reason is None:
        CHECKS[check](row)
        return
    with pytest.raises(tn.TnError) as raised:
        CHECKS[check](row)
    assert re.search(reason, str(raised.value)), raised.value


def test_names() -> None:
    """Each is there once, and every listed refusal is of a row."""
    names = [row.name for row in ZOO]
    assert len(names) == len(set(names))
    assert {name for name, _ in KNOWN} <= set(names) and {check for _, check in KNOWN} <= set(OURS)


@pytest.mark.parametrize("check", CHECKS)
def test_checks_of_a_linear_layer(check: str) -> None:
    CHECKS[check](LINEAR)


class Named(torch.nn.Linear):
    """An output with two entries; the loss reads one."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"squares": super().forward(x).square(), "output": super().forward(x)}


@pytest.mark.parametrize("check", CHECKS)
def test_checks_of_an_output_by_name(check: str) -> None:
    CHECKS[check](replace(LINEAR, build=lambda: Named(3, 2), loss=lambda f, y: MSE(f["output"], y)))


def test_the_oracle_takes_the_outputs_that_the_loss_reads() -> None:
    row = replace(LINEAR, build=lambda: Named(3, 2), loss=lambda f, y: MSE(f["output"], y))
    close(outcomes.diag_ggn(row.problem()), outcomes.diag_ggn(LINEAR.problem()), "diag_ggn")


@pytest.mark.parametrize("dtype", outcomes.TOLERANCE)
def test_tolerance(dtype: torch.dtype) -> None:
    """Rounding of the dtype is let through, and ten times what is allowed is not."""
    one, relative = torch.ones(3, dtype=torch.float64), outcomes.TOLERANCE[dtype][0]
    close({"weight": one * (1 + torch.finfo(dtype).eps)}, {"weight": one}, "grad", dtype)
    with pytest.raises(AssertionError, match="from autograd"):
        close({"weight": one * (1 + 10 * relative)}, {"weight": one}, "grad", dtype)


def test_a_row_is_the_same_each_time() -> None:
    one, other = LINEAR.problem(), LINEAR.problem()
    assert torch.equal(one.x, other.x) and torch.equal(one.model.weight, other.model.weight)


@pytest.mark.parametrize("check", ["first order", "DiagGGN"])
def test_a_wrong_number_is_seen(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(problem: outcomes.Problem) -> dict[str, torch.Tensor]:
        return {name: 2 * value for name, value in found(problem).items()}

    name = {"first order": "individual", "DiagGGN": "diag_ggn"}[check]
    found = getattr(outcomes, name)
    monkeypatch.setattr(outcomes, name, doubled)
    with pytest.raises(AssertionError, match="from autograd"):
        CHECKS[check](LINEAR)


def test_a_loss_that_does_not_average_is_refused_as_a_row() -> None:
    summed = replace(LINEAR, loss=torch.nn.MSELoss(reduction="sum"))
    with pytest.raises(AssertionError, match="not close"):
        CHECKS["first order"](summed)


def test_a_parameter_that_is_missing_is_seen() -> None:
    with pytest.raises(AssertionError, match="parameters"):
        close({}, {"weight": torch.ones(1)}, "grad")


def test_the_page_is_of_this_zoo() -> None:
    """`python -m tests.models.table` writes it; what it says of us is what is known here."""
    text = table.PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^\| (.+?) \| (\S+) \| (\S+) \| (\S+) \| (\S+) \|$", text, flags=re.MULTILINE)
    cells = {(name, check): cell for name, *row in found for check, cell in zip(table.ORDER, row, strict=True)}
    assert table.page(cells) == text
    ours = {key: cell for key, cell in cells.items() if key[1] in OURS}
    assert {key for key, cell in ours.items() if cell not in ("right", "–")} == set(KNOWN)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.parametrize("row", ZOO, ids=lambda row: row.name)
def test_what_the_page_says_of_vmap(row: Row) -> None:
    cell = re.search(
        rf"^\| {re.escape(row.name)} \| \S+ \| (\S+) \|", table.PAGE.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert cell and cell[1] == table.outcome(row, "vmap"), "run python -m tests.models.table"
