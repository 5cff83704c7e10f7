"""The two halves of a program around a user's own `backward()`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ..compiler.program.inputs import of_loss
from ..compiler.running.torch_calls import call_of, called, is_one, keeps_graph, replace_call
from ..compiler.translate.torch_internals import has_hooks, in_transform, version
from ..errors import InputError, UnsupportedError
from ..quantities import Grad, InputGrad
from ..results import Result
from ..runtime.halves import Saved
from ..runtime.handed import Handed
from ..runtime.program import Program
from .arguments import as_compiled
from .replaced import Replaced, taken_away

MODEL, LOSS = "the model", "the loss"
ELSE = """\
attach: the program has a loss of its own, and something else was made of the model's output, too.
  Call that loss on the output itself (`attached.loss` where it is a function), and nothing else; for several terms
  compile with loss=tn.HANDED, or with one loss of all of them: y may be a tuple."""
HOOKED = """\
attach: the model's output has a hook, or retains its gradient, and a program with a loss of its own gives none there.
  Compile with loss=tn.HANDED, or leave the hook out."""
TWICE = """\
attach: the gradient is to be differentiated again (create_graph=True), and that of a program has no derivative.
  Take such a step outside of the block."""
BATCHED = """\
attach: many cotangents come at once (is_grads_batched=True, jacobian(vectorize=True)), and a program takes one.
  Take them one after the other, or outside of the block."""


@dataclass(eq=False)
class _Call:
    """One call of the model.

    inputs   the leaves of what it was given
    trained  the parameters that require grad, by name
    leaves   of the output; what is no tensor as it is
    losses   how many of it have been called and not yet gone back
    """

    inputs: list[Any]
    trained: dict[str, Tensor]
    saved: Saved | None = None
    spec: Any = None
    leaves: tuple[Any, ...] = ()
    losses: int = 0

    @property
    def tensors(self) -> list[int]:
        """Which leaves are tensors."""
        return [at for at, leaf in enumerate(self.leaves) if leaf is TENSOR]


ABSENT = object()
"""In the place of an attribute that is not there."""
TENSOR = object()
"""Stands for a tensor among the leaves of a call: the tensors themselves keep it alive."""


class Attached:
    """While it is entered, calling the model is the first half of a program, and autograd calls the second.

    results  what came of each backward pass, in order; `result` is the last. They stay after it is left
    loss     of a program with a loss of its own: call it in the place of a loss that is a function
    """

    def __init__(self, program: Program) -> None:
        if not isinstance(program, Program):
            raise InputError(f"attach: {type(program).__name__} is no program: give what tn.compile gave")
        if not isinstance(program.model, nn.Module):
            raise InputError("attach: the program has no model any more: take one that tn.compile gave")
        grads = [q.name for q in program.quantities.values() if type(q) is Grad]
        self._inputs = next((q.name for q in program.quantities.values() if type(q) is InputGrad), "")
        if not grads and not (self._inputs and not any(p.requires_grad for p in program.model.parameters())):
            raise InputError("attach: the program has no tn.Grad(), and .grad is what backward leaves: compile with it")
        if program.others:
            raise InputError(
                f"attach: the program is not of {min(program.others)!r}, which requires grad and would get none: "
                "freeze it, requires_grad_(False), or compile with all parameters"
            )
        if program.operands:
            raise InputError(
                f"attach: {next(iter(program.operands))!r} is handed in at a call of the program, and backward hands "
                "in nothing: leave out the quantities that read operands"
            )
        self.program, self.results = program, list[Result]()
        self._grad = next(iter(grads), "")
        self._calls: Any = WeakIdKeyDictionary()  # tensor of an output -> the call that gave it, and its place there
        self._mine: dict[str, Replaced] = {}
        self._kept: list[tuple[dict[str, Any], str, Any]] = []  # attributes, one that forward sets, its value

    @property
    def result(self) -> Result:
        """Of the last backward pass."""
        if not self.results:
            raise InputError(
                "attach: no backward pass has run through the model yet: call the model itself, not its forward, nor "
                "what torch.compile made of it"
            )
        return self.results[-1]

    def _modules(self) -> Iterator[tuple[str, nn.Module, Callable[..., Any]]]:
        """What runs something else in the block, and what."""
        yield MODEL, self.program.model, self._forward
        if isinstance(self.program.loss, nn.Module):
            yield LOSS, self.program.loss, self.loss

    def __enter__(self) -> Attached:
        for what, module, _ in self._modules():
            if type(module).__call__ is not nn.Module.__call__:
                raise InputError(
                    f"attach: {type(module).__name__} has a __call__ of its own, which runs around forward: give the "
                    f"program {what} that it wraps, or write that into forward"
                )
        if isinstance(call_of(self.program.model), Replaced):
            raise InputError("attach: the model is attached to a program already: leave that block first")
        for name in self.program.compiled.graph.kept:
            path, _, key = name.rpartition(".")
            own = vars(self.program.model.get_submodule(path))
            self._kept.append((own, key, own.get(key, ABSENT)))
        for what, module, call in self._modules():
            before = call_of(module)
            self._mine[what] = Replaced(call, before, called(module, before))
            replace_call(module, self._mine[what])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for what, module, _ in self._modules():
            if (mine := self._mine.pop(what, None)) is not None:
                taken_away(module, mine)
        self._bring_back()
        self._kept.clear()

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or in_transform():
            self._bring_back()
            return self._mine[MODEL].plain(*args, **kwargs)
        leaves, spec = pytree.tree_flatten(as_compiled(self.program, args, kwargs))
        if _moving(enumerate(leaves)) is not None and not self._inputs:
            raise InputError(
                "attach: an input requires grad, and the program has no gradient by inputs: compile with "
                "tn.InputGrad() among the quantities"
            )
        call = _Call(leaves, {name: p for name, p in self.program.model.named_parameters() if p.requires_grad})
        run: Callable[..., tuple[Tensor, ...]] = _Model.apply
        tensors = run(self, call, spec, len(leaves), *leaves, *call.trained.values())
        found = list(call.leaves)
        for at, tensor in zip(call.tensors, tensors, strict=True):
            found[at] = tensor
            self._calls[tensor] = call, at
        self._let_go()
        return pytree.tree_unflatten(found, call.spec)

    def _let_go(self) -> None:
        """What a forward keeps on modules is of another call: gone, so that nobody takes it for that of this one."""
        for own, key, _ in self._kept:
            own.pop(key, None)

    def _bring_back(self) -> None:
        """As it was, where a forward of the model itself may read it."""
        for own, key, value in self._kept:
            if value is not ABSENT:
                own.setdefault(key, value)

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The program's loss. Its backward pass gives the program's results, and `.grad` times what arrives."""
        loss = self.program.loss
        if loss is None or isinstance(loss, Handed):
            raise InputError("attach: the program has no loss of its own: call yours on the output of the model")
        own: Callable[..., Tensor] = self._mine[LOSS].plain if LOSS in self._mine else loss
        of = loss.forward if isinstance(loss, nn.Module) else loss
        given = tuple(inspect.signature(of).bind(*args, **kwargs).arguments.values()) if kwargs else args
        if not torch.is_grad_enabled() or in_transform() or (call := self._call_of(given[:1])) is None:
            return own(*args, **kwargs)
        if len(given) != 2:
            raise InputError(f"attach: the loss gets {len(given)} arguments; it was compiled as loss(output, y)")
        output, y = given
        if _moving(enumerate(pytree.tree_leaves(y))) is not None:
            raise InputError(
                "attach: y requires grad, and a program has no gradient by it: detach it, or compile with "
                "loss=tn.HANDED"
            )
        value = own(pytree.tree_map(_detached, output), y)
        if value.requires_grad:
            raise InputError(
                "attach: the loss reads a tensor that requires grad besides the output, and a program has no gradient "
                "by it: detach it, or compile with loss=tn.HANDED"
            )
        call.losses += 1
        run: Callable[..., Tensor] = _Loss.apply
        tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        return run(self, call, value, tensors, y, *call.inputs, *call.trained.values())

    def _call_of(self, given: tuple[Any, ...]) -> _Call | None:
        """The call whose output this is; None for what has nothing of one. Raises `UnsupportedError` for a part."""
        leaves, spec = pytree.tree_flatten(given[0] if given else None)
        known = {at: self._calls.get(leaf) for at, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
        call: _Call | None = next((found[0] for found in known.values() if found is not None), None)
        if call is None:
            return None
        shown = [TENSOR if at in known else leaf for at, leaf in enumerate(leaves)]
        if spec != call.spec or shown != list(call.leaves) or any(known[at] != (call, at) for at in known):
            raise UnsupportedError(ELSE)
        if any(has_hooks(leaves[at]) for at in known):
            raise UnsupportedError(HOOKED)
        return call

    def backward(
        self, call: _Call, y: Any, reached: frozenset[str], factor: Tensor | None = None, value: Tensor | None = None
    ) -> list[Tensor | None]:
        """Runs the second half: the gradients of the leaves of the input, then those of the parameters, times a factor.

        reached  the parameters that what arrives depends on: others have None, as autograd leaves them
        value    what the loss gave in the block
        """
        if call.saved is None:
            raise InputError(
                "attach: backward runs a second time through a call of the model, whose saved values are gone:\n  "
                "retain_graph=True in the first one keeps them"
            )
        result = self.program.backward(call.saved, y)
        if value is not None and result.loss is not None and not self.program.compiled.draws:
            _check_value(value, result.loss)
        self.results.append(result)
        call.losses -= 1
        call.saved = call.saved if keeps_graph() or call.losses > 0 else None
        grads = (result[self._grad][name] if name in reached else None for name in call.trained)
        found = [*self._inputs_of(result, len(call.inputs)), *grads]
        return [each if each is None or factor is None else each * factor for each in found]

    def _inputs_of(self, result: Result, leaves: int) -> list[Tensor | None]:
        if not self._inputs:
            return [None] * leaves
        graph, by = self.program.compiled.graph, result[self._inputs]
        names = iter(name for name in graph.inputs if name not in of_loss(graph))
        return [None if at in graph.absent else by.get(next(names)) for at in range(leaves)]

    @cached_property
    def outputs(self) -> list[frozenset[str]]:
        """The parameters that each leaf of the output depends on."""
        return [self._upstream(leaf) for leaf in pytree.tree_leaves(self.program.compiled.graph.output)]

    @cached_property
    def of_loss(self) -> frozenset[str]:
        """Those that the program's own loss depends on."""
        return self._upstream(self.program.compiled.graph.loss)

    def _upstream(self, value: object) -> frozenset[str]:
        known = self.program.compiled.graph.values
        return known[value].depends_on if isinstance(value, str) else frozenset()

    def __repr__(self) -> str:
        return f"Attached({self.program!r}, {len(self.results)} results)"


def _moving(tensors: Iterable[tuple[Any, Any]]) -> Any:
    """The first that requires grad."""
    return next((name for name, leaf in tensors if isinstance(leaf, Tensor) and leaf.requires_grad), None)


def _check_value(value: Tensor, other: Tensor) -> None:
    """The loss that was called is the program's. A GPU is not waited for."""
    one, two = (float(each) if each.device.type == "cpu" else math.nan for each in (value, other))
    share = 3 * torch.finfo(value.dtype).eps ** 0.5  # half of the digits
    if math.isfinite(one) and abs(one - two) > share * max(abs(one), abs(two)) + share / 10:
        raise InputError(
            f"attach: the loss gives {one:.6g} and that of the program {two:.6g}: an option or a number that it reads "
            "has changed since tn.compile, so its gradient would be that of another loss.\n  Compile again; what "
            "changes while training goes with y, or is a buffer of the loss module."
        )


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


def _refuse(again: bool, cotangents: Iterable[Tensor | None]) -> None:
    """Backward passes that nothing here can follow."""
    if again:
        raise UnsupportedError(TWICE)
    if in_transform() or not all(map(is_one, cotangents)):
        raise UnsupportedError(BATCHED)


class _Model(torch.autograd.Function):
    """The model: its backward is the program's second half, with the cotangent that arrives."""

    @staticmethod
    def forward(ctx: Any, owner: Attached, call: _Call, spec: Any, count: int, *tensors: Any) -> Any:
        output, call.saved = owner.program.forward(pytree.tree_unflatten([*map(_detached, tensors[:count])], spec))
        leaves, call.spec = pytree.tree_flatten(output)
        found = [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]
        call.leaves = tuple(TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        ctx.owner, ctx.call, ctx.like = owner, call, [leaf.new_empty(()).expand_as(leaf) for leaf in found]
        ctx.mark_non_differentiable(*(leaf for leaf in found if not leaf.is_floating_point()))
        ctx.set_materialize_grads(False)
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        owner, call = ctx.owner, ctx.call
        _refuse(torch.is_grad_enabled(), cotangents)
        if not isinstance(owner.program.loss, Handed):
            raise UnsupportedError(ELSE)
        leaves, reached = [None] * len(call.leaves), frozenset[str]()
        for at, like, cotangent in zip(call.tensors, ctx.like, cotangents, strict=True):
            if like.is_floating_point():
                leaves[at] = torch.zeros_like(like).contiguous() if cotangent is None else cotangent.contiguous()
                reached |= frozenset() if cotangent is None else owner.outputs[at]
        found = owner.backward(call, pytree.tree_unflatten(leaves, call.spec), reached)
        return None, None, None, None, *found


class _Loss(torch.autograd.Function):
    """The program's loss: its backward is the program's second half."""

    @staticmethod
    def forward(ctx: Any, owner: Attached, call: _Call, value: Tensor, output: list[Tensor], y: Any, *_: Any) -> Any:
        ctx.owner, ctx.call, ctx.y, ctx.output, ctx.value = owner, call, y, output, value
        ctx.versions = [(leaf, version(leaf)) for leaf in pytree.tree_leaves(y) if isinstance(leaf, Tensor)]
        return value.detach()

    @staticmethod
    def backward(ctx: Any, factor: Tensor) -> Any:
        _refuse(torch.is_grad_enabled(), (factor,))
        if any(map(has_hooks, ctx.output)):
            raise UnsupportedError(HOOKED)
        if any(version(leaf) != then for leaf, then in ctx.versions):
            raise InputError(
                "attach: y was written over in place after the loss, and backward needs it as it was.\n"
                "  Clone before you change it."
            )
        found = ctx.owner.backward(ctx.call, ctx.y, ctx.owner.of_loss, factor, ctx.value)
        return None, None, None, None, None, *found


def attach(program: Program) -> Attached:
    """Run a program inside of one's own training step: ``with tn.attach(program) as attached: loss.backward()``.

    In the block `model(x)` is the program's first half and `loss.backward()` its second: no second forward, `.grad` as
    PyTorch leaves it (added up over calls), and the quantities in `attached.result`. The model is as it was afterwards.

    A program with ``loss=tn.HANDED`` works with whatever is made of the output: losses of several terms, scaled ones,
    accumulation; with `tn.InputGrad` among its quantities also with what requires grad in front of the model. Its
    quantities are of the gradient that arrives, which it takes for that of a sum over samples; where the loss is a
    mean, compile with ``loss=tn.HANDED_MEAN``: what is made of ∇ℓ_n (Variance, norms to clip by) then knows the N.
    One with a loss of its own has curvature, too: its loss module, or `attached.loss` for a function, has to be called
    on the model's output, and results are of that loss, whatever factor `.grad` gets.

    What hooks do to values is part of the program; what they, or a forward, keep elsewhere is not there: attributes
    that forward sets to what it computes are not there after a call in the block, and `explain("capture")` names them.
    Return what the loss reads.

    Raises `InputError` without `tn.Grad` among the quantities; for a frozen model `tn.InputGrad` is enough.
    """
    return Attached(program)
