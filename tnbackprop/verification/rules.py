"""Rules against their own operators: forward code, formula, Jacobians, native VJPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.translate.graph import Call, Value, op_text
from ..definitions import oracle
from ..definitions.calls import (
    CODE_ERRORS,
    Env,
    Trace,
    formula_value,
    leg_sizes,
    operate,
    run_code,
    total_jacobian,
    with_lines,
)
from ..definitions.report import LeftOut, Row, deviation, wrong_entries
from ..diagram.core import BATCH, Leg, Window, leaves
from ..notation.bind import COTANGENT, COTANGENTS, BoundRule
from ..notation.code import Code, Native, Nth
from .diagnose import exchanged_operands, likely, moved_operands, same

LIMIT = 2_000_000
"""Entries of the largest Jacobian that is written out."""
STEP = 1e-6
"""How far a kink is looked for."""
Finding = Row | LeftOut


@dataclass(frozen=True)
class Subject:
    """One call with its rule and values. `case` says the shapes, `hint` what of the module differs from the others."""

    call: Call
    rule: BoundRule
    env: Env
    size: int
    case: str
    hint: str = ""
    options: dict[str, float] = field(default_factory=dict)

    @property
    def output(self) -> Tensor:
        return self.env[self.call.output.name]

    @property
    def who(self) -> str:
        """What is true: "the module"."""
        return "the module" if self.call.module is not None else op_text(self.call.target)

    @property
    def operands(self) -> dict[str, Value]:
        """What the output may be differentiated by, each value once, by the operand's name."""
        named = {value.name: name for name, value in reversed(self.call.tensors.items()) if value.differentiable}
        return {name: value for name, value in self.call.tensors.items() if named.get(value.name) == name}

    def legs(self, operand: Value) -> tuple[Leg, ...]:
        """The legs of an operand, those of size 1 left out; by axis where the rule does not say."""
        own = tuple(leg for leg in self.rule.legs.get(operand.name, ()) if leg.size != 1)
        if prod(leg_sizes(own, self.size)) == self.env[operand.name].numel():
            return own
        return tuple(Leg(f"axis{k}", size) for k, size in enumerate(self.env[operand.name].shape))

    @property
    def numbers(self) -> dict[str, float]:
        """What a factor may be: sizes of legs, options of the module."""
        legs = [leg for own in (*self.rule.legs.values(), self.rule.equations[-1].legs) for leg in own]
        written = [leg for leg in legs if leg != BATCH and leg.size != 1 and not leg.name[-1].isdigit()]
        return {leg.name.upper(): float(leg_sizes((leg,), self.size)[0]) for leg in written} | self.options


def options_of(module: nn.Module | None) -> dict[str, float]:
    """The numbers among the attributes of a module: what a formula may have forgotten."""
    own = {} if module is None else vars(module)
    numbers = {k: float(v) for k, v in own.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"the module's {name}": value for name, value in numbers.items() if not name.startswith("_")}


def subjects(traced: Trace, case: str, hint: str, only: type | None) -> Iterator[Subject]:
    """The calls of a trace that have a rule; those of one module class, if that is given."""
    for call, rule in traced.bound:
        if only is None or (call.module is not None and isinstance(call.module, only)):
            yield Subject(call, rule, traced.env, traced.size, case, hint, options_of(call.module))


def check_rule(subject: Subject, values: bool = True) -> Iterator[Finding]:
    """Rows for one call, up to the first that is wrong. `values`: also formula and forward, not only derivatives."""
    call, rule = subject.call, subject.rule
    if rule.fallback:
        native = "it has no formula, its VJP is native code"
        yield LeftOut(call.where, native if rule.forward else "it has no rule: VJPs by torch.func itself")
        return
    for finding in _findings(subject, values):
        yield finding
        if isinstance(finding, Row) and not finding.ok:
            return


