"""Complex numbers on the way from real values to real ones: Fourier transforms, rotations, filters of parameters."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

import tnbackprop as tn

from ...tried import FIRST, GGN, Tried, randn

X = randn(4, 3)
LINEAR = {"l": partial(nn.Linear, 3, 4)}
fft = torch.fft


class Rotary(nn.Module):
    """Pairs of features turned by an angle that a complex buffer has."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(2, dtype=torch.float64)
        self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(1, (2, 2))) * self.turns).flatten(1)


def spectrum(m: nn.Module, x: Tensor) -> Tensor:
    z = fft.rfft(m.l(x))
    return torch.cat([z.real, z.imag, z.abs().log1p()], 1)


def operator(m: nn.Module, x: Tensor) -> Tensor:
    """A Fourier neural operator's layer: a matrix of parameters for each frequency."""
    z = torch.einsum("nic,ioc->noc", fft.rfft(x), torch.view_as_complex(m.w))
    return fft.irfft(z, n=4).flatten(1)


def filtered(m: nn.Module, x: Tensor) -> Tensor:
    return fft.irfft(fft.rfft(m.l(x), n=8) * fft.rfft(m.k, n=8), n=8)[:, :4]


def images(m: nn.Module, x: Tensor) -> Tensor:
    return fft.irfft2(fft.rfft2(m.l(x).view(-1, 2, 2)) * torch.view_as_complex(m.w)).flatten(1)


def pieces(m: nn.Module, x: Tensor) -> Tensor:
    """Parts of a complex tensor, put together in another order."""
    one, two = fft.fft(m.l(x)).chunk(2, 1)
    return torch.cat([two, one.conj()], 1).angle()


def low_modes(m: nn.Module, x: Tensor) -> Tensor:
    """A Fourier neural operator's layer as it is published: what is kept is written into zeros."""
    z = fft.rfft(m.l(x))
    kept = torch.zeros(len(x), 3, dtype=z.dtype)
    kept[:, :2] = z[:, :2] * torch.view_as_complex(m.w)
    return fft.irfft(kept, n=4)


def rows(m: nn.Module, x: Tensor) -> Tensor:
    """Single rows, a conjugate, real numbers into complex ones, steps."""
    z = fft.rfft(m.l(x))
    made = torch.zeros(len(x), 6, dtype=z.dtype)
    made[:, 1], made[:, 4], made[:, ::5] = z[:, 0] * 1j, x[:, 0], z[:, 1:].conj()
    return made.abs()


def diagonal(m: nn.Module, x: Tensor) -> Tensor:
    z = fft.rfft(m.l(x))
    made = torch.zeros(len(x), 3, 3, dtype=z.dtype)
    made.diagonal(dim1=1, dim2=2).copy_(z)
    return torch.view_as_real(made).flatten(1)


CASES = [
    Tried("low modes", low_modes, X, {**LINEAR, "w": randn(2, 2)}),
    Tried("rows", rows, X, LINEAR, FIRST),
    Tried("diagonal", diagonal, X, LINEAR),
    Tried("spectrum", spectrum, X, LINEAR),
    Tried("fft", lambda m, x: fft.fft(m.l(x)).real, X, LINEAR),
    Tried("FNet", lambda m, x: fft.fft(fft.fft(m.l(x), dim=-1), dim=-2).real.flatten(1), randn(4, 2, 3), LINEAR),
    Tried("hfft", lambda m, x: fft.hfft(fft.ihfft(m.l(x)), n=4), X, LINEAR),
    Tried("filter", filtered, X, {**LINEAR, "k": randn(4)}),
    Tried("operator", operator, randn(4, 2, 4), {"w": randn(2, 2, 3, 2)}),
    Tried("images", images, X, {**LINEAR, "w": randn(2, 2, 2)}),
    Tried("shifted", lambda m, x: fft.fftshift(fft.fft(m.l(x)), 1).abs(), X, LINEAR),
    Tried("stft", lambda m, x: torch.stft(m.l(x), 4, 2, window=torch.ones(4, dtype=x.dtype), return_complex=True,
                                          center=False).abs().flatten(1), X, {"l": partial(nn.Linear, 3, 8)}),
    Tried("made", lambda m, x: torch.complex(m.l(x), m.k(x)).exp().real, X, {**LINEAR, "k": partial(nn.Linear, 3, 4)}),
    Tried("pieces", pieces, X, LINEAR, FIRST),
    Tried("rotary", lambda m, x: m.r(m.l(x)), X, {**LINEAR, "r": Rotary}),
    Tried("of parameters alone", lambda m, x: x * fft.irfft(fft.rfft(m.a) * fft.rfft(m.a), n=3), X, {"a": randn(3)}),
]  # fmt: skip


@pytest.mark.thinned(5)
@pytest.mark.parametrize("tried", CASES, ids=str)
def test_values(tried: Tried) -> None:
    tried.check()


def frozen(m: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        z = fft.rfft(m.k)
    return fft.irfft(fft.rfft(m.l(x)) * z, n=4)


def long(m: nn.Module, x: Tensor) -> Tensor:
    z = fft.rfft(m.l(x))
    for _ in range(8):
        z = z * z
    return z.abs()


REFUSED = [
    (frozen, GGN, "no_grad block. Detach the parameters"),
    (long, GGN, "more than 200 operations in complex numbers"),
    (lambda m, x: fft.irfft(fft.rfft(m.l(x)), n=4), ("hessian_diag",), "its second derivative is not known"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "quantities", "message"), REFUSED)
def test_what_is_refused(function: object, quantities: tuple[str, ...], message: str) -> None:
    with pytest.raises(tn.UnsupportedError, match=message):
        Tried("refused", function, X, {**LINEAR, "k": randn(4)}, quantities).program()


def test_a_complex_output() -> None:
    """Refused without a loss; beside one it is left out."""
    model = nn.Sequential(nn.Linear(3, 4), Spectrum())
    with pytest.raises(tn.UnsupportedError, match="returns a complex tensor: return"):
        tn.compile(model, None, (X.float(), None), [tn.Jacobians()])


class Spectrum(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return fft.rfft(x)
