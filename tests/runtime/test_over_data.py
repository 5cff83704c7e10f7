"""Products with the matrix of all batches, against that of the data in one batch."""

from __future__ import annotations

import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import tnbackprop as tn

from ..kronecker import close

X = torch.randn(11, 3, generator=torch.Generator().manual_seed(0)).double()
Y = torch.tensor([0, 1, 1, 0, 1, 2, 0, 2, 1, 0, 2])
SPLITS = {"unequal": (4, 4, 3), "one is single": (5, 5, 1), "one": (11,)}
EMPIRICAL = {"fisher": tn.Fisher.EMPIRICAL}
MAKE: dict[str, Callable[..., tn.CurvatureProduct]] = {
    "ggn": tn.ggn_product,
    "hessian": tn.hessian_product,
    "empirical": partial(tn.fisher_product, fisher=tn.Fisher.EMPIRICAL),
    "blocks": partial(tn.ggn_product, blocks=tn.Blocks.PARAMETER),
}


def network(*between: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), *between, nn.Tanh(), nn.Linear(4, 3)).double()


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(X.split(sizes), Y.split(sizes), strict=True))


@pytest.mark.thinned(5)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", MAKE)
def test_all_data_in_one_batch(kind: str, split: str, reduction: str) -> None:
    model, loss = network(), nn.CrossEntropyLoss(reduction=reduction)
    over = tn.OverData(partial(MAKE[kind], model, loss), batches(*SPLITS[split]))
    whole = MAKE[kind](model, loss, (X, Y))
    close(over.to_dense(), whole.to_dense())
    v = torch.randn(whole.shape[0], 2, generator=torch.Generator().manual_seed(1)).double()
    close(over @ v, whole @ v)
    close(over(v[:, 0]), whole(v[:, 0]))
    named = {name: torch.randn(2, *p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for found, want in zip(over(named).values(), whole(named).values(), strict=True):
        close(found, want)
    assert over.T is over and over.shape == whole.shape and over.names == whole.names and whole.T is whole
    assert repr(over) == f"OverData({whole.label}: [31, 31], a {reduction} over samples, 4 parameters)"


def test_several_outputs_for_each_sample() -> None:
    """A mean over samples and elements is one over samples."""
    model, y = network(), torch.randn(11, 3).double()
    loader = DataLoader(TensorDataset(X, y), batch_size=4)
    over = tn.OverData(partial(tn.ggn_product, model, nn.MSELoss()), loader)
    close(over.to_dense(), tn.ggn_product(model, nn.MSELoss(), (X, y)).to_dense())


def ignoring(batch: Any) -> Tensor:
    return (batch[1] != 2).sum()


def test_what_is_counted() -> None:
    """A mean over what is not ignored is one of batches by how many are not."""
    model, loss = network(), nn.CrossEntropyLoss(ignore_index=2)
    make = partial(tn.ggn_product, model, loss)
    with pytest.raises(tn.InputError, match=r"GGN over data: the loss is neither the mean nor the sum[\s\S]*count="):
        tn.OverData(make, batches(6, 5))
    over = tn.OverData(make, batches(6, 5), count=ignoring)
    close(over.to_dense(), tn.ggn_product(model, loss, (X, Y)).to_dense())
    forced = tn.OverData(make, batches(6, 5), reduction=tn.Reduction.MEAN)
    assert (forced.to_dense() - over.to_dense()).abs().max() > 1e-4
    with pytest.raises(tn.InputError, match=r"count gives -1\.0 for a batch; give a finite number"):
        tn.OverData(make, batches(6, 5), count=lambda batch: -1.0).to_dense()


SORTED, KEPT = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1]), torch.tensor([0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 2])
WEIGHTS = torch.tensor([0.5, 2.0, 3.0]).double()
JOINED: dict[str, tuple[nn.Module, Tensor, tuple[int, ...], Callable[[Any], Any]]] = {
    # where every batch is a mean over its own samples, and they do not join as such
    "weights, by class": (nn.CrossEntropyLoss(weight=WEIGHTS), SORTED, (6, 5), lambda b: WEIGHTS[b[1]].sum()),
    "the last is ignored": (nn.CrossEntropyLoss(ignore_index=2), KEPT, (6, 4, 1), ignoring),
}


@pytest.mark.thinned(3)
@pytest.mark.parametrize("kind", ["ggn", "hessian", "empirical"])
@pytest.mark.parametrize("case", JOINED)
def test_batches_that_are_means_alone(case: str, kind: str) -> None:
    """They are refused without `count`, and with it they are all data in one batch."""
    loss, y, sizes, count = JOINED[case]
    empirical = partial(tn.fisher_product, fisher=tn.Fisher.EMPIRICAL)
    product = {"ggn": tn.ggn_product, "hessian": tn.hessian_product, "empirical": empirical}[kind]
    make, loader = partial(product, network(), loss), list(zip(X.split(sizes), y.split(sizes), strict=True))
    with pytest.raises(tn.InputError, match="does not join with it so"):
        tn.OverData(make, loader).to_dense()
    close(tn.OverData(make, loader, count=count).to_dense(), make((X, y)).to_dense())