def _findings(subject: Subject, values: bool) -> Iterator[Finding]:
    rule = subject.rule
    try:
        env = with_lines(rule, subject.env, subject.output, subject.size)
    except CODE_ERRORS as error:
        yield _row(subject, "saved code", "", subject.output, _raised("a saved tensor's code", error))
        return
    if values and rule.forward:
        yield _forward_code(subject, env)
    too_many = subject.output.numel() > LIMIT
    if values and rule.equations[-1].diagram is not None and not too_many:
        yield _formula(subject)
    for name, value in subject.operands.items():
        if subject.output.numel() * env[value.name].numel() > LIMIT:
            why = f"{subject.output.numel()} × {env[value.name].numel()} entries: give verify smaller shapes"
            yield LeftOut(f"Jacobian by '{name}' of {subject.call.where}", why)
        else:
            yield _jacobian(subject, env, name, value)
        for what, codes in (("native VJP", rule.vjp), ("native backward", rule.backward)):
            if value.name in codes:
                yield _native(subject, env, (what, name), value, codes[value.name])


def _function(subject: Subject, name: str) -> Callable[[Tensor], Tensor]:
    return lambda value: operate(subject.call, {**subject.env, name: value}, subject.size)


def _row(subject: Subject, what: str, of: str, want: Tensor, wrong: str, error: float = float("inf")) -> Row:
    whose = subject.call.where if subject.call.module is None else ""
    of = f"{of} in {whose}" if of and whose else of or whose
    return Row(what, of, subject.case, tuple(want.shape), error, wrong)


def _raised(what: str, error: BaseException) -> str:
    return f"  {what} raises {type(error).__name__}: {error}"


def compared(
    subject: Subject,
    what: tuple[str, str],
    said: str,
    symbol: str,
    got: Tensor,
    want: Tensor,
    legs: tuple[str, ...],
    cause: str = "",
) -> Row:
    """A row; where an entry is wrong, with the first one and its likely cause."""
    if not wrong_entries(got, want).any():
        return _row(subject, *what, want, "", deviation(got, want))
    text = first_entry(symbol, said, subject.who, got, want, legs)
    cause = cause or likely(got, want, legs, subject.numbers)
    text += f"\n  likely: {cause}" if cause else "\n  no usual slip explains it: compare text and forward, term by term"
    text += f"\n  {subject.hint}" if subject.hint else ""
    return _row(subject, *what, want, text, deviation(got, want))


def first_entry(symbol: str, said: str, who: str, got: Tensor, want: Tensor, legs: tuple[str, ...]) -> str:
    """output[n=0, o=1]: the formula gives 1.5, the module 2.5."""
    wrong = wrong_entries(got, want)
    index = tuple(int(k) for k in wrong.nonzero()[0])
    shown = ", ".join(f"{leg}={k}" for leg, k in zip(legs, index, strict=True))
    numbers = f"{said} gives {float(got[index]):.9g}, {who} {float(want[index]):.9g}"
    return f"  {symbol}[{shown}]: {numbers}  ({int(wrong.sum())} of {wrong.numel()} entries are wrong)"


def _names(legs: tuple[Leg, ...]) -> tuple[str, ...]:
    return tuple(leg.name for leg in legs)


def _forward_code(subject: Subject, env: Env) -> Row:
    legs, want = _by_legs(subject)
    try:
        got = run_code(subject.rule.forward, env)
    except CODE_ERRORS as error:
        return _row(subject, "forward code", "", want, _raised("the forward code", error))
    if got.numel() != want.numel():
        shapes = f"  the forward code gives shape {list(got.shape)}, {subject.who} {list(subject.output.shape)}"
        return _row(subject, "forward code", "", want, shapes)
    got = got.reshape(want.shape).to(want.dtype)
    cause = "" if same(got, want) else _why_code(subject, env, subject.rule.forward, want)
    return compared(subject, ("forward code", ""), "the code", "output", got, want, _names(legs), cause)


def _why_code(subject: Subject, env: Env, code: Native, want: Tensor) -> str:
    """Slips of torch code: an operand that it does not read, or reads transposed."""
    for name, value in subject.operands.items():
        unread = value.name not in code.holes and COTANGENT not in code.holes
        if unread and oracle.jacobian(_function(subject, value.name), env[value.name]).any():
            return f"it never reads '{name}', and the output depends on it: a forgotten term or factor"
        for which, other in exchanged_operands(env[value.name]):
            if same(_ran(code, {**env, value.name: other}).reshape(want.shape), want):
                return f"transposed: it is right with {which} of '{name}' exchanged"
    return ""


