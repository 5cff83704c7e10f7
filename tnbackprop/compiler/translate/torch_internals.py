"""What the compiler reads of torch that torch does not promise, each with a test of its own, and the lock around it.

Nothing else in the compiler names a private part of torch. Exporting changes state that all threads share (kernels,
switches, loggers, the modules of the model): `alone` lets one thread at a time do it.
"""

from __future__ import annotations

import keyword
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._C._functorch import get_unwrapped as get_unwrapped
from torch._C._functorch import is_functorch_wrapped_tensor as is_functorch_wrapped_tensor
from torch._C._functorch import is_gradtrackingtensor as is_gradtrackingtensor
from torch._C._functorch import peek_interpreter_stack as peek_interpreter_stack
from torch._decomp import decomposition_table
from torch._dispatch.python import enable_python_dispatcher
from torch._library.custom_ops import CustomOpDef
from torch._subclasses.fake_impls import get_fast_op_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.fake_tensor import UnsupportedOperatorException as UnsupportedOperatorException
from torch.autograd import forward_ad
from torch.backends import opt_einsum
from torch.fx import graph as fx_graph
from torch.fx.experimental.proxy_tensor import _ModuleStackTracer, make_fx
from torch.fx.experimental.symbolic_shapes import (
    ConstraintViolationError,
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
    free_unbacked_symbols,
)
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.nn.modules import module as module_globals
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode

OpOverload = torch._ops.OpOverload
HigherOrderOperator = torch._ops.HigherOrderOperator
OpOverloadPacket = torch._ops.OpOverloadPacket
PythonNode = torch.autograd.function.BackwardCFunction
"""A node of autograd's graph whose backward is Python: that of an `autograd.Function`."""
READS_GRAPH: Any = Tensor.grad_fn.__get__  # type: ignore[union-attr]
"""The function that a mode sees where the node of a tensor in autograd's graph is read."""
packs_sequences = torch._VF._pack_padded_sequence
"""What `torch.nn.utils.rnn.pack_padded_sequence` calls, as a mode sees it."""
makes_dual = torch._VF._make_dual
"""What `torch.autograd.forward_ad.make_dual` calls, as a mode sees it."""
weight_norm = torch._weight_norm
"""The fused operator that `torch.nn.utils.weight_norm` calls."""

aten = torch.ops.aten
COMPOSITE = DispatchKey.CompositeImplicitAutograd
_LOCK = threading.RLock()


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time; the same thread may enter again. Parametrized tensors that are kept stay as they are."""
    with _LOCK:
        kept = parametrize._cache_enabled, parametrize._cache
        parametrize._cache_enabled, parametrize._cache = 0, {}
        try:
            yield
        finally:
            parametrize._cache_enabled, parametrize._cache = kept


def overload(name: str) -> OpOverload | None:
    """The overload of ATen by its name, "relu" or "slice.Tensor"; None where this version of torch lacks it."""
    packet, _, which = name.partition(".")
    found: OpOverload | None = getattr(getattr(aten, packet, None), which or "default", None)
    return found


def name_of(target: Any) -> tuple[str, str]:
    """The name of an operator without its namespace, and that of the overload: ("slice", "Tensor")."""
    return target._schema.name.split("::")[1], target._overloadname


def space_of(target: Any) -> str:
    """The namespace of an overload, or of all overloads of a name."""
    return str(target.namespace if isinstance(target, OpOverload) else target._qualified_op_name.split("::")[0])


def overload_of(target: Any) -> Any:
    """The overload that a custom operator is, as `torch.library.custom_op` makes it; of anything else itself."""
    return target._opoverload if isinstance(target, CustomOpDef) else target


def of_aten(target: Any) -> bool:
    """Whether it is one of torch's own operators."""
    return isinstance(target, OpOverload) and target.namespace == "aten"


def arguments_of(target: Any) -> Any:
    """The arguments in the schema of an operator: each with name, default_value, has_default_value, kwarg_only."""
    return target._schema.arguments


