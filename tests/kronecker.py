"""Kronecker factors of every kind and layout, and the dense blocks that they stand for, by torch.kron."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tnbackprop.linalg import Kind, KroneckerFactors, Layout

FULL, DIAGONAL, BLOCKS, LOW_RANK = Kind.FULL, Kind.DIAGONAL, Kind.BLOCKS, Kind.LOW_RANK
TURNED = Layout((2, 4, 3, 4), ((1,), (0,), (2,), (3,)))


@dataclass(frozen=True)
class Shape:
    """A row of the table: the parameter, sizes and kinds of the factors, the blocks (0: no block axis), the layout."""

    name: str
    parameter: tuple[int, ...]
    sizes: tuple[int, ...]
    kinds: tuple[Kind, ...] = ()
    blocks: int = 0
    layout: Layout | None = None

    def __str__(self) -> str:
        return self.name


ONE, LINEAR, THREE = Shape("one factor", (5,), (5,)), Shape("linear", (3, 4), (3, 4)), Shape("3", (2, 3, 4), (2, 3, 4))
EMBEDDING = Shape("embedding", (5, 3), (5, 3), (DIAGONAL, FULL))
GROUPED = Shape("grouped convolution", (6, 2, 2), (2, 4), (), 3)
SHAPES = (
    ONE, LINEAR, THREE, EMBEDDING, GROUPED,
    Shape("a scalar parameter", (), (1,)),
    Shape("all sizes one", (1, 1), (1, 1)),
    Shape("convolution", (3, 2, 2, 2), (3, 8)),
    Shape("four factors", (2, 3, 1, 2), (2, 3, 1, 2)),
    Shape("diagonal second", (3, 4), (3, 4), (FULL, DIAGONAL)),
    Shape("one diagonal", (4,), (4,), (DIAGONAL,)),
    Shape("diagonals only", (2, 3), (2, 3), (DIAGONAL, DIAGONAL)),
    Shape("groups, three factors, one diagonal", (2, 2, 3, 2), (2, 3, 2), (FULL, DIAGONAL, FULL), 2),
    Shape("one group with its axis", (2, 3), (2, 3), (), 1),
    Shape("scale of a normalisation", (4,), (1, 1), (), 4),
    Shape("one factor in groups", (3, 2), (2,), (), 3),
    # weight [in, out, k]: B on out, A on (in, k); then with groups in front; then groups between the two
    Shape("transposed", (2, 3, 2), (3, 4), (), 0, Layout((2, 3, 2), ((1,), (0, 2)))),
    Shape("transposed, groups", (6, 2, 2), (2, 6), (), 2, Layout((2, 3, 2, 2), ((2,), (1, 3)))),
    Shape("groups inside", (2, 3, 4), (2, 4), (), 3, Layout((2, 3, 4), ((0,), (2,)))),
    Shape("two block legs", (2, 3, 2, 2), (3, 2), (FULL, DIAGONAL), 4, Layout((2, 3, 2, 2), ((1,), (3,)))),
    Shape("elementwise", (2, 2), (1, 1), (), 4, Layout((2, 2), ((), ()))),
    Shape("blocks", (4, 6), (4, 6), (FULL, BLOCKS)),
    Shape("blocks in groups", (3, 4, 2, 3), (4, 6), (BLOCKS, DIAGONAL), 3),
    Shape("many columns", (3, 4), (3, 4), (FULL, LOW_RANK)),
    Shape("many columns in groups, blocks", (2, 3, 4), (3, 4), (LOW_RANK, BLOCKS), 2),
    Shape("four kinds, turned", (2, 4, 3, 4), (4, 2, 3, 4), (LOW_RANK, FULL, DIAGONAL, BLOCKS), 0, TURNED),
)  # fmt: skip


def factors(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float64) -> KroneckerFactors:
    """Well-conditioned random factors of very different sizes of entries, so that π is far from 1."""
    generator = torch.Generator().manual_seed(seed)
    kinds = shape.kinds or (FULL,) * len(shape.sizes)
    lead = (shape.blocks,) if shape.blocks else ()
    made = []
    for i, (size, kind) in enumerate(zip(shape.sizes, kinds, strict=True)):
        root = torch.randn(*lead, size, size + 2, generator=generator, dtype=torch.float64)
        full = (3.0 ** (1 - i)) * (root @ root.mT / size + 0.1 * torch.eye(size, dtype=torch.float64))
        made.append(stored(full, kind).to(dtype))
    return KroneckerFactors(tuple(made), shape.parameter, shape.kinds, "tied positions", shape.layout, "w")


def stored(full: Tensor, kind: Kind) -> Tensor:
    """A matrix [..., d, d] as a factor: its diagonal, its two blocks, or a root with two columns of zeros more."""
    size = full.shape[-1]
    if kind is DIAGONAL:
        return full.diagonal(dim1=-2, dim2=-1).clone()
    if kind is BLOCKS:
        half = size // 2
        return torch.stack([full[..., :half, :half], full[..., half:, half:]], -3)
    if kind is LOW_RANK:
        return torch.nn.functional.pad(torch.linalg.cholesky(full), (0, 2))
    return full


def whole(factor: Tensor, kind: Kind) -> Tensor:
    """One factor, without groups, as a matrix."""
    if kind is DIAGONAL:
        return torch.diag(factor)
    if kind is BLOCKS:
        return torch.block_diag(*factor)
    return factor @ factor.mT if kind is LOW_RANK else factor


AXES = {FULL: 2, DIAGONAL: 1, BLOCKS: 3, LOW_RANK: 2}


def matrices(K: KroneckerFactors) -> Iterator[list[Tensor]]:
    """For every block, its factors as full matrices."""
    for block in range(K.blocks):
        rows = zip(K.factors, K.kinds, strict=True)
        yield [whole(f[block] if f.ndim > AXES[k] else f, k) for f, k in rows]


def assemble(K: KroneckerFactors, blocks: list[list[Tensor]]) -> Tensor:
    """The dense matrix for the row-major parameter, placed by the row-major index of every element."""
    products = []
    for block in blocks:
        product = torch.ones(1, 1, dtype=K.dtype)
        for factor in block:
            product = torch.kron(product, factor)
        products.append(product)
    dense = torch.block_diag(*products)
    if K.layout is None:
        return dense
    inner = [p for positions in K.layout.factors for p in positions]
    outer = [p for p in range(len(K.layout.legs)) if p not in inner]
    index = torch.arange(math.prod(K.layout.legs)).reshape(K.layout.legs).permute([*outer, *inner]).flatten()
    placed = torch.empty_like(dense)
    placed[index.unsqueeze(1), index] = dense
    return placed


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"{float(error):.3g}"


def vectors(K: KroneckerFactors, *batch: int) -> Tensor:
    return torch.randn((*batch, *K.shape), dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def identity(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)
