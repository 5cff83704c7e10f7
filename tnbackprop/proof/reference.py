"""Reference: what PyTorch's own autograd gives for a model and its loss on some samples. Nothing of a program is used.

Individual gradients and columns are VJPs of the model's outputs with a cotangent that is zero for all other samples.
That cotangent, and the loss's Hessian, are of the loss as a function of the outputs alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..compiler.capture.export import Wrapped
from ..compiler.capture.rehearse import nodes
from ..compiler.running.magnitudes import largest
from ..compiler.translate.foreign import MISTAKES
from ..compiler.translate.graph import Graph
from ..compiler.translate.torch_internals import saved_of
from ..compiler.translate.torch_modes import twice_differentiable
from ..diagram.core import N

Gradients = dict[str, Tensor]
Batch = tuple[Any, Any]
SEED = 0
PASSES = 64
"""Backward passes that one kind of quantity may take. They go through few samples."""


class NotComparedError(Exception):
    """What autograd cannot be asked for, and why."""


@dataclass(frozen=True)
class Curvature:
    """Of each sample n and each parameter: the diagonal of J_nᵀ H_n J_n, and its product with a direction d, twice."""

    diagonal: Mapping[str, Tensor]  # [N, *p]
    along: Mapping[str, Tensor]  # [N]


class Reference:
    """Autograd on the model of `wrapped` as it is now; to be asked only while its tensors are what they are."""

    def __init__(self, wrapped: Wrapped, graph: Graph, batch: Batch, size: int) -> None:
        self.wrapped, self.graph, self.batch, self.size = wrapped, graph, batch, size
        self.clipped = False  # whether negative eigenvalues of the loss's Hessian count as zero
        self.powers: tuple[float, ...] = ()  # of the number of samples, where c is another one
        torch.manual_seed(SEED)
        self.loss, self.output = wrapped(*batch)
        own = wrapped.get_submodule("model").named_parameters()
        self.parameters = {name: p for name, p in own if p.requires_grad}
        leaves = pytree.tree_leaves(self.output)
        self.places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.requires_grad]
        self.ends: list[Tensor] = [leaves[k] for k in self.places]

    @cached_property
    def saved(self) -> int | None:
        """Bytes that autograd keeps for the loss and the outputs, without parameters, buffers and inputs."""
        given = [leaf for leaf in pytree.tree_leaves(self.batch) if isinstance(leaf, Tensor)]
        ends = [end.grad_fn for end in (self.loss, *self.ends) if isinstance(end, Tensor)]
        try:
            kept = [tensor.untyped_storage() for node in nodes(ends) for tensor in saved_of(node)]
        except RuntimeError:  # written to since, so there is no gradient
            return None
        given += [*self.wrapped.parameters(), *self.wrapped.buffers()]
        outside = {each.untyped_storage().data_ptr() for each in given}
        return sum({each.data_ptr(): each.nbytes() for each in kept if each.data_ptr() not in outside}.values())

    # -- the gradient

    @cached_property
    def unreached(self) -> frozenset[str]:
        """The parameters that autograd has no derivative by: all where an operator has none."""
        roots = [each for each in (self.loss, *self.ends) if isinstance(each, Tensor) and each.requires_grad]
        try:
            found = _grad(roots, self.parameters, [torch.ones_like(root) for root in roots], whole=False)
        except RuntimeError:  # an operator of one's own without a backward
            found = {}
        return frozenset(self.parameters) - found.keys()

    @cached_property
    def gradient(self) -> Gradients:
        """∇L, [*p]."""
        return _grad([self.loss], self.parameters, None)

    def vjp(self, cotangents: list[Tensor]) -> Gradients:
        """Jᵀ u of all outputs, [*p]."""
        return _grad(self.ends, self.parameters, cotangents)

    # -- samples one by one

    @cached_property
    def layouts(self) -> list[tuple[list[int], int]]:
        """Of each output: sizes that it can be viewed with, and which of them is the number of samples."""
        names = pytree.tree_leaves(self.graph.output)
        found = []
        for k, end in zip(self.places, self.ends, strict=True):
            axes = self.graph.values[names[k]].axes if len(names) > k and isinstance(names[k], str) else ()
            factors = [factor for axis in axes for factor in axis]
            sizes = [self.size if factor == N else int(factor) for factor in factors]
            if factors.count(N) != 1 or torch.Size(sizes).numel() != end.numel():
                raise NotComparedError("an output of the model has no axis of the samples")
            found.append((sizes, factors.index(N)))
        return found

    @cached_property
    def elements(self) -> list[list[Tensor]]:
        """Which elements of each output, flattened, are of sample n."""
        every = [
            torch.arange(end.numel(), device=end.device).view(sizes).movedim(axis, 0).flatten(1)
            for end, (sizes, axis) in zip(self.ends, self.layouts, strict=True)
        ]
        return [[rows[n] for rows in every] for n in range(self.size)]

    @cached_property
    def cut(self) -> Cut:
        """The loss of outputs that come from nowhere. Raises `NotComparedError` where it reads parameters as well."""
        if self.loss is None:
            raise NotComparedError("there is no loss")
        found = Cut(self.wrapped, self.output, self.places, self.batch[1])
        if _grad([found.loss], self.parameters, None, whole=False):
            raise NotComparedError("the loss reads parameters next to the outputs, so samples are not told apart")
        if not torch.allclose(found.loss.detach(), self.loss.detach(), rtol=1e-2, atol=1e-6, equal_nan=True):
            raise NotComparedError("the loss draws random numbers")
        return found

    @cached_property
    def rows(self) -> Mapping[int, Gradients]:
        """G_n = Jᵀ of ∂L/∂f with zeros for the other samples, for all n, or where those are many for two.

        The last of all is what the others leave of ∇L: a backward pass less.
        """
        *each, last = range(self.size) if self.size <= PASSES else (0, self.size - 1)
        found = {n: self._row(n) for n in each}
        if self.size > PASSES or not all(largest(g) < torch.inf for g in self.gradient.values()):
            return found | {last: self._row(last)}
        return found | {last: {p: g - sum(row[p] for row in found.values()) for p, g in self.gradient.items()}}

    def _row(self, n: int) -> Gradients:
        return self.vjp([self._alone(n, k) for k in range(len(self.ends))])

    def _alone(self, n: int, k: int) -> Tensor:
        """The cotangent of output k with zeros for all samples but n."""
        whole, (sizes, axis) = self.cut.cotangents[k], self.layouts[k]
        found = torch.zeros_like(whole, memory_format=torch.contiguous_format)
        found.view(sizes).select(axis, n).copy_(whole.reshape(sizes).select(axis, n))
        return found

    @cached_property
    def individual(self) -> Gradients:
        """G_n, [N, *p]. Raises `NotComparedError` where there are too many samples."""
        if len(self.rows) < self.size:
            raise NotComparedError(f"{self.size} samples")
        return {name: torch.stack([self.rows[n][name] for n in range(self.size)]) for name in self.parameters}

    @property
    def scales(self) -> tuple[float, ...]:
        """What c of L = c Σ_n ℓ_n may be. Of a loss with a divisor that the batch has, only its formula can tell."""
        return 1 / self.size, 1.0, *self.powers

    # -- columns

    def hessian(self, n: int) -> Tensor:
        """H_n of the outputs of sample n, [F, F], in float64."""
        own = self.elements[n]
        if not own:  # torch has no derivative of what gives them
            return torch.zeros(0, 0, dtype=torch.float64)
        g = torch.cat([part.reshape(-1)[at] for part, at in zip(self.cut.slopes, own, strict=True)])
        if not g.requires_grad:
            return torch.zeros(len(g), len(g), dtype=torch.float64)
        rows = [_list(entry, self.cut.ends) for entry in g]
        return torch.stack([torch.cat([p.reshape(-1)[at] for p, at in zip(row, own, strict=True)]) for row in rows]).to(
            "cpu", torch.float64
        )

    @property
    def few_columns(self) -> bool:
        """Whether all columns of all samples may be propagated."""
        return sum(len(part) for part in self.elements[0]) * self.size <= PASSES

    @property
    def columns(self) -> Iterator[tuple[int, Gradients]]:
        """J_nᵀ s for each n and each column s of a root of H_n, negative eigenvalues left out."""
        if not self.few_columns:
            raise NotComparedError("there are many columns")
        for n in range(self.size):
            H = self.hessian(n)
            values, vectors = torch.linalg.eigh((H + H.mT) / 2)
            for value, vector in zip(values, vectors.T, strict=True):
                if value > 1e-13 * values.abs().max():
                    yield n, self.vjp(self._spread(n, value.sqrt() * vector))

    def _spread(self, n: int, vector: Tensor) -> list[Tensor]:
        """A vector of the outputs of sample n as cotangents."""
        parts = torch.split(vector, [len(at) for at in self.elements[n]])
        return [
            torch.zeros_like(end).reshape(-1).index_put((at,), part.to(end)).view(end.shape)
            for end, at, part in zip(self.ends, self.elements[n], parts, strict=True)
        ]

    @cached_property
    def directions(self) -> Gradients:
        """A random direction for each parameter, [*p], in float64."""
        source = torch.Generator().manual_seed(SEED)
        return {
            name: torch.randn(p.shape, generator=source, dtype=torch.float64).to(p.device)
            for name, p in self.parameters.items()
        }

    @cached_property
    def curvature(self) -> Curvature:
        """Of the GGN blocks, from all columns."""
        diagonal = {n: torch.zeros(self.size, *d.shape, dtype=d.dtype, device=d.device) for n, d in self._shapes}
        along = {n: torch.zeros(self.size, dtype=d.dtype, device=d.device) for n, d in self._shapes}
        for n, column in self.columns:
            for name, d in self._shapes:
                row = column[name].double()
                diagonal[name][n] += row.square()
                along[name][n] += (row * d).sum().square()
        return Curvature(diagonal, along)

    @property
    def _shapes(self) -> list[tuple[str, Tensor]]:
        return list(self.directions.items())

    # -- second derivatives

    @cached_property
    def twice(self) -> Reference:
        """The same with kernels that have a second derivative."""
        with twice_differentiable():
            return Reference(self.wrapped, self.graph, self.batch, self.size)

    @cached_property
    def entries(self) -> dict[str, Tensor]:
        """Which elements are looked at alone: some of each parameter, of so many parameters as go."""
        every = list(self.parameters)
        names = every[:: -(-len(every) // PASSES)]
        source = torch.Generator().manual_seed(SEED)
        found = {}
        for name in names:
            p = self.parameters[name]
            count = min(max(1, PASSES // len(names)), p.numel())
            found[name] = torch.randperm(p.numel(), generator=source)[:count].to(p.device)
        return found

    @cached_property
    def hessian_entries(self) -> dict[str, Tensor]:
        """diag ∇²L at the `entries`."""
        first = self.twice.slopes
        found = {}
        for name, at in self.entries.items():
            p, g = self.twice.parameters[name], first[name].reshape(-1)
            each = [_list(g[k], [p])[0].reshape(-1)[k] if g.requires_grad else g.new_zeros(()) for k in at]
            found[name] = torch.stack(each).detach()
        return found

    @cached_property
    def ggn_entries(self) -> dict[str, Tensor]:
        """(J_n e)ᵀ H_n (J_n e) for the one-hot e of each of the `entries`, [entries, N]. Jᵀ u is linear in u."""
        if self.clipped:
            raise NotComparedError(
                "there are many columns, and what is cut off of the Hessian is not told without them"
            )
        ends = self.twice.ends
        u = [torch.ones_like(end).requires_grad_() for end in ends]
        back = _grad(ends, self.twice.parameters, u, create_graph=True)
        return {
            name: torch.stack([self._product(_list(back[name].reshape(-1)[k], u)) for k in at])
            for name, at in self.entries.items()
        }

    def _product(self, vectors: list[Tensor]) -> Tensor:
        """vᵀ H_n v of each sample's part of some vectors like the outputs, [N]."""
        known = [(g, v) for g, v in zip(self.cut.slopes, vectors, strict=True) if g.requires_grad]
        found = [torch.zeros_like(v) for v in vectors]
        if known:
            dot = torch.stack([(g * v.detach()).sum() for g, v in known]).sum()
            found = _list(dot, self.cut.ends)
        each = [(v * h).detach().double().reshape(-1) for v, h in zip(vectors, found, strict=True)]
        return torch.stack([torch.cat([e[at] for e, at in zip(each, own, strict=True)]).sum() for own in self.elements])

    @cached_property
    def slopes(self) -> Gradients:
        """∇L as a function of the parameters."""
        return _grad([self.loss], self.parameters, None, create_graph=True)


