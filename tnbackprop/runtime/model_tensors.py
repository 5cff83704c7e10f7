"""The model's own tensors, checked at every call against what the program was compiled for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn
from weakref import ref

import torch
from torch import Tensor, nn

from ..compiler.program.cost import size_at
from ..compiler.translate.graph import Graph, Value
from ..compiler.translate.torch_internals import own_tables
from ..compiler.translate.torch_modes import check_plain
from ..errors import InputError


class ModelTensors:
    """Reads the model's parameters and buffers by value name. Each call walks the modules once.

    What only other parameters can break (which are tied, trainable, plain) is looked at where they are not the same
    objects as at the call before, or are trainable otherwise.
    """

    def __init__(self, graph: Graph, others: frozenset[str], loss: object = None) -> None:
        """
        others  trainable parameters that the program is not of
        loss    whose tensors are constants of the graph, read by name where it is a module
        """
        self._others = others
        self._checked: tuple[list[str], list[bool], list[ref[Tensor]]] = [], [], []
        own = (("parameter", name, dotted) for name, (dotted, *_) in graph.parameters.items())
        read = (*own, *(("buffer", name, dotted) for name, dotted in graph.buffers.items()))
        given = _of_loss(loss) if isinstance(loss, nn.Module) else {}
        constants = ((n, c, d) for n, c in graph.constants.items() for d, t in given.items() if _is_one(c, t))
        read = (*read, *(("buffer", name, dotted) for name, _, dotted in constants))
        self._read = [(kind, name, dotted, *_wanted(graph.values[name])) for kind, name, dotted in read]

    def tensors(self, model: nn.Module, loss: object, graph: Graph, parameters: object = None) -> dict[str, Tensor]:
        """By value name; `parameters`: others in the place of some. Raises `InputError` where the model has changed."""
        names, tensors = _walked(model)
        trainable = [tensor.requires_grad for tensor in tensors]
        *before, objects = self._checked
        same = before == [names, trainable] and all(a() is b for a, b in zip(objects, tensors, strict=True))
        if not same or not names:
            for name, tensor in zip(names, tensors, strict=True):
                check_plain(f"{name!r} of the model", tensor)
            check_parameters(model, graph, self._others)
            self._checked = names, trainable, [ref(tensor) for tensor in tensors]
        found = dict(zip(names, tensors, strict=True))
        found |= _of_loss(loss) if isinstance(loss, nn.Module) else {}
        found = found if parameters is None else replaced(found, graph, parameters)
        if other := _other(graph, found):
            raise InputError(
                f"buffer {other!r} has other values now, and the program holds numbers or shapes that are made of "
                "them: compile again"
            )
        return self._by_value(found)

    def _by_value(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = {}
        for kind, name, dotted, dtype, shape in self._read:
            tensor = found.get(dotted)
            if tensor is None:
                raise InputError(f"there is no {kind} {dotted!r} any more: compile again")
            if tensor.dtype != dtype or tensor.shape != shape:
                differs = tensor.dtype != dtype
                what, now, then = ("dtype", tensor.dtype, dtype) if differs else ("shape", [*tensor.shape], [*shape])
                raise InputError(
                    f"{kind} {dotted!r} has {what} {now} now, but the program was compiled for {then}: compile again"
                )
            values[name] = tensor.detach()
        return values


def _is_one(constant: Tensor, tensor: Tensor) -> bool:
    """Whether a constant is a tensor of the loss: it was detached."""
    same = constant.dtype == tensor.dtype and constant.shape == tensor.shape and constant.stride() == tensor.stride()
    return same and tensor.numel() > 0 and constant.data_ptr() == tensor.data_ptr()


def _wanted(value: Value) -> tuple[torch.dtype, tuple[int, ...]]:
    return value.dtype, tuple(int(size_at(size, 1)) for size in value.shape)


def _walked(model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names and tensors of all parameters and buffers, tied ones under each of their names."""
    names: list[str] = []
    tensors: list[Tensor] = []
    rest: list[tuple[str, nn.Module]] = [("", model)]
    for prefix, module in rest:
        *tables, modules = own_tables(module)
        for table in tables:
            for name, tensor in table.items():
                if tensor is not None:
                    names.append(prefix + name)
                    tensors.append(tensor)
        rest += [(f"{prefix}{name}.", child) for name, child in modules.items() if child is not None]
    return names, tensors


