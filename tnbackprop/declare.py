"""Rules of one's own: the registry that `compile` reads where no ``rules=`` are passed, and functions as targets.

A layer is declared by nothing (a module written with operations that have rules), by its formula, or by its Jacobian:
`Rule` holds either. A rule is entered for a target, which is a module class, an operator (an overload, or a
`torch.library.custom_op`), or a `primitive`. A subclass has the rule of its nearest base; one with a forward of its own
needs a rule of its own. What is entered is a function of the module (of the `Call` for the other targets), so that a
rule may depend on options, or a constant `Rule` or text. Two ways lead to `compile`:

    rules = tn.RULES | {MyLayer: "output[n, i] = gain[i] * exp(input[n, i])"}     passed: tn.compile(…, rules=rules)

    @tn.rule(MyLayer)                                                             registered
    def my_layer(layer): ...

A target has one rule: another one, for a built-in target too, needs ``override=True``. `registered` undoes at its end
what was registered inside. The registry belongs to the process; rules that are passed leave it aside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from .compiler.translate.torch_internals import OpOverload, OpOverloadPacket, overload_of
from .errors import RuleError, UnsupportedError
from .notation.parse import parse_access, parse_expression, parse_program
from .notation.rule import Primitive, Rule
from .rules import RULES
from .table import RuleFunction, Rules, Table

Declaration = RuleFunction | Rule | str
"""A row: a function of the module or the call, or what it would return for each."""
_D = TypeVar("_D", bound=Declaration)

REGISTRY = Table()
"""The rules entered by `rule`: with `RULES` they are what `compile` uses where no ``rules=`` are passed."""


def rule(*targets: Any, override: bool = False) -> Callable[[_D], _D]:
    """Register the decorated row for the targets: ``@tn.rule(MyLayer)``, or ``tn.rule(MyLayer)("output[…] = …")``.

    targets   module classes, operators (`torch.ops` overloads, custom ops), primitives
    override  replace the rule that a target already has, a built-in one included

    Raises `RuleError` where a target cannot have a rule or has one, where the row is none of a function, a `Rule` and
    text, and where constant text is no formula.
    """
    if not targets:
        raise RuleError("a rule needs a target", hint="write @tn.rule(MyLayer)")
    keys = [target_of(target) for target in targets]
    for key in keys:
        if key in RULES and not override:
            raise RuleError(f"{_shown(key)} has a built-in rule: pass override=True to replace it")

    def enter(declared: _D) -> _D:
        REGISTRY.rule(*keys, override=override)(row_of(declared, keys[0]))
        return declared

    return enter


@contextmanager
def registered(*tables: Mapping[Any, Declaration], override: bool = False) -> Iterator[Table]:
    """While it is open the rules of the tables are registered; at its end the registry is as it was before.

    ``with tn.registered():`` keeps what `rule` registers inside, in an imported file for instance, from staying.
    """
    before = dict(REGISTRY)
    try:
        for table in tables:
            for target, declared in table.items():
                rule(target, override=override)(declared)
        yield REGISTRY
    finally:
        REGISTRY.clear()
        REGISTRY.update(before)


def primitive(function: Callable[..., torch.Tensor]) -> Primitive:
    """A function of tensors that a rule can describe: ``@tn.primitive``, then ``@tn.rule(that_function)``.

    Where it has a rule, a call of it is one node of the captured model, with the names of its arguments as operands;
    where it has none it is what it was, its own operations. It returns one tensor.
    """
    if isinstance(function, Primitive | type) or not hasattr(function, "__name__"):
        raise RuleError(f"{function!r} is no plain function: only that can be a primitive")
    return Primitive(function)


def resolve(rules: Mapping[Any, Declaration] | None) -> Rules:
    """Rules as the compiler takes them: the built-in and the registered ones for None, else exactly those passed."""
    if rules is None:
        return RULES | REGISTRY
    _check_mapping(rules)
    table = Table()
    for target, declared in rules.items():
        known = RULES.get(target) if declared is RULES.get(target) else None
        key = target if known else target_of(target)
        table.rule(key)(known or row_of(declared, key))
    return table


@contextmanager
def told_of_replaced(rules: Mapping[Any, Declaration] | None) -> Iterator[None]:
    """What is refused says so where the rules that were passed leave all of the built-in ones out."""
    try:
        yield
    except UnsupportedError as error:
        if rules is None or not RULES.keys().isdisjoint(rules):
            raise
        hint = "rules= is the whole table, and has none of the built-in rules: write rules=tn.RULES | {…}"
        raise UnsupportedError(f"{error}\n  {hint}") from None


def target_of(target: Any) -> Any:
    """The key of a target in a table. Raises `RuleError` where it cannot have a rule."""
    target = overload_of(target)
    if isinstance(target, OpOverloadPacket):
        overloads = target.overloads()  # type: ignore[no-untyped-call]
        if len(overloads) > 1:
            raise RuleError(f"{target} has several overloads: name one of {', '.join(f'.{o}' for o in overloads)}")
        target = getattr(target, overloads[0])
    if isinstance(target, OpOverload | Primitive):
        return target
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        if target is torch.nn.Module:
            raise RuleError("a rule for every torch.nn.Module is none: name a class of your own")
        return target
    if isinstance(target, torch.nn.Module):
        raise RuleError(
            f"a rule is for a class: name {type(target).__name__}, not one of its instances",
            hint="one module that differs has a class of its own, or is made by tn.einsum_layer",
        )
    if callable(target) and not isinstance(target, type):
        name = getattr(target, "__name__", repr(target))
        raise RuleError(
            f"{name} is a plain function: it leaves no trace in the captured graph, so a rule would never be used",
            hint="decorate it with @tn.primitive, or make it a module or a torch.library.custom_op",
        )
    raise RuleError(f"{target!r} cannot have a rule: a target is a module class, an operator or a tn.primitive")


def row_of(declared: Declaration, target: Any) -> RuleFunction:
    """The row of a declaration; constant text is parsed now, so that its errors are told where it is written."""
    if isinstance(declared, str):
        declared = Rule(declared)
    if isinstance(declared, Rule):
        _check_text(declared)
        constant = declared
        return lambda call: constant
    if not callable(declared) or isinstance(declared, type):
        raise RuleError(
            f"the rule for {_shown(target)} is {declared!r}",
            hint="give a function of the module or call, a tn.Rule, or its formula as text",
        )
    return declared


def _check_mapping(rules: object) -> None:
    if not isinstance(rules, Mapping):
        raise RuleError(f"rules is {type(rules).__name__}, not a mapping", hint="write tn.RULES | {MyLayer: my_rule}")


def _check_text(constant: Rule) -> None:
    if constant.formula.strip() or not (constant.jacobian or (constant.forward and constant.vjp)):
        parse_program(constant.formula)
    for expression in constant.jacobian.values():
        parse_expression(expression)
    for key in constant.saved:
        if "[" in key:
            parse_access(key)


def _shown(target: Any) -> str:
    return target.__name__ if isinstance(target, type) else str(target)