def test_lengths_that_do_not_fit() -> None:
    """A mean over positions counts a sample by its length; a sum joins all the same. Single samples tell, too."""
    model = nn.Linear(3, 2).double()
    loader = [(torch.randn(n, t, 3).double(), torch.randn(n, t, 2).double()) for n, t in ((1, 4), (1, 4), (2, 2))]
    over = tn.OverData(partial(tn.ggn_product, model, nn.MSELoss()), loader)
    with pytest.raises(tn.InputError, match="does not join with it so"):
        over.to_dense()
    make = partial(tn.ggn_product, model, nn.MSELoss(reduction="sum"))
    close(tn.OverData(make, loader).to_dense(), sum(make(batch).to_dense() for batch in loader))


def test_it_is_one_matrix() -> None:
    """Shuffled batches, masks and drawn labels are the same each time, and torch's generator goes on as it was."""
    model, loss = network(nn.Dropout(0.5)), nn.CrossEntropyLoss()
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    torch.manual_seed(7)
    for make in (tn.ggn_product, tn.fisher_product):
        state = torch.get_rng_state()
        over = tn.OverData(partial(make, model, loss), loader)
        M = over.to_dense()
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(over.to_dense(), M)
        close(over @ torch.ones(31).double(), M.sum(1))
        torch.rand(3)
        assert torch.equal(pickle.loads(pickle.dumps(over)).to_dense(), M)


def test_parameters_as_they_are() -> None:
    """Another product after a step is that of the new parameters."""
    model, loss = network(), nn.CrossEntropyLoss()
    over = tn.OverData(partial(tn.ggn_product, model, loss), batches(6, 5))
    before = over.to_dense()
    with torch.no_grad():
        model[0].weight.mul_(2)
    after = over.to_dense()
    assert (after - before).abs().max() > 1e-3
    close(after, tn.ggn_product(model, loss, (X, Y)).to_dense())


def test_one_batch_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[Any]] = []

    def make(batch: Any) -> tn.CurvatureProduct:
        assert sum(ref() is not None for ref in alive) == 0
        made = tn.ggn_product(model, nn.CrossEntropyLoss(), batch)
        alive.append(weakref.ref(made))
        return made

    model = network()
    gc.disable()  # by counting references, not by looking for cycles
    try:
        tn.OverData(make, batches(4, 4, 3)).to_dense()
    finally:
        gc.enable()
    assert len(alive) == 4


class Stream(IterableDataset[Any]):
    """No length."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


def test_progress(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make = partial(tn.ggn_product, network(), nn.CrossEntropyLoss())
    for loader in (batches(6, 5), DataLoader(Stream(), batch_size=6)):
        over = tn.OverData(make, loader, progress=True)
        close(over.to_dense(), make((X, Y)).to_dense())
    monkeypatch.setattr("tnbackprop.runtime.progress.track", None)
    with pytest.raises(tn.InputError, match="pip install rich"):
        over.to_dense()


class Shrinking:
    """A loader that gives less each time."""

    def __init__(self) -> None:
        self.sizes = [(4, 4, 3), (4, 4), (4,)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        sizes = self.sizes.pop(0) if self.sizes else (1,)
        rest = (*sizes, 11 - sum(sizes))
        return iter(list(zip(X.split(rest), Y.split(rest), strict=True))[: len(sizes)])


def mixed(output: Tensor, y: Tensor) -> Tensor:
    """A mean of batches of four, and a sum of others."""
    return F.cross_entropy(output, y, reduction="mean" if len(y) in (4, 1, 3) else "sum")


MODEL, CE = network(), nn.CrossEntropyLoss()
GGN = partial(tn.ggn_product, MODEL, CE)
REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "a product": (
        lambda: tn.OverData(GGN((X, Y)), []),
        "makes no products; give what does of a batch",
    ),
    "a generator": (lambda: tn.OverData(GGN, iter(batches(6, 5))), "zip.*|list_iterator is not run through again"),
    "no batch": (lambda: tn.OverData(GGN, []), "the loader gives no batch"),
    "no pair": (lambda: tn.OverData(GGN, [X]), r"the pair \(x, y\)"),
    "reduction": (lambda: tn.OverData(GGN, batches(11), reduction="mean"), "give one of tn.Reduction.MEAN"),
    "no product": (
        lambda: tn.OverData(lambda batch: 1, batches(11)),
        "the product of a batch is int; give what",
    ),
    "one sample": (lambda: tn.OverData(GGN, [(X[:1], Y[:1])]), "neither the mean nor the sum.*one sample alone"),
    "fewer": (lambda: [each.to_dense() for each in [tn.OverData(GGN, Shrinking())] * 2], "gave 8 samples, and now 4"),
    "vector": (lambda: tn.OverData(GGN, batches(6, 5)) @ torch.ones(30).double(), r"shape \[30\]: give \[31\]"),
    "two kinds": (
        lambda: tn.OverData(partial(tn.ggn_product, MODEL, mixed), batches(4, 7)).to_dense(),
        "GGN over data: the loss is a mean over the samples of one batch, and another one does not join",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    attempt, message = REFUSED[what]
    with pytest.raises(tn.InputError, match=message):
        attempt()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("at_once", [1, 3, 8, 100])
def test_vectors_are_multiplied_a_few_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many it is, the product is the same; a small model has all of them at once."""
    want = GGN((X, Y)).to_dense()
    monkeypatch.setattr("tnbackprop.products.make.AT_ONCE", at_once)
    monkeypatch.setattr("tnbackprop.products.make.SMALL", 0)
    close(GGN((X, Y)).to_dense(), want)
