"""Proof: a program that was just compiled against PyTorch's own autograd, on samples of the example.

Nothing of that is left on the model: the program reads its tensors, autograd runs on copies of them, torch draws
afterwards what it would have drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..compiler.capture.export import Wrapped, batch_size, plain, takes_names
from ..compiler.capture.state import copied, copied_once, resized
from ..compiler.emit.naming import comment
from ..compiler.running.failure import lacks_derivative
from ..compiler.running.printing import SILENT
from ..compiler.running.torch_versions import WholeHeads
from ..compiler.translate.foreign import MISTAKES
from ..compiler.translate.graph import NotGiven
from ..compiler.translate.torch_internals import alone, version
from ..compiler.translate.torch_modes import InFloat64, device_of_module, own_dtypes
from ..diagram.core import N
from ..errors import InputError, UnsupportedError, VerificationError
from ..results import Result
from ..rules import RULES
from ..runtime.indefinite import Indefinite
from ..runtime.program import Program
from ..table import Rules
from .compared import FIRST, ROOT, SECOND, Pair, error, pairs_of
from .reference import SEED, Batch, Reference

SAMPLES = 2
OUTPUT = "a value"
FAILURES = (RuntimeError, AssertionError, *MISTAKES)
CLOSE = {torch.float64: 1e-7, torch.float32: 1e-4}
"""How much may differ, relative to the largest value of a tensor; for the shorter dtypes `SHORT`."""
TWICE = 100.0
"""So many times as much for second derivatives in float64: of a softmax that is sure of a class, autograd's cancel."""
SHORT = 2e-2
ROUNDING = {torch.float64: 1e4}
"""So many times the spacing of the dtype, or `FEW` times, relative to the largest value of a quantity: what cancels is
not exactly zero. The shorter dtypes have float64 to ask."""
FEW = 50
NOTHING = FEW * torch.finfo(torch.float64).eps
"""What is nowhere larger is rounding, where it is made of numbers around 1."""
LOST = 50.0
"""So many times as much where the model does not run in float64."""
TINY = 1e-10
"""What is nowhere larger may be rounding: of a quotient of small numbers that cancels, say."""
MOVED = (1 + 2.0**-50, 1 - 2.0**-49, 1 + 2.0**-48)
"""Parameters times these differ in their last digits."""
WORSE = 8.0
"""The program may be so many times as far from autograd in float64 as autograd in the model's own dtype is."""
CAUSES = {
    OUTPUT: "forward or the loss reads what has changed since it was captured, or does something else for this number "
    "of samples.",
    FIRST: "a backward pass of its own (an autograd.Function, a hook), a branch on the number of samples, samples that "
    "meet, several values for one place (torch gives the derivative to each of them), or a rule whose Jacobian is not "
    "the derivative of its module.",
    ROOT: "the second derivative of the loss, or what is said of a derivative above.",
    SECOND: "the second derivative of an operation or of the loss, or a rule whose Jacobian is not the derivative of "
    "its module.",
}

NEXT = """\
  tn.verify(model, x, y, loss=loss) names the first line that is wrong; a rule of yours for that module or function
  takes its place (examples/add_a_layer.py). If it names none, this is a fault of tnbackprop: please report this message
  with the model. Until then torch.func gives what you need of this model."""


def prove(program: Program, example: Batch, rules: Rules, whole: bool = False) -> str:
    """Compare; what was compared, as a line. Raises `VerificationError` at a difference.

    whole   with all samples of the example, not with the first ones
    """
    wrapped = Wrapped(program.model, program.loss, takes_names(program.model, example[0]))
    batch = (plain(example[0]), plain(example[1]))
    every = batch_size(batch)
    first = every if whole else min(SAMPLES, every)
    reason = ""
    with alone(), own_dtypes(device_of_module(program.model)), torch.inference_mode(False), SILENT, WholeHeads():
        for size in dict.fromkeys((first, every)):  # it may take the whole batch only
            proof = Proof(program, wrapped, resized(batch, size), size, rules, size == every)
            try:
                with copied_once():
                    said = proof.said()
                program.saved_by_autograd = proof.saved and proof.saved / size * program.compiled.plan.batch
                return said
            except _NotRunError as error:
                reason = str(error)
    return f"not checked: {reason}"


