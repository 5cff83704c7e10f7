"""Operands: what quantities are handed when a program is called, checked and read as their diagrams read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..compiler import Compiled
from ..compiler.program.cost import size_at
from ..compiler.program.inputs import parameter_shapes
from ..compiler.translate.torch_modes import check_plain
from ..diagram.core import Size
from ..diagram.reading import Reading
from ..errors import InputError

Shape = tuple[Size, ...]
Given = Mapping[str, Tensor | Mapping[str, Tensor]]
"""What a program is handed: a tensor for each key, or one for each parameter."""


class Operands:
    """The operands of a program. They have the dtype and the device of the parameters."""

    def __init__(self, compiled: Compiled) -> None:
        graph = compiled.graph
        self._readings, self._own = compiled.derived.handed, parameter_shapes(graph)
        self._dtypes = {dotted: graph.values[name].dtype for name, (dotted, *_) in graph.parameters.items()}

    @cached_property
    def shapes(self) -> dict[str, Shape | dict[str, Shape]]:
        """Key -> shape, or {parameter: shape}, in the order of the model; a size `N` is the number of samples."""
        found: dict[str, Any] = {}
        for reading in self._readings.values():
            shape = self._shape(reading)
            if reading.parameter:
                found.setdefault(reading.key, {})[reading.parameter] = shape
            else:
                found[reading.key] = shape
        ordered = ((key, by) for key, by in found.items())
        return {key: self._in_order(by) if isinstance(by, dict) else by for key, by in ordered}

    def _in_order(self, by: dict[str, Shape]) -> dict[str, Shape]:
        return {name: by[name] for name in self._own if name in by}

    def _shape(self, reading: Reading) -> Shape:
        return reading.shape(self._own.get(reading.parameter, ()))

    def tensors(self, given: object, batch: int, like: Tensor) -> dict[str, Tensor]:
        """What the emitted function reads of them. Raises `InputError` for other keys, shapes, dtypes or devices."""
        given = {} if given is None else given
        if not isinstance(given, Mapping):
            what = type(given).__name__
            raise InputError(f"operands is {what}: give {{key: tensor}} or {{key: {{parameter: tensor}}}}")
        shapes = self.shapes
        check_keys("operands", given, shapes)
        for key, shape in shapes.items():
            if isinstance(shape, dict):
                by = given[key]
                if not isinstance(by, Mapping):
                    raise InputError(
                        f"operand {key!r} is {type(by).__name__}: it has one of each parameter, {{name: tensor}}"
                    )
                check_keys(f"operand {key!r}", by, shape)
        return {name: self._tensor(reading, given, batch, like) for name, reading in self._readings.items()}

    def _tensor(self, reading: Reading, given: Given, batch: int, like: Tensor) -> Tensor:
        found: Any = given[reading.key]
        tensor: Any = found[reading.parameter] if reading.parameter else found
        what = str(reading)
        if not isinstance(tensor, Tensor):
            raise InputError(f"{what} is {type(tensor).__name__}, not a tensor")
        check_plain(what, tensor)
        dtype = self._dtypes.get(reading.parameter, like.dtype)
        if (tensor.dtype, tensor.device) != (dtype, like.device):
            raise InputError(
                f"{what} is {tensor.dtype} on {tensor.device}, and it is read in {dtype} on {like.device}: convert it, "
                f".to({str(like.device)!r}, {dtype})"
            )
        shape = [size_at(size, batch) for size in self._shape(reading)]
        if list(tensor.shape) != shape:
            told = f"[{', '.join(map(str, self._shape(reading)))}]"
            here = f", here {shape}" if told != str(shape) else ""
            raise InputError(f"{what} has shape {list(tensor.shape)}; it is {told}{here}")
        return tensor.detach().reshape([size_at(size, batch) for size in reading.sizes])

    def examples(self, batch: int, like: Tensor) -> dict[str, Any]:
        """Operands of the right shapes, random numbers that are the same every time: to try the program with."""
        generator = torch.Generator("cpu").manual_seed(0)

        def one(shape: Shape, dtype: torch.dtype) -> Tensor:
            sizes = [size_at(size, batch) for size in shape]
            return torch.rand(sizes, dtype=torch.float64, device="cpu", generator=generator).to(like.device, dtype)

        def each(shape: Shape | dict[str, Shape]) -> Any:
            if not isinstance(shape, dict):
                return one(shape, like.dtype)
            return {name: one(own, self._dtypes[name]) for name, own in shape.items()}

        return {key: each(shape) for key, shape in self.shapes.items()}


def check_keys(what: str, given: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    missing, unknown = [k for k in wanted if k not in given], [k for k in given if k not in wanted]
    if missing:
        raise InputError(f"{what} has nothing for {_listed(missing)}: program.operands tells keys and shapes")
    if unknown:
        known = f"there are {_listed(wanted)}" if wanted else "this program reads none"
        raise InputError(f"{what} has {_listed(unknown)}, which nothing reads: {known}")


def _listed(names: Any) -> str:
    def shown() -> Iterator[str]:
        for k, name in enumerate(names):
            yield repr(name) if k < 4 else "…"
            if k == 4:
                return

    return ", ".join(shown())
