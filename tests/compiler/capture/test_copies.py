"""What a permuting copy costs: by the run along its innermost leg, strided ones by what they skip as well."""

from __future__ import annotations

import pytest

from tnbackprop.compiler.lower.arrange import copy_seconds
from tnbackprop.compiler.program import functions as f
from tnbackprop.compiler.program.cost import CPU, Kernel
from tnbackprop.compiler.program.expr import Call, Ref
from tnbackprop.compiler.program.store import Store
from tnbackprop.diagram.core import BATCH, Leg

C, H, W, K, L = (Leg(name, size) for name, size in (("c", 8), ("h", 16), ("w", 16), ("k", 3), ("l", 3)))
VIEW = (BATCH, C, H, W, K, L)


@pytest.mark.parametrize("stride, rows_are_cheaper", [(1, True), (2, True), (8, False)])
def test_positions_or_kernel_innermost(stride: int, rows_are_cheaper: bool) -> None:
    """Sixteen positions at stride 2 are a longer run than three kernel elements; at stride 8 they are not."""
    store = Store(CPU, 8, 4)
    sizes = tuple(leg.size for leg in VIEW)
    image = store.given("x", sizes)
    near = {VIEW.index(W): stride, VIEW.index(L): 1}
    value = store.add(Call(f.UNFOLD, (image,)), sizes, Kernel.VIEW, strided=True, near=near)
    ref = Ref(value, VIEW, VIEW)
    rows = copy_seconds(store, ref, ((BATCH,), (C, K, L), (H, W)))
    runs = copy_seconds(store, ref, ((BATCH,), (H, W), (C, K, L)))
    assert (rows < runs) == rows_are_cheaper
