"""The public face: compile and compute."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

from .attached import check_detached
from .compiler import compile_program
from .compiler.capture.export import batch_size, check_trainable, plain
from .compiler.capture.kept import draws_kept
from .compiler.lower.candidate import Lowering
from .compiler.running.collector import UNCOLLECTED
from .compiler.translate.graph import Graph
from .declare import REGISTRY, Declaration, resolve, told_of_replaced
from .errors import InputError, UnsupportedError, check_member
from .proof.proof import prove
from .quantities import Quantity, check_quantities
from .quantities.base import Samples, whole
from .quantities.roots import resolved
from .rules import RULES
from .runtime import Indefinite, Program, Result
from .runtime.fingerprint import Fingerprint, fingerprint
from .runtime.handed import Handed, with_cotangent
from .runtime.model_tensors import other_buffer
from .runtime.operands import Given
from .runtime.selected import Selection, frozen, left_out
from .subsampled import Subsampled, divisible, kept_bytes, rows

Loss = Callable[..., torch.Tensor]


def compile(
    model: torch.nn.Module,
    loss: Loss | None,
    example: tuple[Any, Any],
    quantities: Sequence[Quantity],
    *,
    rules: Mapping[Any, Declaration] | None = None,
    memory_limit: float | str | None = None,
    indefinite: Indefinite = Indefinite.REFUSE,
    lowerings: Sequence[Lowering] = (),
    check: bool = True,
    replan: bool = True,
    parameters: Selection | None = None,
    accumulate: torch.dtype | None = None,
) -> Program:
    """Compile a model with its loss and quantities to a program.

    model         any module that torch.export can capture; it is not changed. Its parameters' dtypes are those of the
                  program: torch.autocast has no effect on it
    loss          ``loss(output, y)`` -> scalar, a sum or mean over samples; None: the output alone; `tn.HANDED`: y is
                  the cotangent of the output, ∂L/∂output of any L that sums over samples, `tn.HANDED_MEAN`: of one
                  that is a mean (the example is x alone)
    example       a batch ``(x, y)``; shapes other than the batch size are fixed by it
    quantities    what to compute: ``[tn.BatchL2(), tn.Variance()]``
    rules         from target to rule: ``tn.RULES | {MyLayer: my_rule}`` adds your own; None: the built-in rules and
                  those that `tn.rule` registered
    memory_limit  bytes (or "2GiB") that intermediate values may take at the example's batch size
    indefinite    a loss Hessian with negative eigenvalues has no square root: refuse, or clip them to zero
    lowerings     rows of your own, ``(store, product, legs) -> candidates``, tried with those that are built in:
                  ``examples/add_a_lowering.py``
    check         the program and PyTorch's own autograd run once on two samples of the example and must agree: the last
                  lines of `explain()` say on what. False: not
    replan        batches of four times the example's samples or more, or of a quarter or less, get a plan of their own
                  once that pays, and `memory_limit` holds for every batch. False: the example's plan runs all of them,
                  and the limit holds for its size
    parameters    which parameters the quantities are of: names or patterns ("encoder.*"), or a function of a name; the
                  others cost what frozen ones cost. None: all that require grad
    accumulate    the dtype in which squares and factors are computed, torch.float32 for a model in bfloat16: what is
                  linear in the gradients keeps the model's. None: all of it

    Raises `InputError`, `UnsupportedError`, `RuleError`, and `VerificationError` where the two differ.
    """
    options = _Options(model, loss, rules, memory_limit, indefinite, lowerings, check, replan, parameters, accumulate)
    return options.compiled(example, quantities)


def compile_many(
    model: torch.nn.Module,
    loss: Loss | None,
    example: tuple[Any, Any],
    quantities: Sequence[Sequence[Quantity]],
    *,
    rules: Mapping[Any, Declaration] | None = None,
    memory_limit: float | str | None = None,
    indefinite: Indefinite = Indefinite.REFUSE,
    lowerings: Sequence[Lowering] = (),
    check: bool = True,
    replan: bool = True,
    parameters: Selection | None = None,
    accumulate: torch.dtype | None = None,
) -> list[Program]:
    """Several programs of one model, one for each list of quantities: it is captured once. Options as for `compile`.

    For quantities that are wanted at different times, say factors every tenth step: a program computes all that it was
    compiled for.
    """
    several = isinstance(quantities, Iterable) and not isinstance(quantities, str)
    quantities = list(quantities) if several else []
    if not several or any(isinstance(each, Quantity) for each in quantities):
        raise InputError("compile_many: give lists of quantities, [[tn.Grad()], [tn.Grad(), tn.KFAC()]]")
    options = _Options(model, loss, rules, memory_limit, indefinite, lowerings, check, replan, parameters, accumulate)
    found: list[Program] = []
    for each in quantities:
        found.append(options.compiled(example, each, found[0].compiled.captured if found else None))
    return found


@dataclass(frozen=True)
class _Options:
    """What is compiled, and how."""

    model: torch.nn.Module
    loss: Loss | None
    rules: Mapping[Any, Declaration] | None
    memory_limit: float | str | None
    indefinite: Indefinite
    lowerings: Sequence[Lowering]
    check: bool
    replan: bool
    parameters: Selection | None
    accumulate: torch.dtype | None

    def compiled(self, example: Any, quantities: Sequence[Quantity], known: Graph | None = None) -> Program:
        """A program; `known`: the graph of the same model and loss, captured before."""
        check_quantities(quantities)
        program = self._whole(example, [quantity for quantity in quantities if quantity.of_samples is None], known)
        by: dict[Samples, list[Quantity]] = {}
        for quantity in quantities:
            if quantity.of_samples is not None:
                by.setdefault(quantity.of_samples, []).append(quantity)
        if not by:
            return program
        captured = divisible(program, self.loss)
        parts: dict[Samples, Program] = {}
        for samples, own in by.items():
            options = self._with_less(kept_bytes((program, *parts.values())))
            graph = replace(captured, example_batch=len(samples))
            mine = rows(example if isinstance(example, tuple) else tuple(example), captured, samples)
            parts[samples] = options._whole(mine, list(map(whole, own)), graph)
        return Subsampled(program, parts, quantities)

    def _with_less(self, others: float) -> _Options:
        """The options beside results of so many bytes."""
        if (limit := _bytes(self.memory_limit)) is None:
            return self
        if limit <= others:
            raise UnsupportedError(
                f"memory_limit={self.memory_limit} cannot be met: the results of the other quantities alone take "
                f"{others:.0f} bytes at the example's batch size. Ask for fewer quantities, or compile those with "
                "samples= by themselves."
            )
        return replace(self, memory_limit=limit - others)

    def _whole(self, example: Any, quantities: Sequence[Quantity], known: Graph | None = None) -> Program:
        """A program of quantities of all samples."""
        model, loss = self.model, self.loss
        if isinstance(model, torch.nn.Module):
            check_detached(model)
        quantities = resolved(quantities)
        check_member("indefinite", self.indefinite, Indefinite)
        check_trainable(model, quantities)
        example = with_cotangent(model, example, quantities) if isinstance(loss, Handed) else example
        limit, table, others = _bytes(self.memory_limit), resolve(self.rules), left_out(model, self.parameters)
        rows = tuple(self.lowerings)
        with UNCOLLECTED, draws_kept(model, loss), frozen(model, others):
            with told_of_replaced(self.rules):
                compiled = compile_program(
                    model, loss, example, list(quantities), table, limit, lowerings=rows, known=known,
                    accumulate=_dtype(self.accumulate, quantities, self.model),
                )
            program = Program(model, compiled, loss, quantities, self.indefinite, self.check, others)
            limited = limit is not None
            program.checked = prove(program, example, table, limited) if self.check else "not checked: check=False"
        program.replan = self.replan
        return program


def compute(
    model: torch.nn.Module,
    loss: Loss | None,
    batch: tuple[Any, Any],
    quantities: Sequence[Quantity],
    *,
    rules: Mapping[Any, Declaration] | None = None,
    memory_limit: float | str | None = None,
    indefinite: Indefinite = Indefinite.REFUSE,
    lowerings: Sequence[Lowering] = (),
    check: bool = True,
    replan: bool = True,
    parameters: Selection | None = None,
    accumulate: torch.dtype | None = None,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    operands: Given | None = None,
) -> Result:
    """Compile and run: the options of `compile`, and `seed`, `generator` and `operands` as for a `Program`.

    What was compiled is kept, the last `KEPT` programs of a model for as long as it lives. Everything that a program
    depends on is looked at in each call: layers, modes, attributes, hooks and ties of the model, options of the loss,
    what functions read (defaults, closures, globals), rules and shapes; the values of parameters and the batch size are
    free. Where something changed, or hides what it holds (an iterator, a scripted module), it is compiled anew. So are
    batches far from the sizes that were compiled for, once that pays (`replan`), and those of every size where memory
    is limited. A `Program` looks at none of that, so it is faster.
    """
    options: dict[str, Any] = {
        "rules": rules, "memory_limit": memory_limit, "indefinite": indefinite, "lowerings": lowerings, "check": check,
        "parameters": parameters, "accumulate": accumulate,
    }  # fmt: skip
    pair = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(model, torch.nn.Module)
    whole = pair and not any(map(is_lazy, model.parameters()))  # else compile says what is wrong
    state = _state(model, loss, batch, quantities, options) if whole else None
    kept = [] if state is None else _PROGRAMS.get(model, [])
    size = batch_size((plain(batch[0]), plain(batch[1]))) if kept else 0
    found = [each for each in kept if state is not None and each[0].matches(state) and each[1].fits(size)]
    found = [each for each in found if not other_buffer(each[1].compiled.graph, model, loss)]
    nearest = min(found, key=lambda each: abs(math.log(size / each[1].compiled.plan.batch)), default=None)
    if nearest is not None and (not replan or nearest[1].suits(size)):
        _PROGRAMS[model] = [nearest, *(each for each in kept if each is not nearest)]
        return nearest[1].attached(model, loss)(*batch, seed=seed, generator=generator, operands=operands)
    program = compile(model, loss, batch, quantities, **options, replan=replan)
    if state is not None:
        _PROGRAMS[model] = [(state, program.detached()), *kept][:KEPT]
    return program(*batch, seed=seed, generator=generator, operands=operands)


KEPT = 16
_PROGRAMS: MutableMapping[torch.nn.Module, list[tuple[Fingerprint, Program]]] = WeakIdKeyDictionary()
"""What `compute` has compiled, the latest first; forgotten with the model, which the programs do not hold."""


def _state(
    model: torch.nn.Module, loss: Loss | None, batch: tuple[Any, Any], quantities: Sequence[Quantity], options: Any
) -> Fingerprint | None:
    """Everything that a compilation depends on; the batch size where memory is limited."""
    leaves, spec = pytree.tree_flatten(tuple(map(plain, batch)) if isinstance(batch, tuple | list) else batch)
    sizes = slice(1 if options["memory_limit"] is None else 0, None)
    inputs = [
        (leaf.ndim, leaf.shape[sizes], leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf
        for leaf in leaves
    ]
    rules = REGISTRY if options["rules"] is None else options["rules"]
    if isinstance(rules, Mapping):
        rules = len(rules), [row for row in rules.items() if RULES.get(row[0]) is not row[1]]
    named = isinstance(batch, tuple | list) and [isinstance(part, dict) for part in batch]
    given = (loss, quantities, inputs, str(spec), named, {**options, "rules": rules})
    return fingerprint(model, *given, built_in=(*RULES, *RULES.values()))


def _dtype(accumulate: object, quantities: Sequence[Quantity], model: torch.nn.Module) -> torch.dtype | None:
    """That of squares and factors."""
    if accumulate is None:
        return None
    if not isinstance(accumulate, torch.dtype) or not accumulate.is_floating_point:
        raise InputError(f"accumulate={accumulate!r} is no floating dtype: torch.float32, or None for the model's own")
    for name, parameter in model.named_parameters() if isinstance(model, torch.nn.Module) else ():
        if torch.promote_types(parameter.dtype, accumulate) != accumulate:
            raise InputError(
                f"accumulate={accumulate} would round squares and factors of parameter {name!r}, {parameter.dtype}: "
                "give a wider dtype, or None for the model's own"
            )
    late = [quantity.name for quantity in quantities if quantity.needs]
    if late:
        raise UnsupportedError(
            f"accumulate={accumulate} with {', '.join(late)}: what comes between its phases is in the model's dtype.\n"
            "  Compile it on its own, without accumulate; tn.compile_many captures the model once"
        )
    return accumulate


def _bytes(limit: float | str | None) -> int | None:
    """A number of bytes from a number or a text like "2GiB"."""
    if limit is None:
        return None
    amount: float = 0
    if isinstance(limit, str) and (match := re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(B|[kMGT]i?B)\s*", limit)):
        unit = match[2].rstrip("B")
        amount = float(match[1]) * (1024 if unit.endswith("i") else 1000) ** " kMGT".index(unit[:1] or " ")
    elif isinstance(limit, int | float) and not isinstance(limit, bool):
        amount = limit
    if not 1 <= amount < math.inf:
        raise InputError(
            f"memory_limit={limit!r} is no amount of memory: write bytes, or text like '500MB' or '2GiB'; "
            "None is no limit"
        )
    return int(amount)