def _by_legs(subject: Subject) -> tuple[tuple[Leg, ...], Tensor]:
    legs = subject.rule.equations[-1].legs
    return legs, subject.output.reshape(leg_sizes(legs, subject.size))


def _formula(subject: Subject) -> Row:
    legs, want = _by_legs(subject)
    got = formula_value(subject.rule, subject.env, subject.output, subject.size)
    cause = "" if same(got, want) else _why_formula(subject, got, want)
    return compared(subject, ("formula", ""), "the formula", "output", got, want, _names(legs), cause)


def _why_formula(subject: Subject, got: Tensor, want: Tensor) -> str:
    """Slips of the whole formula: an operand that is not read, read transposed, or read at another place."""
    legs, rule = subject.rule.equations[-1].legs, subject.rule
    diagrams = [equation.diagram for equation in rule.equations if equation.diagram is not None]
    read = {name for diagram in diagrams for name in leaves(diagram)}
    windows = any(isinstance(op, Window) for diagram in diagrams for p in diagram.products for op in p.operands)
    for name, value in subject.operands.items():
        if value.name not in read and oracle.jacobian(_function(subject, value.name), subject.env[value.name]).any():
            return f"the formula never reads '{name}', and the output depends on it: a forgotten term or factor"
    cause = likely(got, want, _names(legs), subject.numbers)
    if cause:
        return cause
    for name, value in subject.operands.items():
        own = subject.env[value.name]
        for which, other in exchanged_operands(own):
            if _right_with(subject, value, other, want):
                return f"transposed: it is right with {which} of '{name}' exchanged"
        for which, other in moved_operands(own, range(2, own.ndim)) if windows else ():
            if _right_with(subject, value, other, want, part=0.6):
                return f"wrong offset in '{name}': {which} (padding, stride or dilation)"
    return _why_line(subject, want) or _by_jacobians(subject)


def _why_line(subject: Subject, want: Tensor) -> str:
    """A line that is right with another factor: that of a mean, or the sign."""
    for equation in subject.rule.equations[:-1]:
        for name, number in {"-1": -1.0, **subject.numbers}.items():
            for text, factor in ((f"divided by {name}", 1 / number), (f"times {name}", number)) if number else ():
                factors = {equation.name: factor}
                got = formula_value(subject.rule, subject.env, subject.output, subject.size, factors)
                if same(got, want):
                    line = equation.name.removeprefix(f"{subject.call.output.name}:")
                    return f"wrong factor in the line of '{line}': it is right {text}" + (
                        " (as in a mean)" if factor < 1 and name.isupper() else ""
                    )
    return ""


def _right_with(subject: Subject, value: Value, other: Tensor, want: Tensor, part: float = 1.0) -> bool:
    """Whether the formula is right for another value of an operand, at least in this part of the entries."""
    got = formula_value(subject.rule, {**subject.env, value.name: other}, subject.output, subject.size)
    right = ~wrong_entries(got, want)
    return float((right & (want != 0)).sum()) >= part * float((want != 0).sum())


def _by_jacobians(subject: Subject) -> str:
    """Which operand the formula treats wrongly."""
    env = with_lines(subject.rule, subject.env, subject.output, subject.size)
    wrong = []
    for name, value in subject.operands.items():
        if subject.output.numel() * env[value.name].numel() > LIMIT:
            return ""
        want = oracle.jacobian(_function(subject, value.name), env[value.name].contiguous())
        got, want, legs = _jacobian_pair(subject, env, value, want)
        if not same(got, want):
            cause = likely(got, want, legs, subject.numbers)
            if cause:
                return f"in its dependence on '{name}': {cause}"
            wrong.append(f"'{name}'")
    if not wrong:
        return "every derivative is right: a constant is added that should not be, or is missing"
    return f"in its dependence on {', '.join(wrong)}"


def _jacobian_pair(subject: Subject, env: Env, value: Value, want: Tensor) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """The Jacobian of the rule and the true one, one axis per leg, with the names of the legs."""
    out, into = subject.rule.equations[-1].legs, subject.legs(value)
    shape = (*leg_sizes(out, subject.size), *leg_sizes(into, subject.size))
    found = total_jacobian(subject.rule, value.name, env, subject.size)
    got = want.new_zeros(shape) if found is None else found.reshape(shape)
    return got, want.reshape(shape), (*_names(out), *(f"{leg.name}'" for leg in into))


