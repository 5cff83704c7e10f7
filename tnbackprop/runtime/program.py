"""The program: the emitted function with the model's tensors and the checks on what is handed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch.utils import _pytree as pytree

from ..compiler import Compiled
from ..compiler.agreement import SAMPLES, disagreement, first_samples
from ..compiler.emit.loaded import running
from ..compiler.emit.naming import comment
from ..compiler.emit.source import MEMORY
from ..compiler.explain.stages import explain
from ..compiler.invariants.stage import Stage
from ..compiler.merge.merging import told
from ..compiler.program.cost import number
from ..compiler.program.inputs import parameter_shapes
from ..compiler.sizes import Sized, Sizes
from ..compiler.translate.sizes import first_broken
from ..compiler.translate.torch_modes import own_dtypes
from ..diagram.core import N
from ..errors import InputError
from ..quantities import Quantity
from ..results import Batch, Result, Values, assemble, shown
from .given import LATER, check_batch, device_of, flattened, floating_of
from .graphed import Graphed
from .halves import Halves, Saved, named
from .handed import Handed
from .indefinite import Indefinite, check_definite
from .loaded import Loaded
from .memory.owned import Owner
from .memory.pages import Blocks as Pages
from .memory.pages import keep_freed_pages
from .model_tensors import ModelTensors
from .noise import drawn
from .operands import Given, Operands, Shape
from .progress import bars


class Program:
    """A compiled model, loss and list of quantities. Call it with ``(x, y)`` of any batch size.

    Results are in memory of their own and take no part in autograd: none of them requires grad, even where an input
    does. Inside torch.func transforms and for tensors with a tangent the program refuses to run.

    On a CPU it keeps the memory of results above 32 MB that nobody holds any more for its next call, as pages that the
    system may take back.

    model, loss, quantities, indefinite   what was compiled, the quantities by their key in the result
    source      the Python source that runs
    flops       planned floating-point operations for the example batch
    bytes       planned bytes read and written for the example batch
    peak_bytes  planned peak of what the program holds, results included, parameters and inputs not
    checked     what was compared with autograd when it was compiled, and what not
    others      trainable parameters of the model that it is not of
    saved_by_autograd  bytes that autograd keeps for the loss of the example's batch, where that was measured
    replan      whether other batch sizes get plans of their own

    Batches of at least four times or at most a quarter of the example's samples get a plan of their own, once they take
    long enough for that: `explain()` says which have one. Until it has given the same results as the example's plan it
    is not used.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        compiled: Compiled,
        loss: Callable[..., Any] | None,
        quantities: Sequence[Quantity],
        indefinite: Indefinite = Indefinite.REFUSE,
        check: bool = False,
        others: frozenset[str] = frozenset(),
    ) -> None:
        self.others = others
        self.model, self.loss, self.indefinite, self._compiled = model, loss, indefinite, compiled
        self.quantities = {quantity.name: quantity for quantity in quantities}
        self.checked, self.replan = "not checked", False
        self.saved_by_autograd: float | None = None
        keep_freed_pages()
        self._memory = Pages()
        title = f"{type(model).__name__}: {', '.join(self.quantities)}"
        made = partial(Loaded.of, title, tuple(self.quantities), valued=not isinstance(loss, Handed))
        self._sizes = Sizes(compiled, made, check)
        self._fixed = dict(compiled.graph.constants)
        self._fixed |= compiled.derived.constants
        self._own, self._operands = ModelTensors(compiled.graph, others, loss), Operands(compiled)
        self._shapes = parameter_shapes(compiled.graph)
        self._made = {quantity.name: shown(quantity) for quantity in quantities}
        self._output_spec = pytree.tree_structure(compiled.graph.output)

    @property
    def source(self) -> str:
        """That for batches of the example's size."""
        return self._compiled.source

    def source_for(self, batch: int) -> str:
        """The source that runs batches of so many samples. It is planned now where none was, and kept."""
        return self._at(batch, now=True).compiled.source

    @property
    def compiled(self) -> Compiled:
        """What every stage produced, for those who look inside."""
        return self._compiled

    @property
    def halves(self) -> Halves:
        """The program cut at the model's output: ``program.halves.cut`` has both sources, and what is saved.

        Of the plan for the example's size; other sizes have halves of their own plans.
        """
        return self._sizes.example.loaded.halves

    @property
    def operands(self) -> Mapping[str, Shape | Mapping[str, Shape]]:
        """What quantities are handed at a call: key -> shape, or {parameter: shape}; `N` is the number of samples."""
        return self._operands.shapes

    @property
    def flops(self) -> float:
        plan = self._compiled.plan
        return sum(times * number(step.work.flops, plan.batch) for step, times in plan.timed)

    @property
    def bytes(self) -> float:
        plan = self._compiled.plan
        return plan.itemsize * sum(times * number(step.work.moved, plan.batch) for step, times in plan.timed)

    @property
    def peak_bytes(self) -> float:
        return self._compiled.plan.peak_bytes

    def explain(self, stage: Stage | str | None = None) -> str:
        """Every stage as text, or one of "capture", "bind", "derive", "plan", "emit" (the source).

        The graph; formulas and Jacobians; the diagrams of all cotangents and quantities; for each parameter and
        quantity whether the individual gradients are built, with the costs of both; the path with FLOPs and bytes.
        """
        if stage is not None and stage not in tuple(Stage):
            raise InputError(f"no stage {str(stage)!r}: there are {', '.join(Stage)}")
        text = explain(self._compiled, None if stage is None else Stage(stage))
        if stage is not None:
            return text
        sizes, checked = "\n".join(self._sizes.lines(self.replan)), "\n".join(map(comment, self.checked.split("\n")))
        saved = "\n".join(map(comment, self.halves.lines(self.saved_by_autograd)))
        merged = "\n".join(map(comment, told(self._sizes.example.loaded.merging)))
        sections = {"Batch sizes": sizes, "Merged batches": merged, "Saved between the halves": saved, "Check": checked}
        return "\n\n".join([text, *(f"{title}\n{'=' * len(title)}\n{each}" for title, each in sections.items())])

    @property
    def each(self) -> tuple[Program, ...]:
        """The programs that run one after the other: it alone, unless quantities are of some samples."""
        return (self,)

    def fits(self, size: int) -> bool:
        """Whether it is for so many samples: a model may branch on that."""
        graph = self._compiled.graph
        return size >= graph.least and first_broken(graph.conditions, size) is None

    def suits(self, size: int) -> bool:
        """Whether another program would not soon pay for batches of so many samples. Counts this one."""
        return self._sizes.suits(size)

    def tensors(self, x: Any, y: Any, parameters: object = None) -> dict[str, torch.Tensor]:
        """The inputs of the emitted function: parameters, buffers, constants and the batch, by value name."""
        own = self._own_tensors(parameters)
        return own | check_batch(flattened((x, y), self._compiled.graph), self._compiled.graph)

    def _own_tensors(self, parameters: object = None) -> dict[str, torch.Tensor]:
        """Parameters, buffers and constants by value name; `parameters`: others in the place of some."""
        return self._fixed | self._own.tensors(self.model, self.loss, self._compiled.graph, parameters)

    @torch.no_grad()
    def forward(self, x: Any) -> tuple[Any, Saved]:
        """The first half: (the model's output, what the second half reads of it).

        ``output, saved = program.forward(x)`` and ``program.backward(saved, y)`` give what ``program(x, y)`` gives. The
        output is not copied: written over, it is missed by `backward`, which then says so. Layers that draw (dropout)
        draw here.
        """
        own, graph = self._own_tensors(), self._compiled.graph
        inputs = check_batch(flattened((x,), graph), graph)
        plan = found = self._at(batch := self._batch(inputs))
        if not plan.proved:  # it is tried once there is a y
            plan = self._sizes.example
        output, saved = plan.loaded.halves.forward((self._sizes, plan), own, inputs, batch, self._memory)
        saved.trial = None if found.proved else (found, inputs)
        return pytree.tree_unflatten(list(output), self._output_spec), saved

    @torch.no_grad()
    def backward(
        self,
        saved: Saved,
        y: Any = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        operands: Given | None = None,
    ) -> Result:
        """The second half: all results, with the loss and without the output, of what `forward` saved.

        y   what the loss reads; of a program with ``loss=tn.HANDED`` the cotangent of the output
        Options are those of a call. Raises `InputError` where `saved` is of another program or was written over.
        """
        if not isinstance(saved, Saved):
            raise InputError(f"backward takes what forward saved, output, saved = program.forward(x), not {saved!r}")
        saved.check(self._sizes)
        own, graph = saved.model, self._compiled.graph
        rest = check_batch(flattened((LATER, y), graph), graph)
        sizes = (t.shape[k] for n, t in rest.items() for k, s in enumerate(graph.values[n].shape) if s == N)
        if (size := next(sizes, saved.batch)) != saved.batch:
            raise InputError(f"y has {size} samples, and forward had {saved.batch}")
        rest |= self._operands.tensors(operands, saved.batch, saved.like)
        rest |= drawn(self._compiled.plan.noises, saved.batch, saved.like, seed, generator)
        loss, _, values, *checks = saved.plan.loaded.halves.backward(saved, rest, self._memory)
        if saved.trial is not None and not saved.trial[0].proved:
            self._tried(saved.trial[0], {**own, **saved.trial[1], **rest})
            saved.trial = None
        read: dict[Any, torch.Tensor] = {**own, **saved.inputs, **rest}
        read |= dict(enumerate(tensor for _, tensor in named(saved.tensors)))
        return self._result(saved.plan, read, loss, None, values, *checks)

    @torch.no_grad()
    def __call__(
        self,
        x: Any,
        y: Any = None,
        *,
        seed: int | None = None,
        generator: torch.Generator | None = None,
        operands: Given | None = None,
        parameters: Mapping[str, torch.Tensor] | None = None,
        progress: bool = False,
    ) -> Result:
        """Run on a batch. Monte-Carlo quantities draw from `generator`, or one seeded with `seed`, or torch's own.

        operands    what quantities read besides, {key: tensor} or {key: {parameter: tensor}}: see `Program.operands`
        parameters  {name: tensor} in the place of the model's own parameters and buffers of these names
        progress    a bar for loops over columns (exact curvature with many classes) and slices (`memory_limit`)

        Raises `InputError` where the batch or an operand does not fit what the program was compiled for.
        """
        tensors = self._with_noise(x, y, seed, generator, operands, parameters)
        sized = self._for(tensors)
        found = self._run(sized, tensors, bars() if progress else iter)
        return self._result(sized, tensors, *found)

    def _run(
        self, sized: Sized[Loaded], tensors: Mapping[str, torch.Tensor], progress: Callable[..., Any] = iter
    ) -> Any:
        """What the emitted function of a plan returns."""
        given = {"progress": progress, MEMORY: self._memory.out}
        extra = {name: value for name, value in given.items() if name in sized.loaded.takes}
        called = "program.source" if sized.compiled is self._compiled else f"program.source_for({sized.batch})"
        with running(sized.compiled.source, called), own_dtypes(device_of(tensors)), self._memory.call():
            return sized.loaded.function(tensors, **extra)

    def _at(self, batch: int, now: bool = False) -> Sized[Loaded]:
        """The plan for a batch size."""
        return self._sizes.at(batch, now) if self.replan else self._sizes.example

    def _for(self, tensors: Mapping[str, torch.Tensor], now: bool = False) -> Sized[Loaded]:
        """The plan for a batch; one that was made only now gives what the example's gives, or that is taken."""
        sized = self._at(self._batch(tensors), now)
        return sized if sized.proved else self._tried(sized, tensors)

    def _tried(self, sized: Sized[Loaded], tensors: Mapping[str, torch.Tensor]) -> Sized[Loaded]:
        """A plan, or the example's where they differ on some samples."""
        most, plan = min(self._batch(tensors), max(self._sizes.example.batch, SAMPLES)), self._compiled.plan
        axes = {name: value.shape for name, value in (*plan.given.items(), *plan.noises.items())}
        some = {name: first_samples(tensor, axes.get(name, ()), most) for name, tensor in tensors.items()}
        first, other = (partial(self._run, each, some) for each in (self._sizes.example, sized))
        return self._sizes.settle(sized, disagreement(first, other, device_of(tensors)))

    def some_operands(self, x: Any, y: Any = None) -> dict[str, Any]:
        """Operands for a batch, random numbers that are the same every time: to try the program with."""
        if not self.operands:
            return {}
        tensors = self.tensors(x, y)
        return self._operands.examples(self._batch(tensors), floating_of(tensors))

    def graphed(self, x: Any, y: Any = None, operands: Given | None = None) -> Graphed:
        """The program for batches of this size as a CUDA graph: see `Graphed`.

        Raises `InputError` where the model is not on a CUDA device, or an operation cannot be recorded.
        """
        inputs = frozenset({*self._compiled.graph.inputs, *self._compiled.plan.noises, *self._compiled.plan.operands})
        example = self._with_noise(x, y, None, None, operands)
        sized = self._for(example, now=True)
        with running(sized.compiled.source), own_dtypes(device_of(example)):
            result = partial(self._result, sized, example)
            return Graphed(sized.loaded.function, self._with_noise, result, inputs, example)

    def _result(
        self,
        sized: Sized[Loaded],
        read: Mapping[Any, torch.Tensor],
        loss: torch.Tensor | None,
        output: Any,
        values: Values,
        checks: Sequence[torch.Tensor] = (),
        divisor: torch.Tensor | None = None,
    ) -> Result:
        """What the emitted function returns, as a user reads it, in memory of its own."""
        if self.indefinite is Indefinite.REFUSE:
            check_definite(checks)
        owner = Owner(read.values())
        own, values = owner.own, owner.values(values)
        every = sized.loaded.blocks
        made: dict[str, Any] = {name: assemble(each, values, name) for name, each in every.items()}
        loss = None if loss is None or isinstance(self.loss, Handed) else own(loss)
        axes = {name: each.axes for name, each in every.items()}
        whole = None
        if output is not None:
            leaves = [own(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in output]
            whole = pytree.tree_unflatten(leaves, self._output_spec)
        batch = Batch(self._batch(read), sized.loaded.merging, self._made, None if divisor is None else own(divisor))
        return Result(loss, whole, made, axes, self._shapes, batch)

    def _with_noise(
        self,
        x: Any,
        y: Any,
        seed: int | None,
        generator: torch.Generator | None,
        operands: Given | None = None,
        parameters: object = None,
    ) -> dict[str, torch.Tensor]:
        """All that the emitted function reads."""
        tensors = self.tensors(x, y, parameters)
        batch, like = self._batch(tensors), floating_of(tensors)
        tensors |= self._operands.tensors(operands, batch, like)
        return tensors | drawn(self._compiled.plan.noises, batch, like, seed, generator)

    def _batch(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """How many samples there are."""
        graph = self._compiled.graph
        there = (name for name in graph.inputs if name in tensors)
        sizes = ((name, k) for name in there for k, size in enumerate(graph.values[name].shape) if size == N)
        return next(tensors[name].shape[k] for name, k in sizes)

    def detached(self) -> Program:
        """The program without its model and loss, and without what was read of them but is not needed to run."""
        other = copy(self)
        graph, derived = replace(self._compiled.graph, calls=()), replace(self._compiled.derived, bound=())
        compiled = replace(self._compiled, graph=graph, derived=derived, again=None, captured=None)
        loaded = replace(self._sizes.example.loaded, halves=Halves(compiled, ""))
        other.__dict__ |= {"model": None, "loss": None, "_compiled": compiled}
        other._sizes = self._sizes.detached(compiled, loaded)
        return other

    def attached(self, model: torch.nn.Module, loss: Callable[..., Any] | None) -> Program:
        """The program of another model and loss that it would be compiled from just as well."""
        other = copy(self)
        other.model, other.loss = model, loss
        return other

    def __copy__(self) -> Program:
        """The same program of the same model."""
        other = object.__new__(Program)
        other.__dict__ |= self.__dict__
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        """The program of a copy of the model, whose parameters go their own way. Nothing is compiled again."""
        memo[id(self)] = other = copy(self)
        other.model, other.loss = deepcopy((self.model, self.loss), memo)
        return other

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a program is not pickled: it holds functions of this process.\n"
            "  Compile again where it is needed, or write it to a file that needs no compiler: tn.generate"
        )

    def __repr__(self) -> str:
        plan = self._compiled.plan
        names = ", ".join(self.quantities)
        return f"Program({names}; {len(plan.steps)} steps, {self.flops:.3g} FLOPs at N = {plan.batch})"
