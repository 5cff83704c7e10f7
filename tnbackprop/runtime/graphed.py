"""A program recorded as a CUDA graph: one launch for all of its kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import InputError
from ..results import Result

WARM_UP = 2
"""Runs before the recording: handles are made and algorithms are chosen."""


class Graphed:
    """Call it like the program that it was made of, with batches of the size that it was recorded with.

    Where launching kernels takes longer than running them, as with small batches, that is several times faster. Values
    of parameters and buffers are read when it is called: they may change in place. The tensors of a result are
    written over by the next call: clone what is to stay.

    Raises `InputError` for a model that is not on a CUDA device, another batch size, or a parameter that was replaced.
    """

    @torch.no_grad()
    def __init__(
        self,
        function: Callable[[dict[str, Tensor]], Any],
        tensors: Callable[..., dict[str, Tensor]],
        result: Callable[..., Result],
        inputs: frozenset[str],
        example: Mapping[str, Tensor],
    ) -> None:
        device = next(t.device for t in example.values() if t.is_floating_point())
        if device.type != "cuda":
            raise InputError(f"a CUDA graph needs a CUDA device, and the model is on the {device}: call the program")
        self._tensors, self._result, self._inputs = tensors, result, inputs
        self._static = {name: t.clone() if name in inputs else t for name, t in example.items()}
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        main = torch.cuda.current_stream(device)
        stream.wait_stream(main)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                function(dict(self._static))
        main.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = function(dict(self._static))

    @torch.no_grad()
    def __call__(
        self,
        x: Any,
        y: Any = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        operands: Mapping[str, Any] | None = None,
    ) -> Result:
        """Copy the batch in, replay, and give the result; `seed`, `generator` and `operands` as for the program."""
        for name, value in self._tensors(x, y, seed, generator, operands).items():
            static = self._static[name]
            if name not in self._inputs and static.data_ptr() != value.data_ptr():
                raise InputError(f"{name!r} is another tensor than when the graph was recorded: record it again")
            if static.shape != value.shape:
                raise InputError(
                    f"{name!r} has shape {list(value.shape)}, and the graph was recorded with {list(static.shape)}: "
                    "record one for this batch size, or call the program"
                )
            if name in self._inputs:
                static.copy_(value)
        self._graph.replay()
        return self._result(*self._outputs)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a CUDA graph is neither pickled nor copied: it reads memory of this process.\n"
            "  Record it again where it is needed: program.graphed(x, y)"
        )
