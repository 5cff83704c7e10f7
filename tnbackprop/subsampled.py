"""Programs with quantities of some samples of a batch alone: each is that of a program on these samples' rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .compiler.capture.export import plain
from .compiler.invariants.stage import Stage
from .compiler.program.inputs import specs_of
from .compiler.running.drawing_calls import draws
from .compiler.translate.graph import Graph
from .diagram.core import N
from .errors import InputError, UnsupportedError
from .quantities import Quantity
from .quantities.base import Samples
from .results import Result
from .runtime.graphed import Graphed
from .runtime.halves import Saved
from .runtime.handed import Handed
from .runtime.operands import Given, Shape, check_keys
from .runtime.program import Program


def rows(batch: tuple[Any, ...], graph: Graph, samples: Samples, first: int = 0) -> tuple[Any, ...]:
    """The rows of some samples of (x, y), of (x,), or of (y,) with its number for `first`; of a range they are views.

    Raises `InputError` where there are fewer.
    """
    leaves, spec = pytree.tree_flatten(tuple(map(plain, batch)))
    start = sum(each.num_leaves for each in specs_of(graph)[:first])
    named = dict(zip((k for k in range(graph.in_spec.num_leaves) if k not in graph.absent), graph.inputs, strict=False))
    shapes = (graph.values[named[at]].shape if at in named else () for at in range(start, start + len(leaves)))
    found = [_rows(leaf, shape, samples) for leaf, shape in zip(leaves, shapes, strict=True)]
    made: tuple[Any, ...] = pytree.tree_unflatten(found, spec)
    return made


def _rows(leaf: Any, shape: Collection[Any], samples: Samples) -> Any:
    if not isinstance(leaf, Tensor) or N not in shape:
        return leaf
    axis = list(shape).index(N)
    if max(samples) >= leaf.shape[axis]:
        raise InputError(f"samples={samples}: the batch has {leaf.shape[axis]} samples, numbered from 0")
    if samples == tuple(range(samples[0], samples[0] + len(samples))):
        return leaf.narrow(axis, samples[0], len(samples))
    return leaf.index_select(axis, torch.tensor(samples, device=leaf.device))


def kept_bytes(programs: Sequence[Program]) -> float:
    """What they give, at the example's batch size: it is there while the next one runs."""
    return sum(program.compiled.plan.kept_bytes for program in programs)


def divisible(program: Program, loss: object) -> Graph:
    """The graph of a program, of which other programs may be of some samples. Raises `UnsupportedError`."""
    captured = program.compiled.captured
    assert captured is not None
    if isinstance(loss, Handed):
        raise UnsupportedError(
            "samples= with a cotangent that is handed in: it is that of the whole batch's loss, and some samples have "
            "another.\n  Compile with the loss, or hand in rows of x and their own cotangent."
        )
    drawing = next((call for call in captured.calls if draws(call.target, call.arguments)), None)
    if drawing is not None:
        raise UnsupportedError(
            f"samples= with a model that draws random numbers ({drawing.where}): some samples would have others.\n"
            "  Call model.eval(), or compile a program of its own for these samples."
        )
    return captured


class SavedBoth(Saved):
    """What the first half leaves, of all samples and of some."""

    def __init__(self, whole: Saved, parts: Mapping[Samples, Saved]) -> None:
        self.__dict__ |= whole.__dict__
        self.parts = parts

    @property
    def nbytes(self) -> int:
        return super().nbytes + sum(each.nbytes for each in self.parts.values())


