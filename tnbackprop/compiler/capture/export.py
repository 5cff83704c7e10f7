"""From a module, a loss and an example batch to a frozen `Graph` with a symbolic batch size."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from ...errors import InputError, TnError, UnsupportedError
from ...quantities import InputGrad, Quantity
from ...table import Rules
from ..running.assertions import Answering
from ..running.known import Telling
from ..running.numbers import numbers_of_sizes
from ..running.printing import SILENT
from ..running.repeated import Repeats
from ..running.torch_versions import WholeHeads
from ..translate.graph import Graph
from ..translate.inputs import refuse_complex
from ..translate.opaque import named_tensors
from ..translate.sizes import first_broken
from ..translate.torch_internals import alone, peek_interpreter_stack
from ..translate.torch_modes import check_plain, device_of_module, own_dtypes
from .exported import Exported, ExportError, OneSizeError, exported
from .one_sample import least_batch
from .outputs import as_tree
from .rehearse import SAMPLES, Seen, asked_of_constants, named_buffers, rehearse
from .state import copied_once, resized
from .transformed import cannot, transformed
from .translate import translate

Loss = Callable[..., Any]

EXPORT_SIZES = (3, 5, 7, 11, 13, 17, 19, 23)
"""Batch sizes to export with where the example's own cannot stand for every size."""

MOST = 65535
"""Samples up to which torch takes cuDNN for a batch norm; what it does for more is not asked."""


class Wrapped(nn.Module):
    """(x, y) -> (loss, output), with the model and the loss as submodules."""

    def __init__(self, model: nn.Module, loss: Loss | None, named: bool) -> None:
        super().__init__()
        self.model = model
        self.loss = loss
        self.named = named
        self.training = model.training

    def forward(self, x: Any, y: Any) -> tuple[Any, Any]:
        args, kwargs = model_arguments(self.model, x, self.named)
        output = self.model(*args, **kwargs)
        return (None if self.loss is None else self.loss_of(output, y)), as_tree(output)

    def loss_of(self, output: Any, y: Any) -> Any:
        assert self.loss is not None
        return self.loss(output, y)


def capture(model: nn.Module, loss: Loss | None, example: tuple[Any, Any], rules: Rules) -> Graph:
    """The graph of ``(loss(model(x), y), model(x))`` that holds for every batch size N >= 1.

    x and y are tensors or trees of tensors with the batch first; a tuple x gives positional arguments, a
    dict x keyword arguments where forward takes its names. Dropout and batch norm are captured in the mode the
    modules are in, and dtypes are those of the tensors, whatever autocast says. Raises InputError where the example
    does not fit the model, UnsupportedError where samples are mixed or the graph depends on the data or on one batch
    size.
    """
    check_instances(model, loss)
    _check_model(model)
    _check_scripted(loss, "loss")
    if loss is not None and not callable(loss):
        raise InputError(f"loss is {type(loss).__name__}: pass a function (output, y) -> scalar, a module, or None")
    if isinstance(loss, nn.Module):
        _check_loss(model, loss)
    if not isinstance(example, tuple | list) or len(example) != 2:
        raise InputError("example must be the pair (x, y)")
    x, y = _distinct((plain(example[0]), plain(example[1])))
    _check_transforms(model, (x, y))
    batch = batch_size((x, y))
    with alone(), own_dtypes(device_of_module(model)), torch.inference_mode(False), WholeHeads(), copied_once():
        wrapped = Wrapped(model, loss, takes_names(model, example[0]))
        seen = rehearse(wrapped, (x, y), batch, rules)
        with SILENT:
            return _captured(wrapped, (x, y), batch, rules, seen)


