"""Second-order quantities from torch.func on the plain forward, in the simplest way. Nothing of tnbackprop is used.

J_n is the Jacobian of the model's output on sample n alone, H_n the block of the loss's Hessian with respect to the
output that belongs to sample n; the loss is taken as given, a mean included. G_n = J_nᵀ H_n J_n, G = sum_n G_n.
Every block is that of one parameter, which is flattened row-major.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev

from .oracle import parameters

Values = Mapping[str, Tensor]
PSD_TOLERANCE = 1e-10


# The Hessian of the loss with respect to the output.


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """The model's output, one sample at a time."""
    return torch.cat([model(x[n : n + 1]) for n in range(len(x))]).detach()


def loss_hessians(loss: nn.Module, output: Tensor, y: Tensor, size: int) -> Tensor:
    """H_n, [N, F, F], with F numbers of output per sample. Asserts that samples do not meet and that H_n is PSD."""
    values = output.numel() // size
    full = jacrev(grad(lambda f: loss(f, y)))(output).reshape(size, values, size, values)
    blocks = torch.stack([full[n, :, n] for n in range(size)])
    assert full.abs().sum() - blocks.abs().sum() <= PSD_TOLERANCE * full.abs().sum(), "the loss mixes samples"
    lowest, highest = torch.linalg.eigvalsh(blocks).aminmax()
    assert lowest >= -PSD_TOLERANCE * highest.abs().clamp(min=1.0), "the loss is not convex in the output"
    return blocks


def loss_gradients(loss: nn.Module, output: Tensor, y: Tensor, size: int) -> Tensor:
    """Root columns of the empirical Fisher of the loss as given, [N, F]: g_n / sqrt(c) for L = c sum_n l_n.

    With g_n = c grad l_n, sum_n g_n g_nᵀ / c = c sum_n grad l_n grad l_nᵀ.
    """
    scale = 1 / size if loss.reduction == "mean" else 1.0
    return grad(lambda f: loss(f, y))(output).reshape(size, -1) / scale**0.5


# Blocks of the parameters.


def jacobians(model: nn.Module, x: Tensor) -> Values:
    """J_n of each parameter, [N, F, P]."""

    def output(theta: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, theta, (sample.unsqueeze(0),)).reshape(-1)

    theta = parameters(model)
    samples = [jacrev(output)(theta, sample) for sample in x]
    return {name: torch.stack([J[name].reshape(-1, p.numel()) for J in samples]) for name, p in theta.items()}