class Subsampled(Program):
    """A program of which some quantities are of some samples of the batch alone.

    whole  the program of all others
    parts  those of these, by their samples
    """

    def __init__(self, whole: Program, parts: Mapping[Samples, Program], quantities: Sequence[Quantity]) -> None:
        self.__dict__ |= whole.__dict__
        self.whole, self.parts = whole, dict(parts)
        self.quantities = {quantity.name: quantity for quantity in quantities}

    @property
    def operands(self) -> Mapping[str, Shape | Mapping[str, Shape]]:
        found = dict(self.whole.operands)
        for part in self.parts.values():
            for key, shape in part.operands.items():
                found.setdefault(key, shape)
        return found

    @property
    def flops(self) -> float:
        return sum(program.flops for program in self.each)

    @property
    def bytes(self) -> float:
        return sum(program.bytes for program in self.each)

    @property
    def peak_bytes(self) -> float:
        return max(kept_bytes(self.each[:k]) + each.peak_bytes for k, each in enumerate(self.each))

    @property
    def each(self) -> tuple[Program, ...]:
        return self.whole, *self.parts.values()

    def some_operands(self, x: Any, y: Any = None) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for program in self.each:
            found = program.some_operands(x, y) | found
        return found

    def explain(self, stage: Stage | str | None = None) -> str:
        texts = [self.whole.explain(stage)]
        for samples, part in self.parts.items():
            title = f"Of samples {', '.join(map(str, samples))}"
            texts += [f"{title}\n{'#' * len(title)}", part.explain(stage)]
        return "\n\n".join(texts)

    def fits(self, size: int) -> bool:
        return self.whole.fits(size) and size > max(max(samples) for samples in self.parts)

    def forward(self, x: Any) -> tuple[Any, Saved]:
        output, saved = self.whole.forward(x)
        some = {samples: part.forward(*self._rows((x,), samples))[1] for samples, part in self.parts.items()}
        return output, SavedBoth(saved, some)

    def backward(
        self,
        saved: Saved,
        y: Any = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        operands: Given | None = None,
    ) -> Result:
        if not isinstance(saved, SavedBoth):
            raise InputError("backward takes what this program's own forward saved, output, saved = program.forward(x)")
        drawn: dict[str, Any] = {"seed": seed, "generator": generator}

        def of(samples: Samples, part: Program, given: Given | None) -> Result:
            return part.backward(saved.parts[samples], *self._rows((y,), samples, first=1), operands=given, **drawn)

        self._check(operands)
        whole = self.whole.backward(saved, y, operands=_mine(self.whole, operands), **drawn)
        return self._joined(whole, of, operands)

    def __call__(
        self,
        x: Any,
        y: Any = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        operands: Given | None = None,
        parameters: Mapping[str, Tensor] | None = None,
        progress: bool = False,
    ) -> Result:
        drawn: dict[str, Any] = {
            "seed": seed, "generator": generator, "parameters": parameters, "progress": progress
        }  # fmt: skip

        def of(samples: Samples, part: Program, given: Given | None) -> Result:
            return part(*self._rows((x, y), samples), operands=given, **drawn)

        self._check(operands)
        whole = self.whole(x, y, operands=_mine(self.whole, operands), **drawn)
        return self._joined(whole, of, operands)

    def _joined(
        self, whole: Result, of: Callable[[Samples, Program, Given | None], Result], operands: Given | None
    ) -> Result:
        """The result with those of some samples."""
        some = {samples: of(samples, part, _mine(part, operands, samples)) for samples, part in self.parts.items()}
        return whole.with_values(whole.loss, whole.output, whole.own, whole.batch, some)

    def _check(self, operands: object) -> None:
        """Every operand is read by a quantity; what each of them is, its program checks."""
        if isinstance(operands, Mapping):
            check_keys("operands", operands, self.operands)

    def _rows(self, batch: tuple[Any, ...], samples: Samples, first: int = 0) -> tuple[Any, ...]:
        return rows(batch, self._compiled.graph, samples, first)

    def graphed(self, x: Any, y: Any = None, operands: Given | None = None) -> Graphed:
        raise UnsupportedError(
            "quantities of some samples are programs of their own: compile each by itself, and record it as a graph"
        )

    def detached(self) -> Program:
        return self._mapped(lambda program: program.detached())

    def attached(self, model: torch.nn.Module, loss: Callable[..., Any] | None) -> Program:
        return self._mapped(lambda program: program.attached(model, loss))

    def _mapped(self, function: Callable[[Program], Program]) -> Program:
        parts = {samples: function(part) for samples, part in self.parts.items()}
        return Subsampled(function(self.whole), parts, list(self.quantities.values()))

    def __copy__(self) -> Program:
        return self._mapped(copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        memo[id(self)] = other = self._mapped(lambda program: deepcopy(program, memo))
        return other

    def __repr__(self) -> str:
        parts = "".join(f", with {part!r} of samples {samples}" for samples, part in self.parts.items())
        return f"{self.whole!r}{parts}"


def with_rows(program: Program, batch: tuple[Any, Any]) -> Iterator[tuple[Program, tuple[Any, ...]]]:
    """Each program that runs on a batch, with its samples."""
    yield program.each[0], batch
    if isinstance(program, Subsampled):
        yield from ((part, rows(batch, program.compiled.graph, own)) for own, part in program.parts.items())


def _mine(program: Program, operands: Given | None, samples: Samples = ()) -> Given | None:
    """The operands that a program reads; of some samples the rows of these."""
    if not isinstance(operands, Mapping):
        return operands
    shapes = {key: shape for key, shape in program.operands.items() if key in operands}
    return {key: _rows(operands[key], shape, samples) if samples else operands[key] for key, shape in shapes.items()}