def _captured(wrapped: Wrapped, example: tuple[Any, Any], batch: int, rules: Rules, seen: Seen) -> Graph:
    """With equal modules traced once; each by itself where that graph is not what the model does, or there is none.

    What torch.export asks of buffers and other constants is told only then, as they are run once more for it; and what
    makes Python numbers of sizes is given sizes.
    """
    repeated: list[Repeats] = []
    try:
        return _compared(wrapped, example, batch, rules, seen, repeated)
    except TnError as error:
        refused = error
    telling = Telling(asked_of_constants(wrapped, example))
    modules = refused.modules if isinstance(refused, OneSizeError) else ()
    if not (telling.known or modules or any(each.count or each.inside for each in repeated)):
        raise refused
    with numbers_of_sizes(modules):
        graph = _compared(wrapped, example, batch, rules, seen, telling=telling)
    buffers = named_buffers(wrapped)
    return replace(graph, fixed=tuple((name, buffers[name].detach().clone()) for name in sorted(telling.read)))


def _compared(
    wrapped: Wrapped,
    example: tuple[Any, Any],
    batch: int,
    rules: Rules,
    seen: Seen,
    repeated: list[Repeats] | None = None,
    telling: Telling | None = None,
) -> Graph:
    telling = telling or Telling({})
    answering = Answering(seen.checks)
    try:
        with answering:
            graph, found = _any_size(wrapped, example, batch, rules, seen, telling, repeated)
    except (InputError, ExportError) as error:  # it ran without torch.export: what it writes to may be why
        seen.refuse_writes(error)
        if isinstance(error, ExportError):
            seen.refuse_host(error)
        raise
    if first_broken(graph.conditions, SAMPLES) is not None:  # what was rehearsed is another branch
        seen = rehearse(wrapped, example, batch, rules, whole=True)
    seen.check(graph)
    return _with_least(replace(graph, unchecked=answering.lines, kept=seen.kept), wrapped, found, example)


def check_instances(model: object, loss: object) -> None:
    """Raises `InputError` for a class in the place of what is made of it."""
    for name, given in (("model", model), ("loss", loss)):
        if isinstance(given, type):
            raise InputError(f"{name} is the class {given.__name__}: give an instance, {given.__name__}(…)")


def _check_scripted(model: object, what: str) -> None:
    """No part of a model or a loss that torch.jit runs."""
    for path, module in model.named_modules() if isinstance(model, nn.Module) else iter([("", model)]):
        if isinstance(module, torch.jit.ScriptModule | torch.jit.ScriptFunction):
            where = f"module {path!r} of the {what}" if path else f"the {what}"
            raise InputError(
                f"{where} is scripted or traced by torch.jit: nobody sees what it calls.\n  Give it as it was before."
            )


def _check_model(model: nn.Module) -> None:
    """A module whose tensors have shapes, and that has no backward pass of its own around it."""
    if not isinstance(model, nn.Module):
        raise InputError(
            f"model is {type(model).__name__}, not a torch.nn.Module: quantities are of the parameters of a module.\n  "
            "Call the function in the forward of a module that has them."
        )
    _check_scripted(model, "model")
    for path, module in model.named_modules():
        kind = next((cls.__name__ for cls in type(module).__mro__ if cls.__name__ in WRAPPERS), "")
        if kind:
            where = f"module {path!r}" if path else "the model"
            raise InputError(
                f"{where} is wrapped in {kind}, which {WRAPPERS[kind]}.\n  Give what it wraps: "
                f"model{'.' * bool(path)}{path}.module. Each process has its own program, for its own batch."
            )
    check_shapes(model)
    for name, tensor in named_tensors(model).items():
        if isinstance(tensor, nn.Parameter):  # a buffer is read as it is
            refuse_complex(name, tensor)


WRAPPERS = {
    "DataParallel": "runs copies of it on several devices",
    "DistributedDataParallel": "averages gradients over processes while it goes backward",
    "FullyShardedDataParallel": "has its parameters in pieces on several processes",
}
"""Classes by name: some of them are imported only where torch was built with them."""


def check_shapes(model: nn.Module) -> None:
    """Raises `InputError` for a lazy module that has not run."""
    for name, tensor in named_tensors(model).items():
        if is_lazy(tensor):
            raise InputError(f"{name!r} has no shape yet: run the model on a batch once, model(x)")


