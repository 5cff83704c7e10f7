"""Known: what a forward asks of tensors that are the same in every call, a mask in a buffer, the pairs of a range.

While a model is exported no tensor has values, so torch stops where Python asks for one (`.item()`, `if flag:`), or
where a shape depends on one (a boolean mask as an index). What is made of buffers and of no tensor at all gives in each
call what it gave when the example ran. That is found by running it, with a look at what each tensor is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..translate.torch_internals import version
from .assertions import Place, place_called_from
from .torch_calls import lists_as

VALUES = frozenset("item tolist numpy __array__ __bool__ __int__ __float__ __index__".split())
SHAPES = frozenset(
    "nonzero argwhere masked_select combinations repeat_interleave bincount unique unique_consecutive _unique_impl "
    "_return_output _return_inverse _return_counts _consecutive_return_output".split()
)
PICKS = frozenset({"__getitem__", "__setitem__"})
ASKING = VALUES | SHAPES | PICKS
"""Functions by name: those that hand a value to Python, whose shapes depend on values, and that read a mask."""


def _repeated(
    input: Tensor, repeats: Tensor | int, dim: int | None = None, output_size: int | None = None
) -> tuple[Tensor, int | None]:
    times = torch.as_tensor(repeats).expand(input.numel() if dim is None else input.shape[dim])
    return torch.repeat_interleave(times), dim


def _combined(input: Tensor, r: int = 2, with_replacement: bool = False) -> tuple[Tensor, None]:
    return torch.combinations(torch.arange(len(input), device=input.device), r, with_replacement), None


def _selected(input: Tensor, mask: Tensor) -> tuple[Tensor, None]:
    return mask.expand(input.shape).flatten().nonzero().squeeze(1), None


ENTRIES: dict[str, Callable[..., tuple[Tensor, int | None]]] = {
    "repeat_interleave": _repeated,
    "combinations": _combined,
    "masked_select": _selected,
}
"""Functions by name: which entries of their first argument they give, and along which axis; None: of all in a row."""

Origin = frozenset[str] | None
"""The buffers that a tensor is made of; None: also of the data, of parameters or of random numbers."""


@dataclass(frozen=True)
class Answer:
    """What a call gave, or for a call in `PICKS` the index that is read in the place of its own.

    of       the buffers that it is made of
    entries  of a call in `ENTRIES`: the value is which entries of its first argument it gives, and along which axis
    """

    value: Any
    of: frozenset[str]
    entries: bool = False

    def same(self, other: Answer) -> bool:
        return self.of == other.of and _same(self.value, other.value)


Known = Mapping[Place, tuple[Answer | None, ...]]
"""By the place of the call, for each time that it is reached; None where it asks for what is not known."""


class Noticing(TorchFunctionMode):
    """While active, notes what calls give whose tensors are all made of buffers, or of nothing.

    answers  by place, in order
    """

    def __init__(self, data: Iterable[Tensor], buffers: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.answers: dict[Place, list[Answer | None]] = {}
        self._origins: dict[int, Origin] = {}
        self._alive: list[Tensor] = []  # as memory that is free again would be taken for what was there
        for name, buffer in buffers.items():
            self._mark(buffer, frozenset({name}))
        for tensor in data:
            self._mark(tensor, None)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name, before = getattr(func, "__name__", ""), [version(tensor) for tensor in given]
        origin, place = self._of(given), place_called_from() if name in ASKING and given else None
        picked = self._picked(args) if name in PICKS and place is not None else None
        picked = self._entries(ENTRIES[name], args, kwargs) if name in ENTRIES and place is not None else picked
        generators = _generators()
        found = func(*args, **kwargs)
        origin = origin if all(map(torch.equal, generators, _generators())) else None
        for tensor, own in zip(given, before, strict=True):
            if version(tensor) != own:
                self._mark(tensor, origin)
        for leaf in pytree.tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._mark(leaf, origin)
        if place is not None:
            whole = Answer(_copied(found), origin) if origin is not None and name not in PICKS else None
            self.answers.setdefault(place, []).append(whole or picked)
        return found

    def _picked(self, args: tuple[Any, ...]) -> Answer | None:
        """The index without masks that are known: where they are true."""
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        masks = [each for each in index if isinstance(each, Tensor) and each.dtype == torch.bool]
        origin = self._of(masks)
        if not masks or origin is None or not all(mask.ndim for mask in masks):
            return None
        parts = (each.nonzero(as_tuple=True) if any(each is mask for mask in masks) else (each,) for each in index)
        flat = tuple(one for part in parts for one in part)
        plain = all(not isinstance(each, Tensor) or self._of([each]) is not None for each in flat)
        return Answer(_copied(flat), origin) if plain else None

    def _entries(self, of: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer | None:
        """Which entries of data a call gives, where its other arguments tell."""
        others = [each for each in (*args[1:], *kwargs.values()) if isinstance(each, Tensor)]
        origin = self._of(others) if args else None
        return None if origin is None else Answer(_copied(of(*args, **kwargs)), origin, entries=True)

    def _of(self, tensors: Iterable[Tensor]) -> Origin:
        found: frozenset[str] = frozenset()
        for tensor in tensors:
            own = self._origins.get(_memory(tensor), frozenset())
            if own is None:
                return None
            found |= own
        return found

    def _mark(self, tensor: Tensor, origin: Origin) -> None:
        if tensor.numel():
            place = _memory(tensor)
            before = self._origins.get(place, frozenset())
            self._origins[place] = None if before is None or origin is None else before | origin
            self._alive.append(tensor)


class Telling(TorchFunctionMode):
    """While active, calls that are known give what they gave.

    read  the buffers whose values were asked for
    """

    def __init__(self, known: Known) -> None:
        super().__init__()
        self.known, self.read = known, set[str]()
        self._reached: dict[Place, int] = {}

    @contextmanager
    def once(self) -> Iterator[None]:
        """While active, a forward is traced."""
        self._reached.clear()
        with lists_as(self._list), self:
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        answer = self._answer() if name in ASKING else None
        if answer is None:
            return func(*args, **kwargs)
        if answer.entries:
            places, dim = answer.value
            return args[0].flatten()[places] if dim is None else args[0].index_select(dim, places)
        return func(args[0], answer.value, *args[2:], **kwargs) if name in PICKS else _copied(answer.value)

    def _list(self, own: Callable[[Tensor], Any], tensor: Tensor) -> Any:
        answer = self._answer()
        return own(tensor) if answer is None else answer.value

    def _answer(self) -> Answer | None:
        place = place_called_from()
        answers = self.known.get(place, ()) if place is not None else ()
        if place is None or not answers:
            return None
        reached = self._reached.get(place, 0)
        self._reached[place] = reached + 1
        answer = answers[reached % len(answers)]  # torch.export may run a forward again
        self.read |= frozenset() if answer is None else answer.of
        return answer


def agreed(one: Known, other: Known) -> Known:
    """What two runs, of batches of other sizes, say alike: the rest depends on how many samples there are."""
    found: dict[Place, tuple[Answer | None, ...]] = {}
    for place, answers in one.items():
        others = other.get(place, ())
        if len(answers) == len(others):
            pairs = zip(answers, others, strict=True)
            same = tuple(a if a is not None and b is not None and a.same(b) else None for a, b in pairs)
            found |= {place: same} if any(same) else {}
    return found


def _generators() -> list[Tensor]:
    """The states of torch's own, which say whether something was drawn."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else ())]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else id(tensor)


def _copied(value: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, value)


def _same(a: Any, b: Any) -> bool:
    ours, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    found = a == b
    return bool(found.all() if hasattr(found, "all") else found)