class _NotRunError(Exception):
    """The program or the model does not run, and why."""


class Proof:
    """One comparison, on a batch of `size` samples; `last`: there are no more."""

    def __init__(self, program: Program, wrapped: Wrapped, batch: Batch, size: int, rules: Rules, last: bool) -> None:
        self.program, self.wrapped, self.batch, self.size, self.last = program, wrapped, batch, size, last
        self.graph = program.compiled.graph
        calls = [call for call in self.graph.calls if rules.get(call.target) is not RULES.get(call.target)]
        self.declared = tuple(dict.fromkeys(call.where for call in calls))
        dtypes = [v.dtype for v in self.graph.values.values() if v.dtype.is_floating_point]
        self.dtype = max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)
        self.saved: int | None = None

    def said(self) -> str:
        try:
            result = self._run()
        except InputError as error:
            self._fails(error)
        with copied(self.wrapped):
            pairs, left, draws = self._pairs(self.wrapped, self.batch, result)
            if draws:
                return "not checked: the model or the loss draws random numbers in another order than the program"
            wrong = self._wrong(pairs)
        if wrong:
            double = self.dtype == torch.float64
            wrong = self._certain(wrong, result) if double else self._worse(wrong, pairs, result)
        if wrong:
            self._refuse(wrong, pairs)
        some = {pair.quantity for pair in pairs if pair.largest}
        zero = {pair.quantity for pair in pairs if pair.kind == ROOT} - some
        left |= dict.fromkeys(sorted(zero), "which autograd has as zero everywhere")
        return _line(self.size, [pair for pair in pairs if pair.quantity not in zero], left)

    def _run(self) -> Result:
        """The program's results."""
        devices = {p.device for p in self.wrapped.parameters() if p.device.type == "cuda"}
        drawn = self.program.compiled.plan.noises
        own = [*self.wrapped.named_parameters(), *self.wrapped.named_buffers()]
        before = [version(tensor) for _, tensor in own]
        with torch.random.fork_rng(devices=list(devices)):
            torch.manual_seed(SEED)
            operands = self.program.some_operands(*self.batch)
            result = self.program(*self.batch, seed=SEED if drawn else None, operands=operands)
        for (name, tensor), then in zip(own, before, strict=True):
            if version(tensor) != then:
                raise VerificationError(
                    f"the program writes to {name.partition('.')[2]!r} of the model, and must leave it as it is.\n"
                    "  Call model.eval(), or remove the update from forward. This is a fault of tnbackprop: please "
                    "report it with the model."
                )
        return result

    def _fails(self, error: InputError) -> NoReturn:
        """The program refuses the example. Raises `VerificationError` where torch fails in it, and not in the model."""
        reason = str(error).splitlines()[0]
        if error.__cause__ is not None and self.last:  # a quantity may be of so many samples
            with copied(self.wrapped):
                self._reference(self.wrapped, self.batch)
            if isinstance(error.__cause__, torch.linalg.LinAlgError):  # type: ignore[attr-defined]  # of the batch
                raise error
            if lacks_derivative(error.__cause__):
                raise UnsupportedError(
                    f"{reason} torch has a first derivative of that only.\n  Write it in operators that have more "
                    "(.square().sum(-1).sqrt() for torch.cdist), or declare its module."
                ) from error
            raise VerificationError(
                f"the program of {type(self.program.model).__name__} fails on {_counted(self.size, 'sample')} of the "
                f"example, where the model does not: {reason}\n{NEXT}"
            ) from error
        raise _NotRunError(f"the program refuses the example ({reason})") from error

    def _reference(self, wrapped: Wrapped, batch: Batch) -> Reference:
        """Raises `_NotRunError` where the model fails."""
        try:
            return Reference(wrapped, self.graph, batch, self.size)
        except FAILURES as error:
            text = (str(error).splitlines() or [""])[0]
            raise _NotRunError(f"the model fails on {_counted(self.size, 'sample')} ({text})") from error

    def _pairs(self, wrapped: Wrapped, batch: Batch, result: Result) -> tuple[list[Pair], dict[str, str], bool]:
        """What is compared; what is not, and why; whether the model draws what the program does not."""
        reference = self._reference(wrapped, batch)
        reference.clipped = self.program.indefinite is Indefinite.CLIP
        reference.powers = (float(self.program.compiled.derived.scale.subs(N, self.size)),)
        self.saved = reference.saved if wrapped is self.wrapped else self.saved
        pairs = list(_values(reference, result))
        if self._wrong(pairs) and _draws(reference):
            return [], {}, True
        found, left = pairs_of(reference, self.program.quantities, result)
        unreached = reference.unreached if self.declared else frozenset()
        for name in sorted(unreached):
            left[repr(name)] = "only a rule of your own has a derivative by it"
        return pairs + [pair for pair in found if pair.parameter not in unreached], left, False

    # -- how much may differ

    def _wrong(self, pairs: Sequence[Pair]) -> list[Pair]:
        """A root of a Hessian that autograd has as zero (a softmax that is sure) has rounding that nothing measures."""
        some = {pair.quantity for pair in pairs if pair.largest}
        known = [pair for pair in pairs if pair.kind != ROOT or pair.quantity in some]
        largest = _largest(pairs)
        return [pair for pair in known if pair.error > self._tolerance(pair, largest)]

    def _tolerance(self, pair: Pair, by_quantity: Mapping[str, float]) -> float:
        twice = pair.kind in (ROOT, SECOND) and self.dtype == torch.float64
        relative = CLOSE.get(self.dtype, SHORT) * (TWICE if twice else 1)
        largest = by_quantity[pair.quantity]
        rounding = ROUNDING.get(self.dtype, FEW) * torch.finfo(self.dtype).eps * largest
        # where autograd has zero, what cancels leaves its rounding
        least = 0.0 if pair.largest >= NOTHING else NOTHING if largest else FEW * torch.finfo(self.dtype).eps
        return max(least, relative * max(pair.largest, pair.size) + min(rounding, relative * largest))

    def _worse(self, wrong: Sequence[Pair], pairs: Sequence[Pair], result: Result) -> list[Pair]:
        """Those of the differences that are not autograd's own rounding, seen from float64 throughout."""
        try:
            wrapped = deepcopy(self.wrapped).double()
            batch: Batch = pytree.tree_map(_double, self.batch)
            with copied(wrapped), InFloat64():  # type: ignore[no-untyped-call]
                exact, _, _ = self._pairs(wrapped, batch, result)
        except (_NotRunError, *FAILURES):  # it has numbers of this dtype inside, or is not copied
            return [pair for pair in wrong if pair.error > LOST * self._tolerance(pair, _largest(pairs))]
        by_key = {pair.key: pair.want for pair in exact}
        largest = _largest(pairs)
        return [pair for pair in wrong if self._is_worse(pair, by_key.get(pair.key, pair.want), largest)]

    def _is_worse(self, pair: Pair, exact: Tensor, largest: Mapping[str, float]) -> bool:
        """Whether the program is further from what is exact than autograd's rounding, and what that says of ours."""
        off = error(pair.want, exact)
        nothing = FEW * torch.finfo(self.dtype).eps if off > pair.largest / 2 else 0.0  # it is rounding itself
        return error(pair.got, exact) > max(WORSE * off + self._tolerance(pair, largest), nothing)

    def _certain(self, wrong: list[Pair], result: Result) -> list[Pair]:
        """Without tiny values that are rounding: autograd has others where the parameters' last digits are others."""
        tiny = {pair.key: 0.0 for pair in wrong if pair.parameter and pair.largest <= TINY}
        for factor in MOVED if tiny else ():
            try:
                wrapped = deepcopy(self.wrapped)
                with torch.no_grad():
                    for parameter in wrapped.parameters():
                        parameter.mul_(factor)
                with copied(wrapped):
                    moved = {pair.key: pair.want for pair in self._pairs(wrapped, self.batch, result)[0]}
            except (_NotRunError, *FAILURES):
                return wrong
            for pair in wrong:
                if pair.key in tiny and pair.key in moved:
                    tiny[pair.key] = max(tiny[pair.key], error(moved[pair.key], pair.want))
        return [pair for pair in wrong if not self._is_rounding(pair, tiny.get(pair.key, 0.0))]

    @staticmethod
    def _is_rounding(pair: Pair, off: float) -> bool:
        """Whether more than a tenth of it moves with the last digits, and the program is no further off than that."""
        return off > pair.largest / 10 and pair.error <= WORSE * max(pair.largest, off)

    # -- a difference

    def _digits(self) -> str:
        """What may be wrong with squares in a short dtype."""
        own = all(step.dtype is None for step in self.program.compiled.plan.steps)
        short = own and torch.finfo(self.dtype).bits < 32
        return f"squares in {self.dtype} have few digits, and small ones are 0: accumulate=torch.float32; " * short

    def _refuse(self, wrong: Sequence[Pair], pairs: Sequence[Pair]) -> NoReturn:
        first = wrong[0]
        difference, size = first.error, first.largest
        relative = f", {difference / size:.1g} of it" if size and difference < float("inf") else ""
        what = f"{first.of} of {_told(self.program.model, first.parameter)}" if first.parameter else first.of
        others = list(dict.fromkeys(p.parameter for p in wrong if p.parameter not in ("", first.parameter)))
        more = ", …" if len(others) > 5 else ""
        rest = f"\n  Also wrong: {', '.join(map(repr, others[:5]))}{more}." if others else ""
        rule = f" Rules of your own: {'; '.join(self.declared[:3])}." if self.declared else ""
        raise VerificationError(
            f"the program does not compute what PyTorch's autograd gives for {type(self.program.model).__name__} on "
            f"{_counted(self.size, 'sample')} of the example:\n  {what} differs by up to {difference:.3g}, where "
            f"autograd has values up to {size:.3g}{relative}.{rest}\n  Likely: {self._digits()}"
            f"{CAUSES[first.kind]}{rule}\n{NEXT}"
        )