def _check_transforms(model: nn.Module, example: tuple[Any, Any]) -> None:
    """Tensors are plain ones: no part of a derivative that someone else takes, none that no derivative can have."""
    for name, tensor in named_tensors(model).items():
        check_plain(f"{name!r} of the model", tensor)
        if tensor.is_inference():
            raise InputError(
                f"{name!r} of the model was made in inference mode, so torch takes no derivatives of what reads it:\n"
                "  make the model outside of torch.inference_mode()"
            )
    for path, leaf in pytree.tree_flatten_with_path(example)[0]:
        if isinstance(leaf, Tensor):
            name = ("x" if path[0] == pytree.SequenceKey(0) else "y") + pytree.keystr(path[1:])
            check_plain(name, leaf)
            if leaf.layout is not torch.strided or leaf.is_nested:
                raise UnsupportedError(f"{name} is {told_layout(leaf)}: give dense tensors, .to_dense()")
    if peek_interpreter_stack() is not None:
        raise UnsupportedError(
            "compiling inside a torch.func transform (grad, vjp, jvp, jacrev, vmap, …), whose tensors the model or the "
            "loss may read:\n  compile outside, and call the program there"
        )


def _check_loss(model: nn.Module, loss: nn.Module) -> None:
    """Results are by the model's parameters: one of the loss would have none, and nobody would see that."""
    known = {id(p) for p in model.parameters()}
    own = [name for name, p in loss.named_parameters() if p.requires_grad and id(p) not in known]
    if own:
        raise InputError(
            f"the loss {type(loss).__name__} has trainable parameters of its own, {', '.join(own)}: results are by "
            "those of the model.\n  Make them parameters of the model, or requires_grad_(False) on them."
        )


def check_trainable(model: object, quantities: Sequence[Quantity]) -> None:
    """Quantities are of parameters, or of inputs: a result without one entry is a slip. Raises `InputError`."""
    quantities = [quantity for quantity in quantities if not isinstance(quantity, InputGrad)]
    if not quantities or not isinstance(model, nn.Module) or any(p.requires_grad for p in model.parameters()):
        return
    name, what = type(model).__name__, ", ".join(quantity.name for quantity in quantities)
    frozen = sum(1 for _ in model.parameters())
    if frozen:
        raise InputError(
            f"{what}: all {frozen} parameters of {name} are frozen, so there is nothing to differentiate by.\n"
            "  requires_grad_(True) on those that the quantities are of."
        )
    raise InputError(
        f"{what}: {name} has no parameters, so there is nothing to differentiate by.\n"
        "  For derivatives by its input, make that a parameter: a module that adds it, before this one."
    )


