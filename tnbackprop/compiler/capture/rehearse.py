"""What running the example shows and an exported graph does not: backward passes and hooks of the user's own, writes.

The model and the loss run once on copies of their tensors, on samples of the example. Autograd's graph of that is what
`loss.backward()` would follow; a program follows formulas, and what differs is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ...errors import InputError, UnsupportedError
from ...notation.rule import Primitive
from ...table import Rules
from ..running.assertions import ASKS, READING, Place, place_of_check
from ..running.failure import line_here
from ..running.failure import place as place_of
from ..running.known import Known, Noticing, agreed
from ..running.printing import SILENT
from ..running.torch_versions import asked_by_checkpoint
from ..translate.foreign import MISTAKES
from ..translate.graph import Graph
from ..translate.opaque import check_output, rule_class
from ..translate.torch_internals import (
    READS_GRAPH,
    OpOverload,
    OpOverloadPacket,
    PythonNode,
    leaf_of,
    makes_dual,
    packs_sequences,
    peek_interpreter_stack,
    space_of,
)
from .exported import ExportError
from .hooks import REPLACED, refuse_hooks, told
from .kept import plain_tensors
from .state import Copies, copied, is_computed, resized, set_on
from .writes import Undoing

SAMPLES = 2
"""As many of the example's run, where the model takes so many; torch.export, too, takes the batch for two or more."""
OPERATOR_SPACES = ("aten", "prims", "prim")
"""Where torch's own operators are; those of other libraries stay one node, with a derivative of their own."""


@dataclass(frozen=True)
class Owner:
    """Which part of the model or of the loss ran. `ruled`: a rule says what its derivative is."""

    text: str
    ruled: bool = False


RULED = Owner("", ruled=True)


