"""What is no derivative but defined by its way through the model: drawn columns, Kronecker factors, diagonals.

Their references are made of torch.func Jacobians of single lines and of the loss's own Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.func import grad
from torch.utils import _pytree as pytree

from ..compiler.sweep.derived import Columns, Extraction
from ..compiler.sweep.roots import LossRoot
from ..diagram.core import leaves
from ..diagram.reference import size_of
from ..linalg import KroneckerFactors
from ..notation.bind import CURVATURE, NOISE
from ..quantities import (
    BL89,
    KFAC,
    KFLR,
    KFRA,
    DiagGGNMC,
    Draws,
    Fisher,
    HesScale,
    Labels,
    Propagation,
    Quantity,
    SqrtGGNMC,
)
from ..quantities.factors import Sharing
from ..quantities.roots import OtherFactors
from ..runtime import Program
from . import oracle, recursions
from .calls import dense, run_code, trace, with_lines
from .kronecker import Structure, block, structure_of
from .lines import Sample
from .oracle import Problem
from .report import NotDefined

LIMIT = 20_000_000
"""Entries of the Jacobians of all lines, or of the Hessians of one, that are written out."""
SEED = 0
"""Of the program's own draws, which are drawn again."""


@dataclass(frozen=True)
class Defined:
    """A program on one batch, with what its definitions have in common; computed when it is first asked for."""

    program: Program
    problem: Problem
    runs: dict[int, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    @cached_property
    def samples(self) -> list[Sample]:
        """Raises `NotDefined` where their Jacobians are too large, or the model returns several tensors."""
        if not isinstance(self.program.compiled.graph.output, str):
            raise NotDefined("the model returns several tensors")
        found = []
        for n in range(self.problem.size):
            y = pytree.tree_map(lambda t, n=n: t[n : n + 1] if isinstance(t, Tensor) and t.ndim else t, self.problem.y)
            found.append(Sample(self.program, self.problem.sample(n), y))
            if found[0].entries > LIMIT:
                raise NotDefined(f"{found[0].entries} entries of Jacobians: give verify a smaller model")
        return found

    @cached_property
    def hessians(self) -> Tensor:
        """H_n, [N, F, F]."""
        return oracle.loss_hessians(self.problem)

    @cached_property
    def gradients(self) -> Tensor:
        """∂L/∂f_n, [N, F]."""
        assert self.problem.loss is not None
        loss, y = self.problem.loss, self.problem.y
        found: Tensor = grad(lambda f: loss(f, y))(self.problem.output)
        return found.reshape(self.problem.size, -1)

    @cached_property
    def roots(self) -> Tensor:
        """S_n with S_nᵀ S_n = H_n, [N, V, F]."""
        return half(self.hessians)

    def run(self, seed: int) -> Mapping[str, Mapping[str, Any]]:
        """The program's results with another seed."""
        if seed not in self.runs:
            x, y = self.problem.x, self.problem.y
            self.runs[seed] = dict(self.program(x, y, seed=seed, operands=self.program.some_operands(x, y)))
        return self.runs[seed]

    def columns(self, key: str) -> Columns:
        """The sweep that a quantity is a result of."""
        for found in self.program.compiled.derived.columns:
            items = [item for item in found.schedule if isinstance(item, Extraction)]
            if any(key in item.quantities for item in items):
                return found
        raise NotDefined("the program has no parameter")

    def structure(self, key: str, value: str) -> Structure:
        """How the program's factors of a parameter separate; B reads what is no value of the forward."""
        items = [item for item in self.program.compiled.derived.items if isinstance(item, Extraction)]
        factors = next(item.factors[key] for item in items if item.parameter == value and key in item.factors)
        reads = [set(leaves(diagram)) - self.samples[0].env.keys() for diagram in factors.diagrams]
        return structure_of(factors, next((k for k, names in enumerate(reads) if names), 0))

    def root(self, key: str) -> LossRoot:
        start = self.columns(key).start
        assert isinstance(start, LossRoot)
        return start

    def drawn(self, key: str) -> Tensor:
        """The columns that the program has drawn, [N, V, F]: the rule's own code, on the same random numbers."""
        found = self.columns(key)
        generator = torch.Generator().manual_seed(SEED)
        noise: dict[str, Tensor] = {}
        for name, value in self.program.compiled.plan.noises.items():
            shape = [size_of(size, self.problem.size) for size in value.shape]
            noise[name] = torch.rand(shape, dtype=torch.float64, generator=generator)
        own = noise[found.noise]
        draw = self.draw(self.root(key), self.problem.output)
        columns: Tensor = torch.stack([draw(row) for row in own], 1) * found.samples**-0.5
        return columns

    def draws_at_output(self, root: LossRoot) -> bool:
        """Whether it has code that draws columns at the model's output, element by element, and not further on."""
        if root.calls or root.sampler is not None:
            return not root.calls
        output = self.problem.output
        at = trace(self.program, self.problem.x, self.problem.y, self.problem.size).env.get(root.value)
        return at is None or (at.numel() == output.numel() and torch.allclose(at.reshape(-1), output.reshape(-1)))

    def draw(self, root: LossRoot, output: Tensor) -> Callable[[Tensor], Tensor]:
        """The rule's code for one column at an output, [N, F], of uniform numbers; or what a sampler's labels give."""
        size, graph = self.problem.size, self.program.compiled.graph
        if root.sampler is not None and not isinstance(graph.output, str):
            raise NotDefined("the model returns several tensors")
        if root.sampler is not None:
            return partial(self._drawn, root.sampler, output)
        traced = trace(self.program, self.problem.x, self.problem.y, size)
        behind = ((call, rule) for call, rule in traced.bound if root.output in call.tensors.values() and rule.root)
        of_loss = ((call, rule) for call, rule in traced.bound if call.output.name == graph.loss)
        call, rule = next(chain(behind, of_loss))
        at = traced.env.get(root.value, output)
        env = {**traced.env, root.value: output.reshape(at.shape)}
        env = with_lines(rule, env, env[call.output.name], size)
        if root.curvature is not None:
            env[CURVATURE] = dense(root.curvature, env, size)
        return lambda noise: run_code(root.root.sample, {**env, NOISE: noise}, size).reshape(size, -1)


    def _drawn(self, sampler: Callable[..., Any], output: Tensor, noise: Tensor) -> Tensor:
        """Gradients of drawn labels over the root of the factor that the loss puts on a sample's."""
        assert self.problem.loss is not None
        loss, y = self.problem.loss, sampler(output, noise)
        found: Tensor = grad(lambda f: loss(f, y))(output).reshape(self.problem.size, -1) * self.problem.scale**-0.5
        return found

    def starts(self, key: str, root: Propagation) -> Tensor:
        """The columns at the output that a quantity is made of, [N, V, F]."""
        if isinstance(root, Labels):
            found: Tensor = self.gradients.unsqueeze(1) * self.problem.scale**-0.5
            return found
        return self.drawn(key) if isinstance(root, Draws) else self.roots


# -- the quantities


Values = Mapping[str, Tensor | NotDefined]
Expected = Callable[[Defined, str, Any, Mapping[str, Any]], Values]
"""For a quantity with its key, and what the program has: what its definition gives, or why it gives nothing."""


def columns(case: Defined, key: str, root: Propagation) -> dict[str, Tensor]:
    """J_nᵀ s_vn, [V, N, *p]."""
    s, J = case.starts(key, root), oracle.jacobians(case.problem)
    return {name: torch.einsum("nvf,nf...->vn...", s, own) for name, own in J.items()}


def sampled_roots(case: Defined, key: str, quantity: Any, got: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of drawn columns."""
    return columns(case, key, quantity.propagates)


def sampled_diagonal(case: Defined, key: str, quantity: Any, got: Mapping[str, Any]) -> Values:
    """Σ_v (J_nᵀ s_vn)², summed over n or not."""
    each = {name: V.square().sum(0) for name, V in sampled_roots(case, key, quantity, got).items()}
    return each if quantity.per_sample else {name: V.sum(0) for name, V in each.items()}


def factors(case: Defined, key: str, quantity: Any, got: Mapping[str, Any]) -> Values:
    """The dense block of the factors; of what other lines are made of, where a reason says so."""
    samples = case.samples
    if isinstance(quantity, KFRA):
        matrices = recursions.averages(samples, case.hessians.sum(0))
        reached = [{name: half(K) / len(samples) ** 0.5 for name, K in matrices.items()}] * len(samples)
    else:
        starts = case.starts(key, _root(quantity))
        reached = [recursions.columns(each, start) for each, start in zip(samples, starts, strict=True)]
    found: dict[str, Tensor | NotDefined] = {}
    for value, name in samples[0].trainable.items():
        own = got.get(name)
        if isinstance(own, KroneckerFactors):
            try:
                joined = own.parameter != tuple(case.problem.theta[name].shape)
                structure = replace(case.structure(key, value), averaged=isinstance(quantity, KFRA))
                found[name] = block(samples, reached, value, structure, quantity.sharing is Sharing.REDUCE, joined)
            except NotDefined as reason:
                found[name] = reason
    return found


def _root(quantity: KFLR | KFAC) -> Propagation:
    if isinstance(quantity, KFLR):
        return quantity.root
    return Labels() if quantity.fisher is Fisher.EMPIRICAL else Draws(quantity.mc_samples)


def half(K: Tensor) -> Tensor:
    """R with Rᵀ R = K, positive semi-definite: [..., F, F]."""
    values, vectors = torch.linalg.eigh((K + K.mT) / 2)
    root: Tensor = vectors * values.clamp(min=0).sqrt().unsqueeze(-2)
    return root.mT


def approximate_diagonal(case: Defined, key: str, quantity: Any, got: Mapping[str, Any]) -> Values:
    """The recursion of the diagonal, [*p] or [N, *p]."""
    samples = case.samples
    largest = max(sample.env[name].numel() for sample in samples[:1] for line in sample.lines for name in line.reads)
    if largest**2 > LIMIT:
        raise NotDefined(f"{largest}² second derivatives of one line: give verify a smaller model")
    starts = _elementwise(case, key) if isinstance(quantity, BL89) else case.hessians.diagonal(dim1=1, dim2=2)
    each = [recursions.diagonals(*args) for args in zip(samples, case.gradients, starts, strict=True)]
    found = {}
    for value, name in samples[0].trainable.items():
        at = samples[0].env[value]
        own = torch.stack([h[value].reshape(at.shape) if value in h else torch.zeros_like(at) for h in each])
        found[name] = own if quantity.per_sample else own.sum(0)
    return found


def _elementwise(case: Defined, key: str) -> Tensor:
    """BL89's start: t p (1 - p) of a softmax with the targets t, all scale of the loss in t; else diag H_n. [N, F]."""
    diagonal = case.hessians.diagonal(dim1=1, dim2=2)
    start = case.columns(key).start
    if not isinstance(start, LossRoot) or not start.root.elementwise:
        return diagonal
    output = case.problem.output
    p = torch.softmax(output, 1)
    rows = oracle.loss_hessians(case.problem, rows=len(output))
    at = p.reshape(len(output), p.shape[1], -1)  # class, position
    eye = torch.eye(at.shape[2], dtype=p.dtype)
    spread = torch.einsum("ncs,cd,st->ncsdt", at, torch.eye(at.shape[1], dtype=p.dtype), eye)
    spread = spread - torch.einsum("ncs,nds,st->ncsdt", at, at, eye)
    own = rows.reshape(spread.shape)
    weight = torch.einsum("ncscs->ns", own) / torch.einsum("ncscs->ns", spread)
    if not torch.allclose(own, spread * weight[:, None, :, None, None], rtol=1e-9, atol=1e-12):
        raise NotDefined("the loss is no softmax, and only its own rule says what it is of each output")
    p = p.reshape(diagonal.shape)
    return p * diagonal - case.gradients * p * (1 - p)  # t = κ p - g of the gradient, κ p (1 - p) of the Hessian


def explained(quantity: Quantity) -> str:
    """What the quantity is compared with."""
    return next((text for kind, text in HOW.items() if isinstance(quantity, kind)), "")


EXPECTED: Mapping[type[Quantity], Expected] = {
    SqrtGGNMC: sampled_roots,
    DiagGGNMC: sampled_diagonal,
    KFLR: factors,
    KFRA: factors,
    KFAC: factors,
    OtherFactors: factors,
    HesScale: approximate_diagonal,
    BL89: approximate_diagonal,
}
HOW: Mapping[type[Quantity] | tuple[type[Quantity], ...], str] = {
    (SqrtGGNMC, DiagGGNMC): "torch.func VJPs of the same drawn columns, whose law is compared on its own",
    KFRA: "its recursion over the torch.func Jacobians of all lines",
    (KFLR, KFAC): "factors of the torch.func Jacobians of single lines and of the columns that reach them",
    (HesScale, BL89): "the recursion over the torch.func Jacobians and second derivatives of all lines",
}
