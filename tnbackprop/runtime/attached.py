"""Attach: quantities come out of the user's own `loss.backward()`, without a second forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from ..compiler.program.inputs import of_loss
from ..errors import InputError, UnsupportedError
from ..quantities import Grad, InputGrad
from ..results import Result
from .halves import Saved
from .handed import Handed
from .program import Program

MODEL, LOSS = "the model", "the loss"


class Attached:
    """While it is entered, the model's forward is the first half of a program, and autograd calls the second.

    results  what came of each backward pass, in order; `result` is the last. They stay after it is left
    loss     of a program with a loss of its own: call it in the place of a loss that is a function
    """

    def __init__(self, program: Program) -> None:
        grads = [q.name for q in program.quantities.values() if type(q) is Grad]
        if not grads:
            raise InputError("attach: the program has no tn.Grad(), and .grad is what backward leaves: compile with it")
        if program.others:
            raise InputError(
                f"attach: the program is not of {min(program.others)!r}, which requires grad and would get none: "
                "freeze it, requires_grad_(False), or compile with all parameters"
            )
        if not isinstance(program.model, nn.Module):
            raise InputError("attach: the program has no model any more: take one that tn.compile gave")
        self.program, self.results = program, list[Result]()
        self._grad = grads[0]
        self._inputs = next((q.name for q in program.quantities.values() if type(q) is InputGrad), "")
        self._saved: Any = WeakIdKeyDictionary()  # output -> what was saved with it, and the leaves of the input
        self._plain: dict[str, Callable[..., Any]] = {}  # the forwards that are replaced

    @property
    def result(self) -> Result:
        """Of the last backward pass."""
        if not self.results:
            raise InputError("attach: no backward pass has run through the model yet")
        return self.results[-1]

    def _replaced(self) -> Iterator[tuple[str, nn.Module, Callable[..., Any]]]:
        """What has another forward in the block, and which."""
        yield MODEL, self.program.model, self._forward
        if isinstance(self.program.loss, nn.Module):
            yield LOSS, self.program.loss, self.loss

    def __enter__(self) -> Attached:
        for what, module, _ in self._replaced():
            if "forward" in vars(module):
                raise InputError(f"attach: forward of {what} is replaced already: leave that first")
        for what, module, forward in self._replaced():
            self._plain[what] = module.forward
            module.forward = forward
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for what, module, _ in self._replaced():
            del module.__dict__["forward"], self._plain[what]

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._plain[MODEL](*args, **kwargs)
        if args and kwargs:
            raise InputError("attach: call the model with positional arguments, or with keyword arguments, as compiled")
        x = kwargs or (args[0] if len(args) == 1 else args)
        leaves, spec = pytree.tree_flatten(x)
        if _moving(enumerate(leaves)) is not None and not self._inputs:
            raise InputError(
                "attach: an input requires grad, and the program has no gradient by inputs: compile with "
                "tn.InputGrad() among the quantities"
            )
        holder: dict[str, Any] = {}
        run: Callable[..., tuple[Tensor, ...]] = _Model.apply
        outputs = run(self, spec, holder, len(leaves), *leaves, *self._trained())
        output = pytree.tree_unflatten(list(outputs), holder["spec"])
        for leaf in outputs:
            self._saved[leaf] = holder["saved"], leaves
        return output

    def _trained(self) -> list[Tensor]:
        return [p for p in self.program.model.parameters() if p.requires_grad]

    def loss(self, *args: Any, **kwargs: Any) -> Tensor:
        """The program's loss. Its backward pass gives the program's results, and `.grad` times what arrives."""
        assert self.program.loss is not None
        plain = self._plain.get(LOSS, self.program.loss)
        given = tuple(inspect.signature(plain).bind(*args, **kwargs).arguments.values()) if kwargs else args
        leaves = [leaf for leaf in pytree.tree_leaves(given[:1]) if isinstance(leaf, Tensor)]
        known = next((self._saved[leaf] for leaf in leaves if leaf in self._saved), None)
        if known is None or not torch.is_grad_enabled() or isinstance(self.program.loss, Handed):
            found: Tensor = plain(*args, **kwargs)
            return found
        if len(given) != 2:
            raise InputError(f"attach: the loss gets {len(given)} arguments; it was compiled as loss(output, y)")
        output, y = given
        if _moving(enumerate(pytree.tree_leaves(y))) is not None:
            raise InputError(
                "attach: y requires grad, and a program has no gradient by it: detach it, or compile with "
                "loss=tn.HANDED"
            )
        saved, inputs = known
        run: Callable[..., Tensor] = _Loss.apply
        return run(self, saved, plain, pytree.tree_map(_detached, output), y, len(inputs), *inputs, *self._trained())

    def backward(self, saved: Saved, y: Any, leaves: int) -> list[Tensor | None]:
        """Runs the second half; the gradients of the leaves of the input, then those of `_trained`."""
        result = self.program.backward(saved, y)
        self.results.append(result)
        names = [name for name, p in self.program.model.named_parameters() if p.requires_grad]
        return [*self._inputs_of(result, leaves), *(result[self._grad][name] for name in names)]

    def _inputs_of(self, result: Result, leaves: int) -> list[Tensor | None]:
        if not self._inputs:
            return [None] * leaves
        graph, by = self.program.compiled.graph, result[self._inputs]
        names = iter(name for name in graph.inputs if name not in of_loss(graph))
        return [None if at in graph.absent else by.get(next(names)) for at in range(leaves)]

    def __repr__(self) -> str:
        return f"Attached({self.program!r}, {len(self.results)} results)"


def _moving(tensors: Iterable[tuple[Any, Any]]) -> Any:
    """The first that requires grad."""
    return next((name for name, leaf in tensors if isinstance(leaf, Tensor) and leaf.requires_grad), None)


def _detached(leaf: Any) -> Any:
    return leaf.detach() if isinstance(leaf, Tensor) else leaf


class _Model(torch.autograd.Function):
    """The model: its backward is the program's second half, with the cotangent that arrives."""

    @staticmethod
    def forward(ctx: Any, owner: Attached, spec: Any, holder: dict[str, Any], count: int, *tensors: Any) -> Any:
        output, saved = owner.program.forward(pytree.tree_unflatten([*map(_detached, tensors[:count])], spec))
        leaves, holder["spec"] = pytree.tree_flatten(output)
        holder["saved"], ctx.owner, ctx.saved, ctx.spec, ctx.count = saved, owner, saved, holder["spec"], count
        ctx.mark_non_differentiable(*(leaf for leaf in leaves if not leaf.is_floating_point()))
        ctx.floating = [leaf.is_floating_point() for leaf in leaves]
        return tuple(leaf.view_as(leaf) for leaf in leaves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        owner = ctx.owner
        if not isinstance(owner.program.loss, Handed):
            raise UnsupportedError(
                "attach: the program has a loss of its own, and something else was made of the model's output, too.\n"
                "  Call that loss on the output itself (`attached.loss` where it is a function), and nothing else; for "
                "several terms compile with loss=tn.HANDED, or with one loss of all of them: y may be a tuple."
            )
        leaves = [c.contiguous() if floating else None for c, floating in zip(cotangents, ctx.floating, strict=True)]
        return None, None, None, None, *owner.backward(ctx.saved, pytree.tree_unflatten(leaves, ctx.spec), ctx.count)


class _Loss(torch.autograd.Function):
    """The program's loss: its backward is the program's second half."""

    @staticmethod
    def forward(ctx: Any, owner: Attached, saved: Saved, plain: Any, output: Any, y: Any, count: int, *_: Any) -> Any:
        ctx.owner, ctx.saved, ctx.y, ctx.count = owner, saved, y, count
        return plain(output, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        found = ctx.owner.backward(ctx.saved, ctx.y, ctx.count)
        return None, None, None, None, None, None, *(each if each is None else each * factor for each in found)


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

    Raises `InputError` without `tn.Grad` among the quantities.
    """
    return Attached(program)