@dataclass(frozen=True)
class Cut:
    """The loss of the outputs alone."""

    wrapped: Wrapped
    output: Any
    places: list[int]
    y: Any

    @cached_property
    def _made(self) -> tuple[Tensor, list[Tensor]]:
        leaves, spec = pytree.tree_flatten(self.output)
        ends = {k: leaves[k].detach().requires_grad_() for k in self.places}
        handed = [ends[k].clone() if k in ends else leaf for k, leaf in enumerate(leaves)]  # a loss may write into it
        try:
            with twice_differentiable():
                return self.wrapped.loss_of(pytree.tree_unflatten(handed, spec), self.y), list(ends.values())
        except MISTAKES as error:  # an object of the model's own is there by its attributes only, or not at all
            raise NotComparedError("the loss reads an object of the model's own class") from error

    @property
    def loss(self) -> Tensor:
        return self._made[0]

    @property
    def ends(self) -> list[Tensor]:
        return self._made[1]

    @cached_property
    def cotangents(self) -> list[Tensor]:
        """∂L/∂f."""
        return [part.detach() for part in self.slopes]

    @cached_property
    def slopes(self) -> list[Tensor]:
        """∂L/∂f as a function of f."""
        return _list(self.loss, self.ends, create_graph=True)


def _list(root: Tensor, by: list[Tensor], create_graph: bool = False) -> list[Tensor]:
    if not root.requires_grad:
        return [torch.zeros_like(each) for each in by]
    found = torch.autograd.grad(root, by, retain_graph=True, create_graph=create_graph, allow_unused=True)
    return [torch.zeros_like(at) if part is None else part for part, at in zip(found, by, strict=True)]


def _grad(
    roots: list[Tensor],
    by: Mapping[str, Tensor],
    cotangents: list[Tensor] | None,
    whole: bool = True,
    create_graph: bool = False,
) -> Gradients:
    """By name; zeros where there is no derivative, or no entry if it is not `whole`. Dense."""
    both = [(root, None if cotangents is None else cotangents[k]) for k, root in enumerate(roots) if root.requires_grad]
    found: tuple[Tensor | None, ...] = (None,) * len(by)
    if both and by:
        found = torch.autograd.grad(
            [root for root, _ in both],
            list(by.values()),
            None if cotangents is None else [each for _, each in both],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
        )
    dense: Callable[[Tensor], Tensor] = lambda g: g if g.layout == torch.strided else g.to_dense()  # noqa: E731
    every = zip(by.items(), found, strict=True)
    return {name: torch.zeros_like(p) if g is None else dense(g) for (name, p), g in every if whole or g is not None}