def written_arguments(target: Any) -> list[int]:
    """The places of the arguments that an operator writes to."""
    arguments = enumerate(target._schema.arguments)
    return [k for k, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def is_mutation(target: Any) -> bool:
    """Whether a call of `target` writes to one of its arguments."""
    return isinstance(target, OpOverload) and target._schema.is_mutable


def shares_memory(target: Any) -> bool:
    """Whether an output of an operator is, or may be, an argument or a part of it, as its schema says."""
    return any(returned.alias_info is not None for returned in target._schema.returns)


@contextmanager
def whole_einsums() -> Iterator[None]:
    """An einsum stays one operator, in whatever order torch would contract it."""
    with alone(), opt_einsum.flags(enabled=False):
        yield


@contextmanager
def any_target() -> Iterator[None]:
    """While active, the code of a graph reads an attribute of any name: torch quotes names by hand, and runs them."""
    with alone():
        before = fx_graph._format_target
        fx_graph._format_target = _target_text
        try:
            yield
        finally:
            fx_graph._format_target = before


def _target_text(base: str, target: str) -> str:
    for name in target.split("."):
        plain = name.isascii() and name.isidentifier() and not keyword.iskeyword(name)
        base = f"{base}.{name}" if plain else f"getattr({base}, {name!r})"
    return base


def decomposed(exported: torch.export.ExportedProgram, parts: Mapping[Any, Any]) -> torch.export.ExportedProgram:
    """The program with these operators made of their parts.

    Without example inputs torch writes no checks of them, which would be code with the keys of a batch in it.
    """
    exported._example_inputs = None
    made: torch.export.ExportedProgram = exported.run_decompositions(dict(parts))
    return made


def composite_kernel(target: Any, *operands: Any) -> Any:
    """What an operator made of others computes, past kernels that `traced_as` put in its place."""
    return target._op_dk(COMPOSITE, *operands)


@contextmanager
def traced_here() -> Iterator[None]:
    """While active, torch.export follows the modules that this thread calls; it patches `nn.Module` for all threads."""
    with alone():
        thread, call, read = threading.get_ident(), _ModuleStackTracer.call_module, _ModuleStackTracer.getattr

        def call_module(self: Any, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return forward(*args, **kwargs)
            return call(self, module, forward, args, kwargs)

        def read_attribute(self: Any, name: str, value: Any, known: Any) -> Any:
            return value if threading.get_ident() != thread else read(self, name, value, known)

        try:
            _ModuleStackTracer.call_module = call_module  # type: ignore[assignment, method-assign]
            _ModuleStackTracer.getattr = read_attribute  # type: ignore[assignment, method-assign]
            yield
        finally:
            _ModuleStackTracer.call_module = call  # type: ignore[method-assign]
            _ModuleStackTracer.getattr = read  # type: ignore[method-assign]


@contextmanager
def traced_as(kernels: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """While active, tracing an operator made of others runs these; the operator stays one node. Eager calls do not."""
    with alone():
        before = {target: dict(target.py_kernels) for target in kernels}
        own = {target: decomposition_table[target] for target in kernels if target in decomposition_table}
        try:
            decomposition_table.update({target: kernels[target] for target in own})
            for target, kernel in kernels.items():
                target.py_kernels[COMPOSITE] = kernel
                target._dispatch_cache.clear()
            yield
        finally:
            decomposition_table.update(own)
            for target, known in before.items():
                target.py_kernels.clear()
                target.py_kernels.update(known)
                target._dispatch_cache.clear()


@contextmanager
def shapes_by(functions: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """While active, operators on tensors without values are what these say, from (own, mode, *operands)."""
    with alone():
        fast = get_fast_op_impls()
        own = {target: fast[target] for target in functions if target in fast}
        try:
            fast.update({target: partial(functions[target], function) for target, function in own.items()})
            yield
        finally:
            fast.update(own)


def traced_below_autograd(
    function: Callable[..., Any], fixed: Sequence[Tensor], batched: Sequence[Any]
) -> torch.fx.GraphModule:
    """The operators that a function of tensors calls, with a symbol for axis 0 of all `batched` ones."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(tensor: Any, dynamic: bool) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        sizes = [DimDynamic.DUCK if dynamic and k == 0 else DimDynamic.STATIC for k in range(tensor.ndim)]
        return mode.from_tensor(tensor, symbolic_context=StatelessSymbolicContext(sizes))

    given = [*(fake(tensor, False) for tensor in fixed), *(fake(tensor, True) for tensor in batched)]
    with alone(), enable_python_dispatcher(), mode:  # what is made of sizes has symbols, too
        return make_fx(function)(*given)


@contextmanager
def guards_of_sizes(told: Callable[[Any], None]) -> Iterator[None]:
    """While active, what tracing takes for granted of a size, in torch's own symbols, is told when it is asked for."""
    with alone():
        own = ShapeEnv._log_guard

        def log(self: Any, prefix: str, asked: Any, *rest: Any, **options: Any) -> None:
            told(asked)
            own(self, prefix, asked, *rest, **options)

        try:
            ShapeEnv._log_guard = log  # type: ignore[assignment, method-assign]
            yield
        finally:
            ShapeEnv._log_guard = own  # type: ignore[method-assign]


@contextmanager
def operators(namespace: str) -> Iterator[torch.library.Library]:
    """A library whose operators are gone afterwards."""
    with alone():
        library = torch.library.Library(namespace, "FRAGMENT")  # type: ignore[no-untyped-call]
        try:
            yield library
        finally:
            library._destroy()  # type: ignore[no-untyped-call]


@contextmanager
def with_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """While active, the module has these for its parameters and buffers, by dotted name."""
    with nn.utils.stateless._reparametrize_module(module, dict(tensors)):
        yield


def backward_hooks(module: nn.Module) -> int:
    """How many functions autograd would call before or after the backward pass of a module."""
    return len(module._backward_hooks) + len(module._backward_pre_hooks)


def forward_hooks(module: nn.Module) -> int:
    """How many functions run before or after the forward of a module."""
    return len(module._forward_hooks) + len(module._forward_pre_hooks)


def global_hooks() -> tuple[Mapping[int, Any], ...]:
    """Functions that run before or after the forward of every module, and those that autograd would call."""
    forward = module_globals._global_forward_hooks, module_globals._global_forward_pre_hooks
    return *forward, module_globals._global_backward_hooks, module_globals._global_backward_pre_hooks


def global_backward_hooks() -> int:
    """How many functions autograd would call before or after the backward pass of every module."""
    return sum(map(len, global_hooks()[2:]))


def hooks_of(tensor: Tensor) -> tuple[Any, Any]:
    """What autograd would call with the gradient of a tensor, before it is added up and afterwards, or None."""
    return tensor._backward_hooks, getattr(tensor, "_post_accumulate_grad_hooks", None)


def tensor_hooks(tensor: Tensor) -> int:
    """How many functions autograd would call with the gradient of a tensor."""
    return sum(len(hooks or ()) for hooks in hooks_of(tensor))


def own_tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A module's own parameters, buffers and modules, also those that are None; to write to, too."""
    return module._parameters, module._buffers, module._modules


def version(tensor: Tensor) -> int:
    """Grows with every operation that writes to the tensor, or to one that shares its memory."""
    return 0 if tensor.is_inference() else tensor._version


def saved_of(node: Any) -> list[Tensor]:
    """What a node of autograd's graph keeps for its derivative. Raises `RuntimeError` where that was written to."""
    kind: Any = type(node)
    named = [getattr(node, name) for name in _saved(kind)]
    kept = named if named else getattr(node, "saved_tensors", ())  # of an autograd.Function
    return [leaf for leaf in pytree.tree_leaves(list(kept)) if isinstance(leaf, Tensor)]


@lru_cache(maxsize=1024)
def _saved(kind: Any) -> tuple[str, ...]:
    return tuple(name for name in dir(kind) if name.startswith("_saved_"))


def has_hooks(tensor: Tensor) -> bool:
    """Whether somebody waits for the gradient of a tensor that is no leaf."""
    return bool(tensor._backward_hooks) or tensor.retains_grad


def in_transform() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def is_in_data(size: Any) -> bool:
    """Whether a size is decided by values of a tensor, of which nothing can be asked."""
    return bool(free_unbacked_symbols(size))


def export_refusals() -> tuple[type[Exception], ...]:
    """What torch.export raises where the graph would depend on data or on one batch size."""
    return GuardOnDataDependentSymNode, torch._dynamo.exc.UserError, ConstraintViolationError  # imports dynamo, slowly


def leaf_of(node: Any) -> Tensor | None:
    """The leaf whose gradient a node of autograd's graph adds up, where it is such a node."""
    return getattr(node, "variable", None)


@contextmanager
def evenly() -> Iterator[None]:
    """While active, what torch.compile made runs as it was written, also where it is traced."""
    inline = torch._dynamo.config.patch(error_on_nested_fx_trace=False)  # imports dynamo, slowly
    with alone(), torch.compiler.set_stance("force_eager"), inline:
        yield
