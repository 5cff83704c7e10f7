"""Every row of the zoo, and what is known not to run."""

from __future__ import annotations

from . import attention, fields, functions, habits, sequences, vision

FAMILIES = {
    "Images": vision.ROWS,
    "Attention": attention.ROWS,
    "Sequences": sequences.ROWS,
    "Functions, sets, graphs": functions.ROWS,
    "Fields of work": fields.ROWS,
    "As code is written": habits.ROWS,
}
ZOO = tuple(row for rows in FAMILIES.values() for row in rows)

REFUSED = {
    "gradient reversal": r"autograd.Function 'Reversal' .* has a backward of its own",
    "binarised, straight-through": r"autograd.Function 'Sign' .* has a backward of its own",
}
"""Models that do not compile at all, and what the refusal says."""

KNOWN = {(name, check): says for name, says in REFUSED.items() for check in ("first order", "KFAC", "DiagGGN")}
"""(row, check) -> what the refusal says. A test notices when one of them runs."""
