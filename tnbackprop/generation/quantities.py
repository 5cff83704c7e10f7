"""Quantities as they are asked for: objects, or their keys."""

from __future__ import annotations

from collections.abc import Sequence

from .. import quantities as all_quantities
from ..errors import InputError
from ..notation.syntax import nearest
from ..quantities import Quantity, Total, check_quantities

KEYS: dict[str, type[Quantity]] = {
    str(cls.__dataclass_fields__["name"].default): cls
    for name in all_quantities.__all__
    if isinstance(cls := getattr(all_quantities, name), type) and issubclass(cls, Quantity)
    and cls not in (Quantity, Total)
}  # fmt: skip
TOTAL = "_total"
"""Behind the key of a quantity: its sum over all parameters."""


def named(quantities: Sequence[Quantity | str] | str) -> list[Quantity]:
    """Each as an object; a text is keys with commas between. Raises `InputError` for one that is not there."""
    if isinstance(quantities, Quantity | type):
        check_quantities(quantities)
    parts = quantities.split(",") if isinstance(quantities, str) else quantities
    found = [_quantity(part) for part in parts]
    if not found:
        raise InputError(f"no quantities: give {', '.join(sorted(KEYS))}, or objects")
    check_quantities(found)
    return found


def _quantity(part: object) -> Quantity:
    if isinstance(part, Quantity):
        return part
    if isinstance(part, type):
        check_quantities([part])
    key = part.strip() if isinstance(part, str) else ""
    if key.endswith(TOTAL) and key.removesuffix(TOTAL) in KEYS:
        return Total(KEYS[key.removesuffix(TOTAL)]())  # type: ignore[call-arg]
    if not isinstance(part, str) or key not in KEYS:
        hint = nearest(key, KEYS) if isinstance(part, str) else f"give {', '.join(sorted(KEYS))}"
        raise InputError(f"unknown quantity {part!r}: {hint}")
    return KEYS[key]()  # type: ignore[call-arg]