class Rehearsal(TorchFunctionMode):
    """While active: whose each node of autograd's graph is, and what was asked of autograd by hand."""

    def __init__(self, wrapped: nn.Module, rules: Rules) -> None:
        super().__init__()
        self.wrapped, self.rules = wrapped, rules
        self.stack = [Owner("the model")]
        self.owners: dict[Any, Owner] = {}
        self.asked: list[tuple[str, Owner]] = []
        self.looking = self.ruled = False
        self.transformed = self.host = ""
        self.checks: dict[Place, bool] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        func, kwargs = READING.get(func, func), kwargs or {}
        if not (self.looking or self.transformed or self.stack[-1].ruled):
            self.transformed = self.transform_of(func)
        if func is packs_sequences and not self.stack[-1].ruled:
            raise UnsupportedError(
                f"packed sequences in {self.stack[-1].text}{line_here()}\n  How long each is is in the data. Give "
                "the padded tensor to the layer, and leave out what is behind the end with torch.where(step < length, "
                "…, 0); or gather() the last step of each."
            )
        if kwargs.get("generator") is not None and not self.stack[-1].ruled:
            raise UnsupportedError(
                f"random numbers of a generator of its own in {self.stack[-1].text}{line_here()}\n  A program has "
                "those of torch's generator, or of seed= and generator= of its call: leave out generator= in forward."
            )
        if not self.host and func in HOST and not (self.looking or self.stack[-1].ruled):
            self.host = f"{HOST[func]} in {self.stack[-1].text}{line_here()}"
        if func in ASKED and not (self.looking or self.stack[-1].ruled or asked_by_checkpoint()):
            self.asked.append((ASKED[func], self.stack[-1]))
        if func is ASKS and (place := place_of_check()) is not None:
            return self.checks.setdefault(place, func(*args, **kwargs))
        if not isinstance(func, OpOverload | OpOverloadPacket) or space_of(func) in OPERATOR_SPACES:
            return func(*args, **kwargs)
        return self.inside(RULED, func, args, kwargs)

    def transform_of(self, func: Callable[..., Any]) -> str:
        """What forward does itself that no graph of calls shows, with its line; "" where it does not."""
        what = DERIVED.get(func, "a transform of torch.func (grad, vjp, jvp, vmap, …)" * bool(peek_interpreter_stack()))
        return f"{what} in {self.stack[-1].text}{line_here()}" if what else ""

    def inside(self, owner: Owner, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a function; what it adds to autograd's graph is the owner's."""
        self.enter(owner, (args, kwargs))
        output = function(*args, **kwargs)
        self.leave(output)
        return output

    def enter(self, owner: Owner, inputs: Any) -> None:
        self.claim(inputs)
        self.ruled |= owner.ruled
        self.stack.append(RULED if self.stack[-1].ruled else owner)

    def leave(self, outputs: Any) -> None:
        self.claim(outputs)
        self.stack.pop()

    def claim(self, tree: Any) -> None:
        """What the tensors were computed by and nobody has claimed is of who runs now."""
        for node in nodes(self.roots(tree), self.owners):
            self.owners[node] = self.stack[-1]

    def roots(self, tree: Any) -> list[Any]:
        self.looking = True
        found = [leaf.grad_fn for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
        self.looking = False
        return found

    def _before(self, owner: Owner, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.enter(owner, (args, kwargs))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.leave(output)

    def _ruled(self, primitive: Primitive, thread: int, *args: Any, **kwargs: Any) -> Any:
        if get_ident() != thread:
            return primitive.function(*args, **kwargs)
        return check_output(str(primitive), self.inside(RULED, primitive.function, args, kwargs))

    @contextmanager
    def followed(self) -> Iterator[None]:
        """While active, modules and primitives say when they start and end."""
        handles, inside = [], set()
        primitives = [target for target in self.rules if isinstance(target, Primitive)]
        try:
            for path, module in self.wrapped.named_modules():
                if module is self.wrapped or module in inside:
                    continue
                ruled = rule_class(module, self.rules) is not None
                inside |= set(module.modules()) if ruled else set()
                owner = RULED if ruled else Owner(told(path, module))
                # The user's own hooks are outside: a rule does not stand for them.
                handles.append(module.register_forward_pre_hook(partial(self._before, owner), with_kwargs=True))
                handles.append(module.register_forward_hook(self._after, prepend=True))
            for primitive in primitives:
                primitive.stand_in = partial(self._ruled, primitive, get_ident())
            yield
        finally:
            for primitive in primitives:
                primitive.stand_in = None
            for handle in handles:
                handle.remove()


ASKED: dict[Any, str] = {
    Tensor.register_hook: "register_hook on a tensor",
    Tensor.register_post_accumulate_grad_hook: "register_post_accumulate_grad_hook on a tensor",
    READS_GRAPH: "reading grad_fn of a tensor (hooks of a node are registered so)",
}
"""What a forward asks of autograd by hand."""


HOST: dict[Any, str] = {
    Tensor.numpy: ".numpy()",
    Tensor.__array__: "numpy",
    Tensor.tolist: ".tolist()",
    Tensor.item: ".item()",
    Tensor.__format__: "a formatted text",
    Tensor.__deepcopy__: "a deep copy",
    Tensor.__float__: "float()",
    Tensor.__int__: "int()",
    torch.equal: "torch.equal",
    torch.allclose: "torch.allclose",
}
"""What hands values of a tensor to Python: a graph has none while it is made."""
DERIVED: dict[Any, str] = {
    torch.autograd.grad: "torch.autograd.grad",
    Tensor.backward: "backward()",
    makes_dual: "forward mode (torch.autograd.forward_ad)",
}
"""What asks for a derivative in a forward."""


ZERO = frozenset(f"{name}Backward{k}" for name in ("Sign", "Sgn", "Floor", "Ceil", "Round", "Trunc") for k in (0, 1))
"""Nodes of autograd's graph whose derivative is zero everywhere."""


def nodes(roots: Iterable[Any], known: Any = (), zero: Collection[str] = ()) -> Iterator[Any]:
    """Every node of autograd's graph above some, each once, without those that are known and what is above them.

    zero  names of nodes above which no others count
    """
    todo, seen = list(roots), set()
    while todo:
        node = todo.pop()
        if node is None or node in seen or node in known:
            continue
        seen.add(node)
        yield node
        if type(node).__name__ not in zero:
            todo.extend(above for above, _ in node.next_functions)


@dataclass(frozen=True)
class Seen:
    """What a rehearsal found that is told once the graph is known.

    written  tensors of the model that a forward writes to, by dotted name
    reached  trainable parameters that autograd has a gradient of
    by_loss  those of which it has one of the loss
    checks   what checks of values gave
    transformed  what forward differentiates or maps itself, with its line, or ""
    ruled    something in it has a rule of its own
    host     what first hands values of a tensor to Python, with its line, or ""
    kept     attributes of modules of the model that are set to what it computes, by dotted name
    """

    written: tuple[str, ...]
    reached: frozenset[str] = frozenset()
    by_loss: frozenset[str] = frozenset()
    checks: dict[Place, bool] = field(default_factory=dict)
    transformed: str = ""
    ruled: bool = False
    host: str = ""
    kept: tuple[str, ...] = ()

    def refuse_host(self, cause: ExportError) -> None:
        if self.host:
            raise UnsupportedError(
                f"{self.host}\n  No tensor has values while the graph of the model is made, so it stops there. Compute "
                "with torch's functions, or leave it out of forward (a print of the tensor itself may stay); or give "
                "the module a rule (examples/add_a_layer.py)."
            ) from cause

    def refuse_writes(self, cause: Exception | None = None) -> None:
        for name in self.written:
            raise UnsupportedError(
                f"the model writes to {name!r} during forward: a program changes no parameter and no buffer. "
                "Call model.eval(), or remove the update"
            ) from cause

    def check(self, graph: Graph) -> None:
        """Raises `UnsupportedError` where forward writes, or the graph lacks a gradient that autograd has."""
        self.refuse_writes()
        ends = [name for name in (graph.loss, *pytree.tree_leaves(graph.output)) if isinstance(name, str)]
        known = frozenset[str]().union(*(graph.values[name].depends_on for name in ends))
        for name in sorted((self.by_loss if graph.left else self.reached) - known):
            raise UnsupportedError(
                f"parameter {name!r} has a gradient, but not in the graph that torch.export makes: forward keeps what "
                "it computed of it for the next call (a cache), or it comes after a no_grad block inside an "
                "autograd.Function (torch.utils.checkpoint with use_reentrant=True is one) and is taken for part of it."
                "\n  Compute it in each call; leave the Function out, or give its module a rule "
                "(examples/add_a_layer.py)."
            )


def rehearse(wrapped: nn.Module, example: tuple[Any, Any], batch: int, rules: Rules, whole: bool = False) -> Seen:
    """Run some samples of the example, or the whole.

    Raises `InputError` where it fails, `UnsupportedError` where autograd follows no formula.
    """
    refuse_hooks(wrapped, rules)
    failed: BaseException | None = None
    for size in (batch,) if whole else dict.fromkeys((SAMPLES, batch)):  # it may take the whole batch only
        try:
            with SILENT if failed else nullcontext():
                return _rehearsed(wrapped, resized(example, size), rules)
        except _Failed as error:
            failed = error.__cause__
    assert failed is not None
    at = place_of(wrapped, failed.__traceback__)
    raise InputError(f"the {at.whole} fails on the example{at.within}: {failed}{at.line}") from failed


def asked_of_constants(wrapped: nn.Module, example: tuple[Any, Any]) -> Known:
    """What the model and the loss ask of tensors that are the same for any samples, in numbers and shapes."""
    runs = []
    for size in (SAMPLES, SAMPLES + 1):
        batch = resized(example, size)
        with copied(wrapped), SILENT:
            data = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor)]
            noticing = Noticing([*data, *wrapped.parameters()], named_buffers(wrapped))
            try:
                with noticing:
                    wrapped(*batch)
            except (RuntimeError, AssertionError, *MISTAKES):  # it takes other sizes only
                return {}
        runs.append({place: tuple(answers) for place, answers in noticing.answers.items()})
    return agreed(*runs)


