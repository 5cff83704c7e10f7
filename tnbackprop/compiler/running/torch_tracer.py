"""What torch.export's tracer has to be asked, and told, where a module is traced as an equal one was before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node, Proxy
from torch.fx.experimental.proxy_tensor import (
    _ModuleStackTracer,
    disable_proxy_modes_tracing,
    get_proxy_slot,
    track_tensor_tree,
)
from torch.multiprocessing.reductions import StorageWeakRef

from ..translate.torch_internals import alone

Around = Callable[[Any, nn.Module, Callable[[], Any], tuple[Any, ...], dict[str, Any]], Any]
"""(tracer, module, run, args, kwargs) -> what the call gives."""


@contextmanager
def module_calls(around: Around) -> Iterator[None]:
    """While active, a call of a module in this thread that torch.export follows is a call of `around`."""
    with alone():
        own, thread = _ModuleStackTracer.call_module, get_ident()

        def call_module(self: Any, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            run = partial(own, self, module, forward, args, kwargs)
            if get_ident() != thread or self.enable_attr_proxy:  # a module that has several paths
                return run()
            return around(self, module, run, args, kwargs)

        try:
            _ModuleStackTracer.call_module = call_module  # type: ignore[assignment, method-assign]
            yield
        finally:
            _ModuleStackTracer.call_module = own  # type: ignore[method-assign]


def unseen() -> AbstractContextManager[None]:
    """While active, nobody follows what is asked of tensors, which takes longer than to ask."""
    found: AbstractContextManager[None] = torch._C.DisableTorchFunction()
    return found


def is_traced(tensor: Tensor) -> bool:
    """Whether it is one of those that are followed: without values, with elements at strides."""
    return isinstance(tensor, FakeTensor) and tensor.layout == torch.strided


def described(tensor: Tensor) -> tuple[Any, ...]:
    """All that tracing sees of a tensor: equal for two where the same operators are called with either."""
    own = (tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_leaf, tensor.is_conj(), tensor.is_neg())
    sizes = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
    return (*own, tensor.ndim, *(size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes))


def memory_of(tensor: Tensor) -> int:
    """Which memory it is in: the same number for views of each other."""
    return int(StorageWeakRef(tensor.untyped_storage()).cdata)  # type: ignore[no-untyped-call]


def node_of(tracer: Any, tensor: Tensor) -> Node | None:
    """The node that makes a tensor."""
    found: Node | None = get_proxy_slot(tensor, tracer, None, lambda slot: slot.proxy.node)
    return found


def another(tensor: Tensor) -> Tensor | None:
    """A tensor of the same kind in memory of its own, which nothing has traced; None where torch would lay it out else.

    It has a history if the other has one.
    """
    assert isinstance(tensor, FakeTensor)
    with disable_proxy_modes_tracing(), tensor.fake_mode:
        made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        if tensor.requires_grad:
            made.requires_grad_()
            made = made if tensor.is_leaf else made.clone()
    return made if described(made) == described(tensor) else None


def track(tracer: Any, tensor: Tensor, node: Node) -> None:
    """From now on the node stands for the tensor."""
    track_tensor_tree(tensor, Proxy(node, tracer), constant=None, tracer=tracer)


def installed(tracer: Any, module: nn.Module) -> bool:
    """Whether it is a part of what is exported, and not one that a function has from elsewhere."""
    try:
        tracer.path_of_module(module)
    except NameError:
        return False
    return True


def modules_around(tracer: Any) -> dict[str, tuple[str, str]]:
    """Where the tracer is: the modules whose forwards run, as nodes have them."""

    def named(kind: Any) -> str:
        return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)

    return {key: (path, named(kind)) for key, (path, kind) in tracer.module_stack.items()}
