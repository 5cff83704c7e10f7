"""A rule on modules of its class: separate samples, the rule itself, then every quantity of what it gives."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..api import compile
from ..compiler.translate.foreign import foreign
from ..definitions.calls import BUILD_ERRORS, trace
from ..definitions.report import LeftOut, Row, wrong_entries
from ..errors import InputError, RuleError
from ..notation.rule import Rule
from ..quantities import Quantity
from ..table import RuleFunction, Rules
from .draws import Inputs, Made, Sizes, modules, unsettled
from .models import compare_quantities, filled, programs_for
from .quantities import ALL, FEW
from .rules import Finding, check_rule, first_entry, subjects


def tried_with(module: Any) -> tuple[list[Made], list[LeftOut]]:
    """The modules that a rule is tried with."""
    if isinstance(module, type) and issubclass(module, nn.Module):
        return modules(module)
    given = [module] if isinstance(module, nn.Module) else list(module) if isinstance(module, list | tuple) else []
    if not given or not all(isinstance(each, nn.Module) for each in given):
        raise InputError("a rule is verified with its module: verify(rule, module=MyLayer), or module=MyLayer(3, 2)")
    return [Made(each, str(each)) for each in given], []


class _Behind(nn.Module):
    """A module behind a shift of its inputs: quantities of the shift are derivatives by the input."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.module = module
        self.input = nn.ParameterDict({k: torch.zeros_like(v[0]) for k, v in inputs.items() if v.is_floating_point()})

    def forward(self, **inputs: Tensor) -> Tensor:
        shifted = {k: v + self.input[k] if k in self.input else v for k, v in inputs.items()}
        result: Tensor = self.module(**shifted)
        return result


@dataclass(frozen=True)
class _Trial:
    """A module with the rules it is compiled with; `hint` says what of it differs from the first one."""

    module: nn.Module
    target: type[nn.Module]
    rules: Rules
    text: str
    hint: str

    def case(self, x: Mapping[str, Tensor]) -> str:
        return f"{self.text}, N = {next(iter(x.values())).shape[0]}, {_shapes(x)}"


def try_rule(
    row: RuleFunction,
    target: type[nn.Module],
    made: list[Made],
    left_out: list[LeftOut],
    x: Any,
    quantities: Sequence[Quantity] | None,
    rules: Rules,
) -> Iterator[Finding]:
    """Every module with every shape; all quantities with the first, few with the others."""
    yield from left_out
    tried = False
    for each in made:
        with foreign(f"the row for {target.__name__}", RuleError):
            rule = row(each.module)
        rule = rule if isinstance(rule, Rule) else Rule(rule)
        hint, name = "", each.changed.split("=")[0]
        if each.changed:
            hint = f"it is right for {made[0].text}, and wrong with {each.changed}: does the rule use '{name}'?"
        trial = _Trial(unsettled(each.module), target, {**rules, target: row}, each.text, hint)
        for inputs in _drawn(trial.module, rule, x, every=not tried, units=each is not made[0] and not each.changed):
            if isinstance(inputs, LeftOut):
                yield inputs
                continue
            yield from _try(trial, inputs, quantities or (FEW if tried else ALL), kinks=not tried)
            tried = True


def _shapes(inputs: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(value.shape)}" for name, value in inputs.items())


def _drawn(module: nn.Module, rule: Rule, x: Any, every: bool, units: bool) -> Iterator[dict[str, Tensor] | LeftOut]:
    """Inputs of several shapes: the first must run; of the others, those that do not are left out."""
    wanted = Inputs(module, rule)
    if x is not None:
        inputs = _given(wanted, x)
        problem = _fails(module, inputs)
        if problem:
            raise InputError(f"{type(module).__name__} fails on {_shapes(inputs)}: {problem}\n  Pass x that fits it.")
        yield inputs
        return
    ones = replace(Sizes(2), free=(1,), image=(1,), star=(1,))
    settings = [ones] if units else [Sizes(3)]
    settings += [Sizes(2, star=()), Sizes(2, star=(1, 3))] if wanted.has_star and every else []
    settings += [ones] if every and not units else []
    for sizes in settings:
        others = [replace(sizes, image=(k,)) for k in (2, 3, 5, 9)]
        others += [replace(sizes, free=(k,)) for k in (3, 4, 5, 2, 1)]
        problems = []
        for inputs in (wanted.draw(other) for other in (sizes, *others)):
            problem = _fails(module, inputs)
            if not problem:
                yield inputs
                break
            problems.append(f"{type(module).__name__} fails on {_shapes(inputs)}: {problem}")
        else:
            if sizes is settings[0] and not units:
                raise InputError(f"{problems[0]}\n  Pass x that fits it.")
            yield LeftOut(f"{module}", problems[0])