def named_buffers(wrapped: nn.Module) -> dict[str, Tensor]:
    """By the names that a `ModelTensors` has."""
    return {name.removeprefix("model."): buffer for name, buffer in wrapped.named_buffers()}


class _Failed(Exception):
    """The model or the loss raises what its cause says."""


def _rehearsed(wrapped: nn.Module, example: tuple[Any, Any], rules: Rules) -> Seen:
    with copied(wrapped) as copies:
        rehearsal = Rehearsal(wrapped, rules)
        before, named = set_on(wrapped), plain_tensors(wrapped.get_submodule("model"))
        undoing = Undoing([*pytree.tree_leaves(example), *(one.copy for one in copies.tensors)])
        with rehearsal.followed(), undoing, rehearsal:
            try:
                results = wrapped(*example)
            except (RuntimeError, AssertionError, *MISTAKES) as error:
                raise _Failed from error
        rehearsal.stack = [Owner("the loss")]
        rehearsal.claim(results)
        now = set_on(wrapped)
        kept = tuple(name for name, value in now.items() if before.get(name) is not value and is_computed(value))
        undoing.refuse(named, others=not rehearsal.host)  # copy.deepcopy makes memory unseen
        return replace(_judged(rehearsal, copies, results), kept=kept)


def _judged(rehearsal: Rehearsal, copies: Copies, results: Any) -> Seen:
    for what, owner in rehearsal.asked:
        raise UnsupportedError(f"{what}, in {owner.text}. {REPLACED}")
    reached = list(nodes(rehearsal.roots(results)))
    for node in reached:
        owner = rehearsal.owners[node]
        if isinstance(node, PythonNode) and not owner.ruled:
            raise UnsupportedError(_function(type(node).__name__.removesuffix("Backward"), owner))
        if node in copies.made_before:
            raise UnsupportedError(
                f"{copies.made_before[node]!r} was computed before forward: derivatives by what it was computed from "
                "would be left out.\n  Compute it in forward, or detach() it."
            )
    Seen(copies.written(registered=False)).refuse_writes()  # torch.export would write to those, too
    leaves = [{id(leaf_of(n)) for n in nodes(rehearsal.roots(own), zero=ZERO)} for own in (results, results[0])]
    reached_by, by_loss = (frozenset(name for name, ids in copies.parameters.items() if ids & own) for own in leaves)
    own = rehearsal.checks, rehearsal.transformed, rehearsal.ruled, rehearsal.host
    return Seen(copies.written(registered=True), reached_by, by_loss, *own)


def _function(name: str, owner: Owner) -> str:
    if name == "CheckpointFunction":
        return f"torch.utils.checkpoint in {owner.text} has a backward of its own.\n  Pass use_reentrant=False to it."
    return f"autograd.Function {name!r} in {owner.text} has a backward of its own. {REPLACED}"
