"""What is drawn, in the mean: the second moments of columns at the output, and quantities over many seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..compiler.sweep.roots import LossRoot
from ..definitions import oracle
from ..definitions.defined import SEED, Defined, factors
from ..definitions.report import LeftOut, NotDefined, Row
from ..diagram.reference import size_of
from ..linalg import KroneckerFactors
from ..quantities import KFLR, DiagGGNMC, Draws, Quantity, SqrtGGNMC
from .rules import Finding

DRAWS, RUNS, SIGMAS = 1000, 200, 6.0


@dataclass(frozen=True)
class Mean:
    """Many numbers in the mean, as they must be, and how far apart the two may be."""

    got: Tensor
    want: Tensor
    margin: Tensor


def _mean(each: Tensor, want: Tensor) -> Mean:
    """`SIGMAS` standard errors, and as many of the largest draws: what is rarer may not have been drawn at all."""
    margin = (each.std(0) * len(each) ** 0.5 + each.abs().amax((0, -1)).unsqueeze(-1)) * SIGMAS / len(each)
    return Mean(each.mean(0), want, margin)


def check_law(case: Defined, text: str) -> Iterator[Finding]:
    """Columns that a rule draws have the second moments of the loss's Hessian: (w·s)² for many w. For every root.

    At a small output, where no softmax is sharp. Of labels that a sampler draws from the distribution whose negative
    logarithm the loss is, the gradients are zero in the mean.
    """
    keys = [key for key, quantity in case.program.quantities.items() if is_drawn(quantity)]
    roots = [root for root in (case.root(key) for key in keys) if case.draws_at_output(root)]
    for root in (root for k, root in enumerate(roots) if root not in roots[:k]):
        output = case.problem.output / 10
        drawn = _drawn(case, root, output)
        if root.labels is not None:
            found = _mean(drawn, torch.zeros_like(drawn[0]))
            how = f"zero: the mean of their gradients over {DRAWS} draws, within {SIGMAS:g} standard errors"
            yield _row(f"labels of {root.labels.by}", "", text, found, how)
            continue
        H = oracle.loss_hessians(case.problem, output=output)
        w = torch.cat([torch.eye(H.shape[1]), torch.randn(H.shape[1], H.shape[1])]).to(H.dtype)
        each = [(own @ w.T).square() for own in drawn]
        found = _mean(torch.stack(each), torch.einsum("wf,nfg,wg->nw", w, H, w))
        how = f"the Hessian of the loss: their second moments over {DRAWS} draws, within {SIGMAS:g} standard errors"
        yield _row("drawn columns", "", text, found, how)


def _drawn(case: Defined, root: LossRoot, output: Tensor) -> Tensor:
    """`DRAWS` columns at an output, [draws, N, F]."""
    draw, generator = case.draw(root, output), torch.Generator().manual_seed(SEED)
    shape = [size_of(size, len(output)) for size in root.noise_shape()]
    return torch.stack([draw(own) for own in torch.rand(DRAWS, *shape, dtype=output.dtype, generator=generator)])


def check_mean(case: Defined, key: str, quantity: Any, text: str) -> Iterator[Finding]:
    """A drawn quantity over many seeds: its diagonal is that of the exact one."""
    want: dict[str, Tensor | NotDefined] = {}
    if isinstance(quantity, SqrtGGNMC | DiagGGNMC):
        per_sample = isinstance(quantity, SqrtGGNMC) or quantity.per_sample
        want |= oracle.ggn_diagonal(case.problem, per_sample)
    else:
        exact = KFLR(sharing=quantity.sharing, bias=quantity.bias)
        try:
            blocks = factors(case, key, exact, case.run(0)[key])
        except NotDefined as reason:
            yield LeftOut(key, str(reason))
            return
        want |= {name: own if isinstance(own, NotDefined) else own.diagonal() for name, own in blocks.items()}
    for name, wanted in want.items():
        if isinstance(wanted, NotDefined):
            yield LeftOut(f"{key} of '{name}'", str(wanted))
            continue
        each = [case.run(seed)[key][name] for seed in range(RUNS)]
        squares = [own.square().sum(0) for own in each] if isinstance(quantity, SqrtGGNMC) else each
        values = torch.stack([_diagonal(own) for own in squares])
        how = (
            f"the exact diagonal: the mean over {RUNS} seeds, within {SIGMAS:g} standard errors (a loss without a rule)"
        )
        yield _row(key, f"'{name}'", text, _mean(values, wanted), how)


def is_drawn(quantity: Quantity) -> bool:
    """Whether the loss draws its columns."""
    return type(quantity.host) is Draws


def _diagonal(value: Any) -> Tensor:
    found: Tensor = value.to_dense().diagonal() if isinstance(value, KroneckerFactors) else value
    return found


def _row(what: str, of: str, case: str, mean: Mean, how: str) -> Row:
    off = (mean.got - mean.want).abs()
    wrong = off > mean.margin
    text = ""
    if wrong.any():
        index = tuple(int(k) for k in wrong.nonzero()[0])
        got, want, margin = (float(t[index]) for t in (mean.got, mean.want, mean.margin))
        ratio = float((mean.got * mean.want).sum() / mean.want.square().sum())
        likely = f"the columns are drawn with another law: over all entries the mean is {ratio:.2f} times as large"
        if not mean.want.any():
            likely = "the sampler draws from another distribution than that whose negative logarithm the loss is"
        text = (
            f"  entry {list(index)}: the mean of the draws is {got:.4g} ± {margin:.2g}, and it must be {want:.4g}  "
            f"({int(wrong.sum())} of {wrong.numel()} entries are wrong)\n"
            f"  likely: {likely}"
        )
    scale = mean.want if mean.want.any() else mean.margin
    largest = float(scale.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
    return Row(what, of, case, tuple(mean.want.shape), float(off.max()) / largest, text, how)