def _given(wanted: Inputs, x: Any) -> dict[str, Tensor]:
    """The user's own inputs, by the names of forward's arguments."""
    x = filled(x)
    given = dict(x) if isinstance(x, Mapping) else None
    if given is None:
        args = x if isinstance(x, tuple | list) else (x,)
        given = dict(zip(wanted.names, args, strict=False))
    return {name: value.double() if value.is_floating_point() else value for name, value in given.items()}


def _fails(module: nn.Module, inputs: Mapping[str, Tensor]) -> str:
    """What forward raises; "" where it runs."""
    try:
        with torch.no_grad():
            output = module(**inputs)
    except BUILD_ERRORS as error:
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return "" if isinstance(output, Tensor) else f"it returns {type(output).__name__}, and a rule is for one tensor"


def _try(trial: _Trial, inputs: dict[str, Tensor], quantities: Sequence[Quantity], kinks: bool) -> Iterator[Finding]:
    """One module with one shape: separate samples, the rule itself for N and for 1 and at kinks, the quantities."""
    separate = _separate(trial, inputs)
    yield separate
    if not separate.ok:
        return
    behind = _Behind(trial.module, inputs)
    y = torch.randn_like(trial.module(**inputs))
    try:
        alone = compile(behind, None, (inputs, None), [], rules=trial.rules, check=False)
    except RuleError as error:
        if not trial.hint:
            raise
        text = "\n".join(f"  {line}" for line in (*str(error).splitlines(), trial.hint))
        yield Row("formula", "", trial.case(inputs), tuple(y.shape), float("inf"), text)
        return
    one = {name: v[:1] for name, v in inputs.items()}
    whole = {name: torch.randn_like(v).mul(2).round() if v.is_floating_point() else v for name, v in inputs.items()}
    tries = [(inputs, ""), (one, "")]
    tries += [(whole, ", whole numbers")] if kinks and torch.isfinite(trial.module(**whole)).all() else []
    for x, how in tries:
        traced = trace(alone, x, None, next(iter(x.values())).shape[0])
        for subject in subjects(traced, trial.case(x) + how, trial.hint, trial.target):
            yield from check_rule(subject, values=not how)
    programs, left_out = programs_for(behind, nn.MSELoss(), (inputs, y), quantities, trial.rules)
    yield from left_out
    for program in programs:
        for x in (inputs, one):
            size = next(iter(x.values())).shape[0]
            for finding in compare_quantities(program, x, y[:size], size, trial.case(x), means=x is inputs):
                yield _of_the_module(finding)


def _of_the_module(finding: Finding) -> Finding:
    """Parameters by their name in the module, inputs by that in its forward: without the shift in front of it."""
    if isinstance(finding, LeftOut):
        return finding
    of, wrong = (re.sub(r"'(?:module|input)\.", "'", text) for text in (finding.of, finding.wrong))
    return replace(finding, of=of, wrong=wrong)


def _separate(trial: _Trial, inputs: dict[str, Tensor]) -> Row:
    """Whether the output for one sample depends on that sample alone, and on nothing drawn."""
    module, case = trial.module, trial.case(inputs)
    changed = {name: torch.cat([v[:1].flip(0) + 1, v[1:]]) for name, v in inputs.items() if v.is_floating_point()}
    with torch.no_grad():
        before, again, after = (module(**each) for each in (inputs, inputs, inputs | changed))
    if not torch.equal(before, again):
        raise InputError(f"{type(module).__name__} gives another output each time (dropout?): call .eval() first")
    after = torch.cat([before[:1], after[1:]])
    if not wrong_entries(before, after).any():
        return Row("independence of samples", "", case, tuple(before.shape), 0.0)
    axes = ("n", *(f"axis{k}" for k in range(1, before.ndim)))
    text = first_entry("output", "the module", "with another sample 0 it", before, after, axes)
    cause = "the module mixes samples: its Jacobian is not batch-diagonal, and there are no individual gradients"
    return Row("independence of samples", "", case, tuple(before.shape), float("inf"), f"{text}\n  likely: {cause}")