def _largest(pairs: Sequence[Pair]) -> dict[str, float]:
    """The largest value that autograd has of each quantity."""
    found: dict[str, float] = {}
    for pair in pairs:
        found[pair.quantity] = max(pair.largest, found.get(pair.quantity, 0.0))
    return found


def _values(reference: Reference, result: Result) -> Iterator[Pair]:
    """The loss and the outputs that the program gives, as two pairs or more."""
    both = zip(pytree.tree_leaves(reference.output), pytree.tree_leaves(reference.graph.output), strict=False)
    given = [want for want, leaf in both if not isinstance(leaf, NotGiven)]
    for of, ours, theirs in (("the output", result.output, given), ("the loss", result.loss, reference.loss)):
        found, wanted = ([leaf for leaf in pytree.tree_leaves(tree) if leaf is not None] for tree in (ours, theirs))
        for got, want in zip(found, wanted, strict=False):
            if isinstance(got, Tensor) and isinstance(want, Tensor):
                yield Pair(of, "", got, want.detach(), kind=OUTPUT)


def _draws(reference: Reference) -> bool:
    """Whether another seed gives another output or loss."""
    torch.manual_seed(SEED + 1)
    loss, output = reference.wrapped(*reference.batch)
    both = zip(pytree.tree_leaves((loss, output)), pytree.tree_leaves((reference.loss, reference.output)), strict=True)
    return any(isinstance(a, Tensor) and not torch.equal(a, b) for a, b in both)


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf


def _told(model: nn.Module, parameter: str) -> str:
    """A parameter with the module that has it."""
    path, _, _ = parameter.rpartition(".")
    kind = type(model.get_submodule(path)).__name__
    return f"parameter {parameter!r} of module {path!r} ({kind})" if path else f"parameter {parameter!r} of the model"


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


def _line(size: int, pairs: Sequence[Pair], left: Mapping[str, str]) -> str:
    """What was compared, and what was not."""
    parts: dict[str, set[str]] = {}
    for pair in pairs:
        parts.setdefault(comment(pair.quantity), set()).add(pair.parameter)
    counts = {of: len(names - {""}) for of, names in parts.items()}
    shown = ", ".join(f"{of} of {_counted(count, 'parameter')}" if count else of for of, count in counts.items())
    text = f"checked on {_counted(size, 'sample')} against autograd: {shown}"
    return text + "".join(f"\nnot compared: {comment(name)}, {why}" for name, why in left.items())