def _jacobian(subject: Subject, env: Env, name: str, value: Value) -> Row:
    want = oracle.jacobian(_function(subject, value.name), env[value.name].contiguous())
    got, want, legs = _jacobian_pair(subject, env, value, want)
    declared = value.name in subject.rule.equations[-1].jacobians
    what, said = ("Jacobian", f"'{name}'"), "the declared Jacobian" if declared else "the formula's Jacobian"
    cause = ""
    if not same(got, want):
        at_kinks = wrong_entries(got, want) & ~_smooth(subject, value, want)
        if same(torch.where(at_kinks, want, got), want):
            cause = f"a kink: {subject.who} has no derivative there, and torch takes another value than the rule"
            if subject.rule.kinks:  # said in the rule, so meant
                return _row(subject, *what, want, "", 0.0)
            cause += "\n  take torch's, or say in kinks= what the rule takes"
        elif not declared and value.name not in _read(subject.rule) and not got.any():
            cause = f"the formula never reads '{name}', and the output depends on it"
    return compared(subject, what, said, f"∂output/∂{name}", got, want, legs, cause)


def _read(rule: BoundRule) -> set[str]:
    return {name for e in rule.equations if e.diagram is not None for name in leaves(e.diagram)}


def _smooth(subject: Subject, value: Value, want: Tensor) -> Tensor:
    """Where the true Jacobian does not jump when the operand is moved a little, up or down."""
    at, function = subject.env[value.name].contiguous(), _function(subject, value.name)
    steps = torch.linspace(1, 2, at.numel(), dtype=at.dtype).reshape(at.shape) * STEP  # not alike: ties break, too
    sides = [oracle.jacobian(function, at + step).reshape(want.shape) for step in (steps, -steps)]
    smooth: Tensor = (sides[0] - sides[1]).abs() <= 1e-2 * want.abs().max().clamp(min=1.0)
    return smooth


def _both(g: Tensor) -> dict[str, Tensor]:
    """The cotangent under the names that native code may read it by."""
    return {COTANGENT: g, COTANGENTS: g}


def _ran(code: Native, env: Env) -> Tensor:
    """What native code gives; of a kernel with several results one of them."""
    whole = code.code if isinstance(code, Nth) else code
    assert isinstance(whole, Code)  # an operator without a rule is not checked here
    result: Any = run_code(whole, env)
    found: Tensor = result[code.place] if isinstance(code, Nth) else result
    return found


def _native(subject: Subject, env: Env, who: tuple[str, str], value: Value, code: Native) -> Row:
    """Jᵀ g by the rule's own code, for a random g; then for g of one sample alone, which must stay there."""
    name, at = who[1], env[value.name]
    what = who[0], f"'{name}'"
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(subject.output.shape, generator=generator, dtype=at.dtype)
    want = oracle.vjp(_function(subject, value.name), at.contiguous(), g)
    try:
        got = _ran(code, {**env, **_both(g)})
        alone = _ran(code, {**env, **_both(_first_only(g))})
    except CODE_ERRORS as error:
        return _row(subject, *what, want, _raised("the code", error))
    if got.numel() != want.numel():
        return _row(subject, *what, want, f"  the code gives shape {list(got.shape)}; '{name}' has {list(at.shape)}")
    legs = subject.legs(value)
    shape = leg_sizes(legs, subject.size)
    sampled = bool(value.axes) and value.axes[0] == subject.call.output.axes[:1][0] and subject.size > 1
    cause = ""
    if sampled and alone.reshape(at.shape)[1:].any():
        cause = "it mixes samples: a cotangent of sample 0 alone reaches the others (the Jacobian is batch-diagonal)"
    got, want = got.reshape(shape), want.reshape(shape)
    if not cause and not same(got, want):
        cause = likely(got, want, _names(legs), subject.numbers)
        cause = cause or _why_code(subject, {**env, COTANGENT: g}, code, want)
    return compared(subject, what, "the code", f"(Jᵀg)_{name}", got, want, _names(legs), cause)


def _first_only(g: Tensor) -> Tensor:
    only = torch.zeros_like(g)
    if g.ndim:
        only[:1] = g[:1]
    return only
