"""What `verify` has found: rows, what was left out, and the first wrong entry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

TOLERANCE = 1e-9
"""Of an entry, relative to the largest one that there must be (or to 1 where all are smaller)."""


@dataclass(frozen=True)
class Row:
    """One comparison.

    what   "Jacobian", "diag_ggn"
    of     the operand or the parameter, where it is of one
    case   the shapes it was made with
    error  largest deviation, relative to the largest entry
    wrong  what is wrong where, with the likely cause; "" where all entries agree
    how    what it was compared with, where that is not simply a derivative by torch.func
    """

    what: str
    of: str
    case: str
    shape: tuple[int, ...]
    error: float
    wrong: str = ""
    how: str = ""

    @property
    def ok(self) -> bool:
        return not self.wrong

    def __str__(self) -> str:
        return f"{self.what} of {self.of}" if self.of else self.what


@dataclass(frozen=True)
class LeftOut:
    """What was not compared, and why."""

    what: str
    why: str


class NotDefined(Exception):
    """Why nothing says what a value must be: it becomes a `LeftOut`."""


@dataclass(frozen=True)
class Verification:
    """What `verify` compared, in float64, in order; it stops at the first wrong row. ``print`` it for a table."""

    subject: str
    rows: tuple[Row, ...]
    left_out: tuple[LeftOut, ...] = ()

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows)

    @property
    def first_wrong(self) -> Row | None:
        return next((row for row in self.rows if not row.ok), None)

    def __str__(self) -> str:
        wrong = self.first_wrong
        verdict = "agrees with torch.func" if self.ok else "is wrong" if wrong else "was not compared with anything"
        lines = [f"{self.subject} {verdict}: {len(self.rows)} comparisons in float64"]
        lines += [f"  {line}" for line in aligned(self._table())]
        for how in dict.fromkeys(row.how for row in self.rows if row.how):
            names = ", ".join(dict.fromkeys(row.what for row in self.rows if row.how == how))
            lines.append(f"{names}: compared with {how}")
        if self.left_out:
            lines.append("left out:")
            lines += [f"  {note.what}: {note.why}" for note in dict.fromkeys(self.left_out)]
        if wrong is not None:
            lines += ["", message(self.subject, wrong)]
        return "\n".join(lines)

    def _table(self) -> list[tuple[str, ...]]:
        """One line for each thing that was compared, over all of its cases."""
        lines: list[tuple[str, ...]] = [("compared", "cases", "largest shape", "largest error", "", "of")]
        for what in dict.fromkeys(row.what for row in self.rows):
            mine = [row for row in self.rows if row.what == what]
            shape = max((row.shape for row in mine), key=lambda s: torch.Size(s).numel())
            worst = max(row.error for row in mine)
            good = "ok" if all(row.ok for row in mine) else "WRONG"
            of = ", ".join(dict.fromkeys(row.of for row in mine))
            lines.append((what, str(len(mine)), str(list(shape)), f"{worst:.1e}", good, of))
        return lines


def message(subject: str, row: Row) -> str:
    """The text of the error: what, where, with which shapes, why."""
    return f"{subject} is wrong: {row}\n{row.wrong}\n  tried with {row.case}"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with aligned columns."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def wrong_entries(got: Tensor, want: Tensor) -> Tensor:
    """Where two tensors of one shape differ by more than rounding; where both are not finite they agree."""
    both = torch.isfinite(got) & torch.isfinite(want)
    alike = (got == want) | (torch.isnan(got) & torch.isnan(want))
    return ~torch.where(both, (got - want).abs() <= TOLERANCE * _largest(want), alike)


def deviation(got: Tensor, want: Tensor) -> float:
    """The largest, relative to the largest entry."""
    if got.shape != want.shape or not got.numel():
        return 0.0 if got.shape == want.shape else float("inf")
    difference = torch.where((got == want) | (torch.isnan(got) & torch.isnan(want)), torch.zeros_like(want), got - want)
    return float(torch.nan_to_num(difference.abs(), nan=float("inf")).max() / _largest(want))


def _largest(want: Tensor) -> Tensor:
    finite = want[torch.isfinite(want)]
    return finite.abs().max().clamp(min=1.0) if finite.numel() else want.new_ones(())