def other_buffer(graph: Graph, model: nn.Module, loss: object) -> str:
    """A buffer that has other values than those that a program is made of, or ""."""
    if not graph.fixed:
        return ""
    found = dict(zip(*_walked(model), strict=True))
    return _other(graph, found | (_of_loss(loss) if isinstance(loss, nn.Module) else {}))


def _other(graph: Graph, found: Mapping[str, Tensor]) -> str:
    return next((name for name, value in graph.fixed if name not in found or not _equal(found[name], value)), "")


def _equal(now: Tensor, then: Tensor) -> bool:
    """`torch.equal` refuses tensors of two dtypes or on two devices."""
    return now.dtype == then.dtype and torch.equal(now, then.to(now.device))


def _of_loss(loss: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, tensor in zip(*_walked(loss), strict=True):
        check_plain(f"'loss.{name}' of the model", tensor)
        found[f"loss.{name}"] = tensor
    return found


def check_parameters(model: nn.Module, graph: Graph, others: frozenset[str] = frozenset()) -> None:
    """The model has the parameters that the program was compiled for: the same are tied, and the same trainable.

    others  trainable ones that the program is not of
    """
    names: dict[int, list[str]] = {}
    trainable: dict[str, bool] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        trainable[name] = parameter.requires_grad
    now = {name: frozenset(tied) for tied in names.values() for name in tied}
    then = {name: frozenset(tied) for tied in graph.parameters.values() for name in tied}
    for name in (*then, *now):
        if name not in now:
            raise InputError(f"the model has no parameter {name!r} any more: compile again")
        if name not in then:
            _changed(name, "was not there")
        for other in sorted(then[name] - now[name]):
            _changed(name, f"is no longer the same as {other!r} (tied)")
        for other in sorted(now[name] - then[name]):
            _changed(name, f"is the same as {other!r} now (tied)")
    for value, (first, *_) in graph.parameters.items():
        if first not in others and trainable[first] != graph.values[value].differentiable:
            _changed(first, f"has requires_grad={trainable[first]} now")


def _changed(name: str, what: str) -> NoReturn:
    raise InputError(
        f"parameter {name!r} {what}: the model is not the one that the program was compiled for.\n  Compile again."
    )


def replaced(found: dict[str, Tensor], graph: Graph, parameters: object) -> dict[str, Tensor]:
    """The model's tensors with others in the place of some, by name. Raises `InputError` for names that it has not."""
    if not isinstance(parameters, Mapping):
        raise InputError(f"parameters is {type(parameters).__name__}: give {{name: tensor}}")
    tied = {name: first for first, *others in graph.parameters.values() for name in (first, *others)}
    known = tied | {name: name for name in graph.buffers.values()}
    other, given = dict(found), dict[str, str]()
    for name, tensor in parameters.items():
        if name not in known:
            raise InputError(f"parameters: the model has no parameter or buffer {name!r} that the program reads")
        before = found[known[name]]
        if not isinstance(tensor, Tensor):
            raise InputError(f"parameters: {name!r} is {type(tensor).__name__}, not a tensor")
        check_plain(f"{name!r} of parameters", tensor)
        if (one := given.setdefault(known[name], name)) != name and parameters[one] is not tensor:
            raise InputError(f"parameters: {one!r} and {name!r} are one parameter of the model (tied): give one")
        for what in ("dtype", "shape"):
            now, own = getattr(tensor, what), getattr(before, what)
            if now != own:
                raise InputError(f"parameters: {name!r} has {what} {_told(now)}, the model's {_told(own)}")
        if tensor.device != before.device:
            raise InputError(f"parameters: {name!r} is on {tensor.device}, the model's on {before.device}: move it")
        other[known[name]] = tensor
    return other


def _told(value: object) -> object:
    return [*value] if isinstance(value, torch.Size) else value
