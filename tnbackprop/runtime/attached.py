"""Attach: quantities come out of the user's own `loss.backward()`, without a second forward."""

from __future__ import annotations

from collections.abc import Callable
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
from .handed import HANDED
from .program import Program

GRAD, INPUTS = "grad", "input_grad"


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
        self._saved: Any = WeakIdKeyDictionary()  # output -> what was saved with it
        self._plain: tuple[Callable[..., Any], Callable[..., Any] | None] | None = None

    @property
    def result(self) -> Result:
        """Of the last backward pass."""
        if not self.results:
            raise InputError("attach: no backward pass has run through the model yet")
        return self.results[-1]

    def __enter__(self) -> Attached:
        model, loss = self.program.model, self.program.loss
        for what, module in (("the model", model), ("the loss", loss)):
            if isinstance(module, nn.Module) and "forward" in vars(module):
                raise InputError(f"attach: forward of {what} is replaced already: leave that first")
        own = isinstance(loss, nn.Module)
        self._plain = model.forward, loss.forward if isinstance(loss, nn.Module) else None
        model.forward = self._forward
        if own:
            assert isinstance(loss, nn.Module)
            loss.forward = self.loss
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self.program.model.__dict__["forward"]
        if isinstance(self.program.loss, nn.Module):
            del self.program.loss.__dict__["forward"]
        self._plain = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        assert self._plain is not None
        if not torch.is_grad_enabled():
            return self._plain[0](*args, **kwargs)
        if args and kwargs:
            raise InputError("attach: call the model with positional arguments, or with keyword arguments, as compiled")
        x = kwargs or (args[0] if len(args) == 1 else args)
        leaves, spec = pytree.tree_flatten(x)
        moving = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if moving and not self._inputs:
            raise InputError(
                "attach: an input requires grad, and the program has no gradient by inputs: compile with "
                "tn.InputGrad() among the quantities"
            )
        holder: dict[str, Any] = {}
        run: Callable[..., tuple[Tensor, ...]] = _Model.apply
        outputs = run(self, spec, holder, len(leaves), *leaves, *self._trained())
        output = pytree.tree_unflatten(list(outputs), holder["spec"])
        for leaf in outputs:
            self._saved[leaf] = holder["saved"]
        return output

    def _trained(self) -> list[Tensor]:
        return [p for p in self.program.model.parameters() if p.requires_grad]

    def loss(self, output: Any, y: Any) -> Tensor:
        """The program's loss. Its backward pass gives the program's results, and `.grad` times what arrives."""
        assert self.program.loss is not None
        plain = self.program.loss if self._plain is None or self._plain[1] is None else self._plain[1]
        leaves = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        saved = next((self._saved[leaf] for leaf in leaves if leaf in self._saved), None)
        if saved is None or not torch.is_grad_enabled() or self.program.loss is HANDED:
            found: Tensor = plain(output, y)
            return found
        run: Callable[..., Tensor] = _Loss.apply
        return run(self, saved, plain, pytree.tree_map(_detached, output), y, *self._trained())

    def backward(self, saved: Saved, y: Any, factor: Tensor | None = None) -> list[Tensor | None]:
        """Runs the second half; the gradients of `_trained`, after those of the inputs."""
        result = self.program.backward(saved, y)
        self.results.append(result)
        names = [name for name, p in self.program.model.named_parameters() if p.requires_grad]
        grads: list[Tensor | None] = [result[self._grad][name] for name in names]
        return [g if g is None or factor is None else g * factor for g in grads]

    def inputs(self, leaves: int) -> list[Tensor | None]:
        """The gradients of the inputs, by leaf of x."""
        if not self._inputs:
            return [None] * leaves
        graph, by = self.program.compiled.graph, self.result[self._inputs]
        absent = {at for at in graph.absent if at < leaves}
        names = iter(name for name in graph.inputs if name not in of_loss(graph))
        return [None if at in absent else by.get(next(names)) for at in range(leaves)]

    def __repr__(self) -> str:
        return f"Attached({self.program!r}, {len(self.results)} results)"


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
        if owner.program.loss is not HANDED:
            raise UnsupportedError(
                "attach: the program has a loss of its own, and something else was made of the model's output, too.\n"
                "  Compile with loss=tn.HANDED for losses of several terms; curvature is that of one loss."
            )
        leaves = [c.contiguous() if floating else None for c, floating in zip(cotangents, ctx.floating, strict=True)]
        grads = owner.backward(ctx.saved, pytree.tree_unflatten(leaves, ctx.spec))
        return None, None, None, None, *owner.inputs(ctx.count), *grads


class _Loss(torch.autograd.Function):
    """The program's loss: its backward is the program's second half."""

    @staticmethod
    def forward(ctx: Any, owner: Attached, saved: Saved, plain: Any, output: Any, y: Any, *parameters: Tensor) -> Any:
        ctx.owner, ctx.saved, ctx.y = owner, saved, y
        return plain(output, y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, factor: Tensor) -> Any:
        return None, None, None, None, None, *ctx.owner.backward(ctx.saved, ctx.y, factor)


def attach(program: Program) -> Attached:
    """Run a program inside of one's own training step: ``with tn.attach(program) as attached: loss.backward()``.

    In the block `model(x)` is the program's first half and `loss.backward()` its second: no second forward, `.grad` as
    PyTorch leaves it (added up over calls), and the quantities in `attached.result`. The model is as it was afterwards.

    A program with ``loss=tn.HANDED`` works with whatever is made of the output: losses of several terms, scaled ones,
    accumulation; with `tn.InputGrad` among its quantities also with what requires grad in front of the model. Its
    quantities are of the gradient that arrives: a loss that is divided afterwards has individual gradients so divided.
    One with a loss of its own has curvature, too: its loss module, or `attached.loss` for a function, has to be called
    on the model's output, and results are of that loss, whatever factor `.grad` gets.

    Raises `InputError` without `tn.Grad` among the quantities.
    """
    return Attached(program)
