"""A training loop that stays as it is: norms of individual gradients in every step, curvature in every tenth.

Programs run inside of the loop's own forward and `loss.backward()`: `tn.attach` takes nothing away, `.grad` is what
PyTorch leaves there, and there is no second forward. Here the norms say which samples are far out, clipping is torch's
own, and Kronecker factors that are averaged over time turn the clipped gradient into a step of natural gradient.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import tnbackprop as tn

EVERY, STEPS, RATE, DAMPING = 10, 30, 0.3, 0.1


def data(samples: int) -> tuple[Tensor, Tensor]:
    """Three rings of points around each other."""
    y = torch.randint(3, (samples,))
    angle, radius = 6.3 * torch.rand(samples), 1.0 + y + 0.2 * torch.randn(samples)
    return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1), y


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> list[float]:
    """The loss of every step."""
    loss_function, losses = nn.CrossEntropyLoss(), []
    often, seldom = tn.compile_many(
        model, loss_function, batches[0], [[tn.Grad(), tn.BatchL2()], [tn.Grad(), tn.BatchL2(), tn.KFAC(mc_samples=4)]]
    )
    factors: dict[str, tn.KroneckerFactors] = {}
    inverse: dict[str, tn.KroneckerFactors] = {}
    for step, (x, y) in enumerate(batches):
        model.zero_grad()
        with tn.attach(seldom if step % EVERY == 0 else often) as attached:
            loss = loss_function(model(x), y)
            loss.backward()
        norms = len(x) * attached.result.total("batch_l2").sqrt()
        if step % EVERY == 0:
            new = attached.result["kfac"]
            factors = {name: factors[name].ema(K, 0.7) if factors else K for name, K in new.items()}
            inverse = {name: K.inverse(DAMPING) for name, K in factors.items()}
            print(f"step {step:2}  loss {loss:.3f}  norm {norms.median():.2f} in the middle, at most {norms.max():.2f}")
        check(model, loss_function, x, y, norms)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= RATE * (inverse[name] @ parameter.grad)
        losses.append(float(loss.detach()))
    return losses


def check(model: nn.Module, loss_function: nn.Module, x: Tensor, y: Tensor, norms: Tensor) -> None:
    """`.grad` is autograd's, and the first sample's norm is that of its own gradient."""
    parameters = list(model.parameters())
    for got, want in zip(parameters, torch.autograd.grad(loss_function(model(x), y), parameters), strict=True):
        torch.testing.assert_close(got.grad, want)
    first = torch.autograd.grad(loss_function(model(x[:1]), y[:1]), parameters)
    torch.testing.assert_close(norms[0], torch.cat([each.flatten() for each in first]).norm())


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 3))
    batches = [data(64) for _ in range(STEPS)]
    plain = copy.deepcopy(model)
    losses = train(model, batches)

    optimizer = torch.optim.SGD(plain.parameters(), lr=RATE)
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(x), y).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    x, y = data(512)
    ours, sgd = (float(nn.functional.cross_entropy(net(x), y).detach()) for net in (model, plain))
    print(f"after {STEPS} steps {ours:.3f} on other points; the same loop without factors {sgd:.3f}")
    assert losses[-1] < losses[0] and ours < sgd


if __name__ == "__main__":
    main()