def ggn_blocks(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """G_n of each parameter, [N, P, P]."""
    H = loss_hessians(loss, outputs(model, x), y, len(x))
    return {name: J.mT @ H @ J for name, J in jacobians(model, x).items()}


def ggn(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """G of each parameter, [P, P]."""
    return {name: G.sum(0) for name, G in ggn_blocks(model, loss, x, y).items()}


def empirical_fisher(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """c sum_n grad l_n grad l_nᵀ of each parameter, [P, P]."""
    g = loss_gradients(loss, outputs(model, x), y, len(x))
    rows = {name: torch.einsum("nfp,nf->np", J, g) for name, J in jacobians(model, x).items()}
    return {name: G.mT @ G for name, G in rows.items()}


def hessian(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """The block of the Hessian of L of each parameter, [P, P]."""

    def value(theta: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(model, theta, (x,)), y)

    theta = parameters(model)
    blocks = jacrev(grad(value))(theta)
    return {name: blocks[name][name].reshape(p.numel(), p.numel()) for name, p in theta.items()}


# Quantities, by the name of their key.


def diag_ggn(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """diag G, [*p]."""
    return {name: G.sum(0) for name, G in diag_ggn_per_sample(model, loss, x, y).items()}


def diag_ggn_per_sample(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """diag G_n, [N, *p]."""
    theta, blocks = parameters(model), ggn_blocks(model, loss, x, y)
    return {name: G.diagonal(dim1=1, dim2=2).reshape(-1, *theta[name].shape) for name, G in blocks.items()}


def ggn_trace(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """tr G_n of the parameter's block, [N]."""
    return {name: G.diagonal(dim1=1, dim2=2).sum(1) for name, G in ggn_blocks(model, loss, x, y).items()}


def hessian_diag(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """diag of the Hessian of L, [*p]."""
    theta, blocks = parameters(model), hessian(model, loss, x, y)
    return {name: H.diagonal().reshape(theta[name].shape) for name, H in blocks.items()}


def hessian_diag_per_sample(model: nn.Module, loss: nn.Module, x: Tensor, y: Tensor) -> Values:
    """[N, *p]: the same for a loss in which every sample has parameters of its own."""
    theta = parameters(model)
    found = {}
    for name, p in theta.items():

        def value(own: Tensor, name: str = name) -> Tensor:
            each = [functional_call(model, theta | {name: own[n]}, (x[n : n + 1],)) for n in range(len(x))]
            return loss(torch.cat(each), y)

        copies = p.expand(len(x), *p.shape).clone()
        H = jacrev(grad(value))(copies).reshape(copies.numel(), copies.numel())
        found[name] = H.diagonal().reshape(copies.shape)
    return found


# Kronecker factors of linear and convolution layers, written out.


@dataclass(frozen=True)
class Factors:
    """A [I, I] and B [O, O] of one layer; with groups [G, I, I] and [G, O, O], I and O those of one group."""

    A: Tensor
    B: Tensor
    bias: Tensor  # B over all groups, [G O, G O]

    def to_dense(self) -> Tensor:
        """B ⊗ A for the row-major weight [O, *I]; block-diagonal over the groups."""
        if self.A.ndim == 2:
            return torch.kron(self.B, self.A)
        return torch.block_diag(*(torch.kron(B, A) for A, B in zip(self.A, self.B, strict=True)))


def kronecker(
    model: nn.Module, layer: str, loss: nn.Module, x: Tensor, y: Tensor, *, reduce: bool, empirical: bool = False
) -> Factors:
    """KFLR (the root of the Hessian) or the empirical KFAC of a Linear or ConvNd layer that is called once.

    expand: A = sum_nt a aᵀ / (N T), B = sum_nt bᵀ H_n b; reduce: A = sum_n ā āᵀ / (N T²), B = sum_n b̄ᵀ H_n b̄,
    with a [N, T, I] the layer's (unfolded) input, b [N, F, T, O] the Jacobian of the model's output with respect
    to the layer's, and ā, b̄ their sums over the T positions (Eschenhagen et al. 2023, arXiv:2311.00636).
    """
    module = model.get_submodule(layer)
    groups = getattr(module, "groups", 1)
    output = outputs(model, x)
    if empirical:
        g = loss_gradients(loss, output, y, len(x))
        H = torch.einsum("nf,ng->nfg", g, g)
    else:
        H = loss_hessians(loss, output, y, len(x))
    pairs = [_layer(model, module, sample.unsqueeze(0)) for sample in x]
    a, b = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    size, positions = a.shape[:2]
    if reduce:
        a, b = a.sum(1, keepdim=True), b.sum(2, keepdim=True)
    a, b = a.unflatten(-1, (groups, -1)), b.unflatten(-1, (groups, -1))
    A = torch.einsum("ntgi,ntgj->gij", a, a).contiguous() / (size * positions ** (2 if reduce else 1))
    B = torch.einsum("nftgo,nfe,netgp->gop", b, H, b).contiguous()
    if groups == 1:
        return Factors(A[0], B[0], B[0])
    whole = b.flatten(-2)
    return Factors(A, B, torch.einsum("nfto,nfe,netp->op", whole, H, whole).contiguous())


def bias_block(
    model: nn.Module, layer: str, loss: nn.Module, x: Tensor, y: Tensor, *, reduce: bool, empirical: bool = False
) -> Tensor:
    """The same for the bias, whose input is the number 1 at each position: A = 1, so the block is B over all groups."""
    return kronecker(model, layer, loss, x, y, reduce=reduce, empirical=empirical).bias


def _layer(model: nn.Module, module: nn.Module, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Input [T, I] of the layer on one sample and the Jacobian [F, T, O] of the model's output w.r.t. the layer's."""
    seen: list[Tensor] = []

    handle = module.register_forward_hook(lambda m, i, o: seen.extend((i[0].detach(), o.detach())))
    with torch.no_grad():
        model(sample)
    handle.remove()
    a, out = seen

    def shifted(shift: Tensor) -> Tensor:
        hook = module.register_forward_hook(lambda m, i, o: o + shift)
        try:
            return model(sample).reshape(-1)
        finally:
            hook.remove()

    b = jacrev(shifted)(torch.zeros_like(out)).detach()
    if isinstance(module, nn.Linear):
        return a.reshape(-1, a.shape[-1]), b.reshape(len(b), -1, out.shape[-1])
    return unfold(a, module)[0], b[:, 0].flatten(2).mT


def unfold(a: Tensor, module: nn.Module) -> Tensor:
    """Input [N, C, *s] of a convolution -> its windows [N, T, C*K], channels first, as in the row-major weight."""
    padding = [p for p in reversed(module.padding) for _ in (0, 1)]
    a = nn.functional.pad(a, padding)
    axes = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (kernel, stride, dilation) in enumerate(axes, start=2):
        reach = dilation * (kernel - 1) + 1
        a = a.unfold(axis, reach, stride)[..., ::dilation]
    spatial = len(module.kernel_size)
    order = (0, *range(2, 2 + spatial), 1, *range(2 + spatial, 2 + 2 * spatial))
    return a.permute(order).flatten(1 + spatial).flatten(1, spatial)
