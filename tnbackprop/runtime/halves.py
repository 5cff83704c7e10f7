"""The halves of a program: forward to the model's output, and from what that saves to the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from inspect import signature
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from ..compiler import Compiled
from ..compiler.emit.loaded import load, running
from ..compiler.emit.source import MEMORY
from ..compiler.halved import SAVED, Halved, halved
from ..compiler.translate.torch_internals import version
from ..compiler.translate.torch_modes import own_dtypes
from ..errors import InputError
from .given import floating_of
from .memory.pages import Blocks as Pages

Half = Callable[[dict[str, Tensor], Pages], Any]


class Saved:
    """What the first half of a program leaves for the second: `program.backward(saved, y)`. It may be used again.

    batch    the number of samples
    told     what the saved values are, for people
    like     of the dtype and on the device that everything is computed in
    plan     the plan that ran
    trial    another one, with the whole input to try it on
    nbytes   bytes of memory that it keeps, without parameters, buffers and inputs
    """

    trial: tuple[Any, Mapping[str, Tensor]] | None

    def __init__(
        self,
        owner: object,
        plan: Any,
        tensors: Mapping[str, Any],
        inputs: Mapping[str, Tensor],
        model: Mapping[str, Tensor],
        read: Mapping[str, Tensor],
        batch: int,
        like: Tensor,
        told: Mapping[str, str],
    ) -> None:
        self.told = told
        self.owner, self.plan, self.batch, self.trial = owner, plan, batch, None
        self.like = like.new_empty(())
        self.tensors, self.inputs, self.model = tensors, inputs, model
        self._versions = [(name, t, version(t)) for name, t in named({**tensors, **inputs, **read})]
        self._outside = {t.untyped_storage().data_ptr() for _, t in named({**inputs, **model})}

    @property
    def nbytes(self) -> int:
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for _, t in named(self.tensors)}
        return sum(size for at, size in own.items() if at not in self._outside)

    def check(self, owner: object) -> None:
        """Raises `InputError` where it is of another program, or something that it keeps was written over since."""
        if self.owner is not owner:
            raise InputError("these saved values are of another program: backward takes what its own forward gave")
        for name, tensor, then in self._versions:
            if version(tensor) != then:
                raise InputError(
                    f"{self.told.get(name, name)} was written over in place after forward, and backward needs it as it "
                    "was.\n"
                    "  Clone before you change it, or step the optimiser after backward."
                )

    def __repr__(self) -> str:
        return f"Saved({len(self.tensors)} values, {self.nbytes / 1e6:.3g} MB for {self.batch} samples)"

    def __reduce__(self) -> Any:
        raise TypeError("saved values are not pickled: they belong to a program of this process")


def named(tensors: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with the name of the value that it is, or is in."""
    for name, each in tensors.items():
        if isinstance(each, Tensor):  # a tree of one leaf costs more to walk than all else that is done with it
            yield name, each
        else:
            yield from ((name, leaf) for leaf in pytree.tree_leaves(each) if isinstance(leaf, Tensor))


@dataclass(frozen=True, repr=False)
class Halves:
    """Both functions, made when they are first asked for."""

    compiled: Compiled
    title: str
    valued: bool = True  # whether the value of the loss is a result

    @cached_property
    def cut(self) -> Halved:
        """The sources, and what is saved between them."""
        plan = self.compiled.plan if self.valued else replace(self.compiled.plan, loss=None)
        return halved(self.compiled.graph, self.compiled.derived, plan, self.title)

    def __repr__(self) -> str:
        plan = self.compiled.plan
        return f"Halves({self.cut.bytes(plan.batch, plan.itemsize) / 1e6:.3g} MB saved for {plan.batch} samples)"

    def lines(self, autograd: float | None) -> Iterator[str]:
        """What is saved at the example's batch size, next to what autograd saves (bytes), for people."""
        cut, plan = self.cut, self.compiled.plan
        total = cut.bytes(plan.batch, plan.itemsize)
        for saving in cut.saved.values():
            shape = ", ".join(map(str, saving.value.shape))
            yield f"{saving.value} [{shape}]" + (f", {saving.what}" if saving.what else "")
        theirs = "" if autograd is None else f"; autograd saves {autograd / 1e6:.3g} MB for the loss"
        yield f"{total / 1e6:.3g} MB for {plan.batch} samples{theirs}"

    @cached_property
    def _told(self) -> dict[str, str]:
        """What each saved value is."""
        output = set(self.compiled.plan.output.values())
        values = {name: saving.value for name, saving in self.cut.saved.items()}
        saved = {n: f"the model's output ({v})" if v in output else f"{v} of the model" for n, v in values.items()}
        graph = self.compiled.graph
        own = {name: f"parameter {dotted[0]!r}" for name, dotted in graph.parameters.items()}
        own |= {name: f"buffer {dotted!r}" for name, dotted in graph.buffers.items()}
        return own | {name: f"input {name!r}" for name in graph.inputs} | saved

    @cached_property
    def _forward(self) -> Half:
        return _loaded(self.cut.forward)

    @cached_property
    def _backward(self) -> Half:
        return _loaded(self.cut.backward)

    def forward(
        self,
        of: tuple[object, Any],
        model: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        batch: int,
        pages: Pages,
    ) -> tuple[Any, Saved]:
        """The leaves of the output, and what is saved; `of`: whose it is, and by which plan."""
        like = floating_of({**model, **inputs})
        with running(self.cut.forward, "program.halves.forward"), own_dtypes(like.device), pages.call():
            _, output, results = self._forward({**model, **inputs}, pages)
        own = {name: tensor for name, tensor in model.items() if name in self.cut.own}
        given = {name: tensor for name, tensor in inputs.items() if name in self.cut.given}
        return output, Saved(*of, results[SAVED], given, model, own, batch, like, self._told)

    def backward(self, saved: Saved, rest: Mapping[str, Tensor], pages: Pages) -> Any:
        """(loss, (), results, …), of what was saved and what the loss reads."""
        with running(self.cut.backward, "program.halves.backward"), own_dtypes(saved.like.device), pages.call():
            given = {**saved.model, **saved.inputs, **saved.tensors, **rest}
            return self._backward(given, pages)


def _loaded(source: str) -> Half:
    """The function of a source; it is told where large values go if it asks."""
    function = load(source)
    asks = MEMORY in signature(function).parameters
    return lambda tensors, pages: function(tensors, **({MEMORY: pages.out} if asks else {}))
