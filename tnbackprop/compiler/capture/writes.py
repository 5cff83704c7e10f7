"""What a forward writes to that it did not make: no copy of a module's tensors stands for it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ...errors import UnsupportedError
from ..running.failure import line_here
from ..translate.torch_internals import (
    StorageWeakRef,
    TorchDispatchMode,
    arguments_of,
    is_mutation,
    shares_memory,
    written_arguments,
)


class Undoing(TorchDispatchMode):
    """While active, memory that no operator made is copied before it is written to; at the end it is as it was.

    own  tensors that may be written to
    """

    def __init__(self, own: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made = {_memory(tensor) for tensor in own if _is_dense(tensor)}
        self._before: dict[Any, tuple[Any, Any, str]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_mutation(func):
            for place in written_arguments(func):
                self._keep(args[place] if place < len(args) else kwargs.get(arguments_of(func)[place].name))
        found = func(*args, **kwargs)
        if func is ENTERS or not shares_memory(func):
            self._made.update(_memory(leaf) for leaf in pytree.tree_leaves(found) if _is_dense(leaf))
        return found

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        for storage, before, _ in self._before.values():
            storage.copy_(before)

    def refuse(self, named: Mapping[str, Tensor], others: bool) -> None:
        """Raises `UnsupportedError` where tensors that have a name were written to, or others, where these count."""
        names = {_memory(tensor): repr(name) for name, tensor in named.items() if _is_dense(tensor)}
        for memory, (storage, _, line) in self._before.items():
            if not (memory in names or others):
                continue
            what = names.get(memory) or f"{storage.nbytes()} bytes that it does not make (a global tensor, …)"
            raise UnsupportedError(
                f"the model or the loss writes to {what} during forward: a program changes no other tensors.{line}\n"
                "  Leave the update out of forward, or make the tensor there."
            )

    def _keep(self, tree: Any) -> None:
        for leaf in pytree.tree_leaves(tree):
            if _is_dense(leaf) and (memory := _memory(leaf)) not in self._made and memory not in self._before:
                storage = leaf.untyped_storage()
                self._before[memory] = storage, storage.clone(), line_here()


ENTERS = torch.ops.aten.lift_fresh.default
"""What is called on a tensor that is made of numbers; by its schema it is a view."""


def _is_dense(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.layout is torch.strided


def _memory(tensor: Tensor) -> Any:
    """Equal for tensors that share memory; while it lives, no other has an equal one."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