def model_arguments(model: nn.Module, x: Any, named: bool | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """How x is passed to the model: a tuple as positional arguments, a dict as keyword arguments that forward takes.

    named   what `takes_names` says of x as it was given, where `plain` has made a dict of it
    """
    if isinstance(x, tuple | list):
        return tuple(x), {}
    if takes_names(model, x) if named is None else named:
        return (), dict(x)
    return (x,), {}


def takes_names(model: nn.Module, x: Any) -> bool:
    """Whether the entries of x are keyword arguments: a mapping whose keys forward names, or a dict if it takes any.

    A forward(*args, **kwargs), which only hands on, gets mappings of other types as one argument.
    """
    if not isinstance(x, Mapping) or not all(isinstance(key, str) for key in x):
        return False
    parameters = inspect.signature(model.forward).parameters.values()
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    kinds = {p.kind for p in parameters}
    hands_on = inspect.Parameter.VAR_POSITIONAL in kinds and not isinstance(x, dict)
    return set(x) <= names or (inspect.Parameter.VAR_KEYWORD in kinds and not hands_on)


def plain(tree: Any) -> Any:
    """Mappings that torch's pytree does not know (a tokenizer's BatchEncoding) as dicts."""
    if isinstance(tree, Mapping):
        return {key: plain(value) for key, value in tree.items()}
    return tree


def told_layout(tensor: Tensor) -> str:
    """Of what is not dense: "sparse (torch.sparse_coo)"."""
    return "a nested tensor" if tensor.is_nested else f"sparse ({tensor.layout})"


def batch_size(example: tuple[Any, Any]) -> int:
    """The common size of axis 0 of every tensor with axes; InputError where there is none."""
    sizes: dict[str, int] = {}
    for path, leaf in pytree.tree_flatten_with_path(example)[0]:
        name = ("x" if path[0] == pytree.SequenceKey(0) else "y") + pytree.keystr(path[1:])
        if leaf is not None and not isinstance(leaf, Tensor):
            raise InputError(f"{name} is {type(leaf).__name__}: pass tensors (bind other options to the model)")
        if leaf is not None and leaf.is_complex():
            raise UnsupportedError(f"{name} is complex: complex tensors are not supported")
        if leaf is not None and leaf.ndim:
            sizes[name] = leaf.shape[0]
    if not sizes:
        raise InputError("the example has no tensor with a batch axis (axis 0)")
    first, batch = next(iter(sizes.items()))
    for name, size in sizes.items():
        if size != batch:
            raise InputError(
                f"{first} has batch size {batch} but {name} has {size}: axis 0 of every input is the batch"
            )
    if batch == 0:
        raise InputError(f"the example batch is empty ({first} has size 0 on axis 0)")
    return batch


def _any_size(
    wrapped: Wrapped,
    example: tuple[Any, Any],
    batch: int,
    rules: Rules,
    seen: Seen,
    telling: Telling,
    repeated: list[Repeats] | None,
) -> tuple[Graph, Exported]:
    """Export for any size; else for the sizes that do what the example's does; else with one that nothing else has.

    repeated  what was found of equal modules is put there; None: every module is traced
    """
    taken = {size for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor) for size in leaf.shape[1:]}
    taken |= {size for parameter in wrapped.parameters() for size in parameter.shape}
    other = next((size for size in EXPORT_SIZES if size not in taken | {batch}), 29)
    own, others = resized(example, other) if batch == 1 else example, resized(example, other)
    source = transformed(wrapped, own, seen.transformed, seen.ruled) if seen.transformed else wrapped
    any_size, some = _batch_dimension(batch), torch.export.Dim.DYNAMIC
    refused: OneSizeError | ExportError | None = None
    for used, dimension in ((own, any_size), (own, some), (others, any_size), (others, some)):
        repeats = None if repeated is None else Repeats()
        if repeated is not None and repeats is not None:
            repeated.append(repeats)
        try:
            with telling.once():
                found = exported(source, used, rules, dimension, repeats)
        except (OneSizeError, ExportError, InputError) as error:
            if isinstance(error, InputError) and refused is None:
                raise
            refused = refused or error  # type: ignore[assignment]
            continue
        # Another size tells whether the example's own is to blame; translating names the op where torch names a guard.
        graph = translate(source, found.program, found.opaque, example, batch)
        graph = replace(graph, conditions=found.conditions)
        if first_broken(graph.conditions, batch) is None:
            return graph, found
    assert refused is not None
    if seen.transformed:
        raise cannot(seen.transformed) from refused
    raise refused


def _with_least(graph: Graph, wrapped: Wrapped, found: Exported, example: tuple[Any, Any]) -> Graph:
    """The graph with the least batch size that it holds for."""
    least = least_batch(wrapped, found, example)
    if graph.example_batch < least:
        raise OneSizeError(
            "the model or the loss does something else for one sample (a branch on the batch size): the graph must "
            f"hold for any.\n  Compile with an example of {least} samples or more, or do not branch on x.shape[0]."
        )
    return replace(graph, least=least)


def _batch_dimension(batch: int) -> Any:
    """Any size; torch on a GPU has other kernels, not other numbers, for more samples than `MOST`."""
    return torch.export.Dim("batch", max=MOST if batch <= MOST else sys.maxsize - 1)  # slices end at sys.maxsize


def _distinct(example: tuple[Any, Any]) -> tuple[Any, Any]:
    """A tensor that appears twice as two: torch.export reads all appearances of one object from the last input.

    One that was made in inference mode as a copy, for torch takes no derivatives with it.
    """
    seen: set[int] = set()

    def copy(leaf: Any) -> Any:
        repeated = isinstance(leaf, Tensor) and (id(leaf) in seen or leaf.is_inference())
        seen.add(id(leaf))
        return leaf.detach().clone() if repeated else leaf

    distinct: tuple[Any, Any] = pytree.tree_map(copy, example)
    return distinct
