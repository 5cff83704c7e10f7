"""The model as it was: a forward runs on copies of its tensors, and nothing of that is left on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..translate.torch_internals import evenly, own_tables, version
from .kept import attributes_kept


@dataclass(frozen=True)
class Kept:
    """Memory with the values of a tensor, of which `copied` made it."""

    original: Tensor
    memory: Tensor
    version: int

    @property
    def fits(self) -> bool:
        """What is written through `.data`, or by numpy, changes no version."""
        return version(self.memory) == self.version and _alike(self.original, self.memory)


_KEPT = ContextVar[dict[int, Kept] | None]("_KEPT", default=None)


@contextmanager
def copied_once() -> Iterator[None]:
    """While active, what is `copied` again has the memory that it had, where nobody wrote to that or to the tensor."""
    token = _KEPT.set({})
    try:
        yield
    finally:
        _KEPT.reset(token)


@dataclass(frozen=True)
class Copy:
    """A tensor of a module that has a copy in its place.

    holder      where it stands there
    registered  it is a parameter or a buffer, no plain attribute, which may be made anew in each forward
    """

    name: str
    holder: dict[str, Any]
    key: str
    original: Tensor
    copy: Tensor
    version: int
    registered: bool

    @property
    def changed(self) -> bool:
        now = self.holder.get(self.key)
        if now is not self.copy and self.registered:
            return not isinstance(now, Tensor) or not _same(self.original, now)
        return version(self.copy) != self.version or not _same(self.original, self.copy)


@dataclass
class Copies:
    """What `copied` made.

    parameters   by the first name: the identities of the parameter and of its copy
    made_before  nodes of autograd's graph of tensors that are kept, as they are no leaves, by dotted name
    """

    tensors: list[Copy] = field(default_factory=list)
    parameters: dict[str, set[int]] = field(default_factory=dict)
    made_before: dict[Any, str] = field(default_factory=dict)

    def written(self, registered: bool) -> tuple[str, ...]:
        """Which of the parameters and buffers a forward wrote to; or which of the plain attributes."""
        return tuple(one.name for one in self.tensors if one.registered == registered and one.changed)


@contextmanager
def copied(wrapped: nn.Module) -> Iterator[Copies]:
    """While active, modules have copies of their tensors, and draws are for free; all is as it was afterwards."""
    parameters = dict(wrapped.get_submodule("model").named_parameters())
    devices = {p.device for p in wrapped.parameters() if p.device.type == "cuda"}
    copies, made = Copies(), dict[int, Tensor]()
    with attributes_kept(wrapped):
        for path, module in wrapped.named_modules():
            for holder in (*own_tables(module)[:2], vars(module)):
                for key, tensor in list(holder.items()):
                    if isinstance(tensor, Tensor):
                        name, registered = f"{path}.{key}".removeprefix("model."), holder is not vars(module)
                        _copy(copies, made, name, holder, key, tensor, registered)
        copies.parameters = {name: {id(p), id(made.get(id(p)))} for name, p in parameters.items()}
        with torch.random.fork_rng(devices=list(devices)), torch.enable_grad(), evenly():
            yield copies


def resized(example: tuple[Any, Any], size: int) -> tuple[Any, Any]:
    """A batch of `size` of the same samples, repeated where there are fewer; the tensors are copies."""

    def some(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach()
        return leaf[torch.arange(size, device=leaf.device) % leaf.shape[0]] if leaf.ndim else leaf.clone()

    batch: tuple[Any, Any] = pytree.tree_map(some, example)
    return batch


def set_on(wrapped: nn.Module) -> dict[str, Any]:
    """The attributes of the modules of the model that are no parameters, buffers or modules, by dotted name."""
    model = wrapped.get_submodule("model")
    every = ((path, key, value) for path, module in model.named_modules() for key, value in vars(module).items())
    return {f"{path}.{key}".removeprefix("."): value for path, key, value in every}


def is_computed(value: Any) -> bool:
    """Whether there is a tensor in it that autograd follows."""
    leaves = pytree.tree_leaves(value)
    return any(isinstance(leaf, Tensor) and leaf.grad_fn is not None for leaf in leaves)


def _copy(
    copies: Copies,
    made: dict[int, Tensor],
    name: str,
    holder: dict[str, Any],
    key: str,
    tensor: Tensor,
    registered: bool,
) -> None:
    if tensor.grad_fn is not None:
        copies.made_before[tensor.grad_fn] = name
        return
    copy = made.get(id(tensor))
    if copy is None:
        copy = _memory(tensor).requires_grad_(tensor.requires_grad)
        copy = made[id(tensor)] = nn.Parameter(copy, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else copy
    holder[key] = copy
    copies.tensors.append(Copy(name, holder, key, tensor, copy, version(copy), registered))


def _memory(tensor: Tensor) -> Tensor:
    """The values of a tensor in memory of their own, as a new tensor."""
    kept = _KEPT.get()
    if kept is None:
        return tensor.detach().clone()
    found = kept.get(id(tensor))
    if found is None or found.original is not tensor or not found.fits:
        memory = tensor.detach().clone()
        found = kept[id(tensor)] = Kept(tensor, memory, version(memory))
    return found.memory.detach()


def _alike(a: Tensor, b: Tensor) -> bool:
    """The same in every respect that a copy has."""
    layout = a.layout is torch.strided and a.stride() == b.stride()
    return layout and (a.dtype, a.device) == (b.dtype, b.device) and _same(a, b)


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN to NaN; `torch.equal` makes nothing as large as they are."""
    if a.shape != b.shape:
        return False
    return (a.dtype == b.dtype and torch.equal(a, b)) or bool(torch.all((a == b) | ((a != a) & (b != b))))
