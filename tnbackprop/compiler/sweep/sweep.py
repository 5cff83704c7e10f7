"""One reverse sweep: cotangents pulled back call by call, and the uses of every parameter.

The cotangent of a value that has the batch is computed once and named; a value made of parameters only (a transposed
weight, A @ B) has one cotangent per sample, which stays a diagram; a value behind the sum over the batch is a scalar of
the loss, and its cotangent is a constant.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import sympy

from ...diagram.algebra import Uses, identity, inline, pull_back, tensor
from ...diagram.core import BATCH, Delta, Diagram, Leg, N, Part, Product, fresh_names, leaves
from ...diagram.jacobian import Jacobian
from ...diagram.regroup import common, regroup
from ...diagram.simplify import simplify
from ...errors import FormulaError, UnsupportedError
from ...notation.bind import BoundRule, Equation
from ..translate.graph import Call, Graph
from .condense import gathered, outer_product
from .derived import Backward, Individual, Joint, Native
from .extract import extract, propagated
from .lines import casts, casts_alone, columns_by_formula, jacobian_of, lines_to, operands_of, selects, unchanged
from .state import Sweep, all_uses


def run(sweep: Sweep, bound: tuple[tuple[Call, BoundRule], ...]) -> None:
    """The reverse sweep over bound calls, with the quantities of each parameter as soon as its uses are known."""
    graph = sweep.graph
    classify(sweep, bound)
    last_use = _first_call_of_each_parameter(graph, bound)
    extract(sweep, [p for p in last_use if last_use[p] is None])
    for position in reversed(range(len(bound))):
        call, rule = bound[position]
        if not sweep.until and call.output.name in sweep.meetings and sweep.reached(call.output.name):
            sweep.until = call.output.name
            schedule(sweep, sweep.until)
        if not sweep.until:
            _sweep_call(sweep, call, rule)
        extract(sweep, [p for p, first in last_use.items() if first == position])


def classify(sweep: Sweep, bound: tuple[tuple[Call, BoundRule], ...]) -> None:
    graph = sweep.graph
    for name, value in graph.values.items():
        sweep.samples[name] = any(N in axis for axis in value.axes)
        sweep.reads[name] = name in graph.inputs
        sweep.depends[name] = frozenset(value.depends_on)
    rules = {call.output.name: rule for call, rule in bound}
    for call in graph.calls:
        reads = any(sweep.reads[v.name] for v in call.tensors.values())
        sweep.reads[call.output.name] = reads
        sweep.counts[call.output.name] = _counts(sweep, call.output.name, [v.name for v in call.tensors.values()])
        for equation in rules[call.output.name].equations if call.output.name in rules else ():
            sweep.samples[equation.name] = BATCH in equation.legs
            # a line of parameters alone reads no sample, whatever the others read; a saved tensor may
            own = any(sweep.reads.get(name, reads) for name in operands_of(equation))
            sweep.reads[equation.name] = reads if equation.name == call.output.name else own
            sweep.counts[equation.name] = _counts(sweep, equation.name, operands_of(equation))
            sweep.owner[equation.name] = call
            behind = (sweep.depends.get(name, frozenset()) for name in operands_of(equation))
            sweep.depends.setdefault(equation.name, frozenset().union(*behind))


def _counts(sweep: Sweep, name: str, read: Iterable[str]) -> bool:
    """Whether a value without samples is made of one with them, which does not depend on them: a size alone."""
    made = any(sweep.samples.get(each, False) or sweep.counts.get(each, False) for each in read)
    return made and not (sweep.samples[name] or sweep.reads[name])


def _first_call_of_each_parameter(graph: Graph, bound: tuple[tuple[Call, BoundRule], ...]) -> dict[str, int | None]:
    """For each trainable parameter the first call that depends on it: after that call no use is left."""
    found: dict[str, int | None] = {name: None for name in graph.parameters if graph.values[name].depends_on}
    for k, (call, _) in enumerate(bound):
        for value in call.tensors.values():
            if found.get(value.name, k) is None:
                found[value.name] = k
    return found


def _sweep_call(sweep: Sweep, call: Call, rule: BoundRule) -> None:
    """Pull the cotangent of the call's output back to its operands, along the rule's lines or by native code."""
    if not any(sweep.reached(equation.name) for equation in rule.equations):
        return
    trainable = {v.name for v in call.tensors.values() if v.differentiable}
    before = {name: len(terms) for name, terms in sweep.terms.items()} if rule.backward else {}
    for name in sorted(trainable & set(rule.vjp)):  # the same source every time
        own = rule.fallback or not (sweep.reads[name] or casts_alone(sweep.graph, call, name))
        if own and not sweep.samples[name]:  # a scalar of the loss has its formula
            if sweep.reads[name]:
                raise _no_sum(f"{call.where} reads a sum over them, and has no rule that says it is linear")
            _pull_individually(sweep, call, rule, name)
            trainable.discard(name)
    native = {name for name in trainable & set(rule.vjp) if sweep.samples[name] and sweep.samples[call.output.name]}
    native = native if sweep.reached(call.output.name) else set()
    if sweep.twice and not rule.fallback and len(rule.equations) > 1:
        native = set()
    if sweep.along is not None:  # native code is J, and may not be what is propagated with
        if rule.fallback:
            raise FormulaError(f"{call.where} has no rule, and only its VJP is known.\n  Declare one: README.")
        native = {name for name in native if unchanged(sweep.along, rule.equations[-1], name)}
    native -= {
        name
        for name in native
        if sweep.several and not casts(sweep.graph, call, name) and columns_by_formula(rule, name)
    }
    for name in sorted(native):
        cotangent = f"{sweep.prefix}:{call.output.name}"
        pulled = Native(rule.vjp[name], cotangent, call.output.name, _formula(sweep, rule, name, cotangent))
        sweep.terms.setdefault(name, []).append(pulled)
    if native:
        schedule(sweep, call.output.name)
    wanted = lines_to(rule.equations, trainable - native)
    for equation in reversed(rule.equations):
        for operand in operands_of(equation):
            if operand in wanted and sweep.reached(equation.name):
                _pull(sweep, call, rule, equation, operand)
    for name in sorted(trainable & set(rule.backward) - set(rule.vjp)) if rule.fallback else ():
        _sum_alone(sweep, call, rule, name)
    if set(rule.backward) <= set(rule.vjp) or not rule.fallback:
        sweep.kernels |= _kernels(sweep, call, rule, before)


def _kernels(sweep: Sweep, call: Call, rule: BoundRule, before: Mapping[str, int]) -> Iterator[tuple[str, Joint]]:
    """The kernels that give gradients of the call's parameters with what is propagated to its operand with samples."""
    own, into = call.output.name, [name for name in rule.backward if sweep.samples[name]]
    native = {name: Native(code, f"{sweep.prefix}:{own}", own) for name, code in rule.backward.items()}
    operands = [name for name in into if len(sweep.terms.get(name, ())) > before.get(name, 0)]
    known = len(operands) == 1 and not sweep.lead and sweep.along is None
    for name in native if known else ():
        if name in sweep.graph.parameters and not casts(sweep.graph, call, name):
            read = _individual(sweep, call, name) if rule.fallback else native[name].cotangent
            place = before.get(operands[0], 0)
            yield name, Joint(native[name], read, False, operands[0], place, native[operands[0]])


def _sum_alone(sweep: Sweep, call: Call, rule: BoundRule, name: str) -> None:
    """A parameter of which a kernel gives the gradient and nobody anything else: no one builds its Jacobian."""
    if name not in sweep.graph.parameters or sweep.lead or sweep.along is not None or casts(sweep.graph, call, name):
        raise FormulaError(f"{call.where} has no formula, and only the gradient of its parameters is known.")
    output = rule.equations[-1]
    sizes = [size for size in sweep.graph.values[name].shape if size != 1]
    into = tuple(Leg(f"a{k}'", size) for k, size in enumerate(sizes))
    jacobian = Jacobian(tensor(f"{output.name}:by:{name}", (*output.legs, *into)), output.legs, into)
    sweep.uses.setdefault(name, []).append((jacobian, cotangent(sweep, output.name, output.legs)))
    own = Native(rule.backward[name], f"{sweep.prefix}:{output.name}", output.name)
    sweep.kernels[name] = Joint(own, own.cotangent, alone=True)


def _pull_individually(sweep: Sweep, call: Call, rule: BoundRule, name: str) -> None:
    """Native code for a parameter gives its individual VJPs as a value; the use is then the identity."""
    output = rule.equations[-1]
    cotangent = f"{sweep.prefix}:{output.name}"  # what was propagated to it on its own has another name
    if sweep.samples[output.name]:
        schedule(sweep, output.name)
    elif all(item.name != cotangent for item in sweep.schedule if isinstance(item, Backward)):
        sweep.scheduled.add(output.name)
        uses, g = all_uses(sweep, output.name)
        sweep.schedule.append(Backward(cotangent, output.name, (uses.T @ g,), call.where))
    own = _individual(sweep, call, name)
    sweep.schedule.append(Individual(own, name, Native(rule.vjp[name], cotangent, output.name)))
    sizes = [size for size in sweep.graph.values[name].shape if size != 1]
    out = tuple(Leg(f"a{k}", size) for k, size in enumerate(sizes))
    sweep.uses.setdefault(name, []).append((identity(out), tensor(own, (*sweep.lead, BATCH, *out))))


def _individual(sweep: Sweep, call: Call, name: str) -> str:
    """How the individual VJPs of a call by a parameter are called."""
    return f"{sweep.prefix}::{name}:{call.output.name}"


def _formula(sweep: Sweep, rule: BoundRule, name: str, cotangent: str) -> Diagram | None:
    """What native code computes of several columns, if the rule selects."""
    equation, *others = rule.equations
    jacobian = jacobian_of(equation, name) if sweep.several and not others else None
    if jacobian is None or not selects(jacobian.diagram):
        return None
    into = tuple(BATCH if leg.size == N else leg for leg in jacobian.into)
    return pull_back(jacobian, tensor(cotangent, (*sweep.lead, *equation.legs)), sweep.lead, into)


def _pull(sweep: Sweep, call: Call, rule: BoundRule, equation: Equation, operand: str) -> None:
    jacobian = jacobian_of(equation, operand)
    if jacobian is None or not jacobian.diagram.products:
        return
    if sweep.adds is not None and (more := sweep.adds(call, rule, equation, operand)) is not None:
        add(sweep, operand, more, sweep.samples[operand])
    if sweep.along is not None:
        jacobian = sweep.along(jacobian)
    out_samples, in_samples = sweep.samples[equation.name], sweep.samples[operand]
    whole = {leaf for leaf in leaves(jacobian.diagram) if not sweep.samples.get(leaf, True)}
    if in_samples and not out_samples and any(_varies(sweep, leaf) for leaf in whole):
        raise _no_sum(f"what {call.where} takes of one depends on the others")
    gathers = out_samples and not sweep.reads[operand] and equation.name not in sweep.meetings
    outer = None
    if gathers and selects(jacobian.diagram):
        outer = outer_product(sweep.terms.get(equation.name, ()), (*sweep.lead, *equation.legs))
    jacobian, cotangent = (jacobian, outer) if outer is not None else cotangent_of(sweep, equation, jacobian)
    if out_samples and in_samples:
        _check_diagonal(call, operand, jacobian)
    if sweep.reads[operand] and not in_samples and out_samples:
        raise UnsupportedError(f"{call.where} mixes samples: '{operand}' is a sum over the batch.")
    counted = not out_samples and sweep.counts.get(operand, False) and equation.name not in sweep.uses
    if in_samples or sweep.reads[operand] or counted:
        into = tuple(BATCH if leg.size == N else leg for leg in jacobian.into)
        term = pull_back(jacobian, cotangent, sweep.lead, into)
        if in_samples and not out_samples:
            sweep.scales |= {_batch_power(p.scale) for p in term.products}
        sweep.terms.setdefault(operand, []).append(term)
    elif sweep.reads[equation.name] and not out_samples:
        raise UnsupportedError(
            f"the loss has a term in the parameters {', '.join(sorted(sweep.depends[operand]))} alone ({call.where}), "
            "which belongs to no sample.\n"
            "  Add the regulariser's derivatives yourself, and compile the loss without it."
        )
    else:
        sweep.uses.setdefault(operand, []).append((jacobian, cotangent))


def cotangent_of(sweep: Sweep, equation: Equation, jacobian: Jacobian) -> tuple[Jacobian, Diagram]:
    """What is propagated to the value of a line, and the line's Jacobian with legs that fit it."""
    if equation.name in sweep.uses:
        return _composed(sweep, equation.name, jacobian)
    return jacobian, cotangent(sweep, equation.name, equation.legs)


def add(sweep: Sweep, value: str, term: Diagram, sampled: bool) -> None:
    """Propagate a term to a value: one with a batch, or one made of parameters (then [*lead, n, *value])."""
    if sampled:
        sweep.terms.setdefault(value, []).append(term)
        return
    name = f"{sweep.prefix}::{value}:{len(sweep.schedule)}"
    sweep.schedule.append(Backward(name, value, (term,), "of its own"))
    sweep.scheduled.add(value)
    own = tuple(leg for leg in term.legs if leg not in sweep.lead and leg != BATCH)
    sweep.uses.setdefault(value, []).append((identity(own), tensor(name, term.legs)))


def _batch_power(scale: sympy.Expr) -> sympy.Expr:
    """1/N if the scale has that factor (a loss that averages), 1 if N does not occur."""
    bases = (factor.as_base_exp() for factor in sympy.Mul.make_args(scale))
    power = sympy.Add(*(exponent for base, exponent in bases if base == N))
    rest = sympy.simplify(scale / N**power)
    if rest.is_rational_function(N) and rest.has(N):  # max(N, 4) and the like belong to the loss of a sample
        numerator, denominator = sympy.fraction(sympy.together(rest))
        power += sympy.degree(numerator, N) - sympy.degree(denominator, N)
    return N**power


def _check_diagonal(call: Call, operand: str, jacobian: Jacobian) -> None:
    """Each product of a Jacobian between two values with a batch must have δ[n, n']."""
    before = next(leg for leg in jacobian.into if leg.size == N)
    same = {Delta((BATCH, before)), Delta((before, BATCH))}
    if not all(same & set(p.operands) for p in jacobian.diagram.products):
        raise UnsupportedError(
            f"{call.where} mixes samples: its output for one sample depends on '{operand}' of another.\n"
            "  In a batch norm, call model.eval(); else rewrite the layer so that it treats every sample on its own."
        )


def cotangent(sweep: Sweep, name: str, legs: tuple[Leg, ...]) -> Diagram:
    """What is propagated to `name`: a named tensor, or the constant of a scalar of the loss."""
    if sweep.samples[name]:
        schedule(sweep, name)
        return tensor(f"{sweep.prefix}:{name}", (*sweep.lead, *legs))
    total = Diagram(legs, ())
    for term in sweep.terms[name]:
        if isinstance(term, Native) or any(_varies(sweep, leaf) for leaf in leaves(term)):
            raise _no_sum(f"what comes after {sweep.owner[name].where} is not linear in it")
        total = total + inline(Diagram(legs, (Product(sympy.Integer(1), (Part(term, legs),)),)))
    return simplify(total)


def _no_sum(what: str) -> UnsupportedError:
    return UnsupportedError(
        f"the loss is not a sum over samples: {what}.\n"
        "  Only sums of the loss of each sample have individual gradients; a divisor may depend on the batch."
    )


def _varies(sweep: Sweep, leaf: str) -> bool:
    """Whether a factor depends on the samples through the parameters; a number of labels in the batch does not."""
    return sweep.reads.get(leaf, True) and bool(sweep.depends.get(leaf, True))


def _composed(sweep: Sweep, name: str, jacobian: Jacobian) -> tuple[Jacobian, Diagram]:
    """For a value made of parameters: its Jacobian and its cotangent per sample, with the same legs."""
    uses, g = all_uses(sweep, name)
    if not jacobian.out:
        return jacobian, inline((uses.T @ g).sum_parameter())
    sizes = common(tuple(leg.size for leg in jacobian.out), tuple(leg.size for leg in uses.legs))
    jacobian = regroup(jacobian, out=sizes)
    regrouped = tuple(regroup(j, into=sizes) for j in uses.jacobians)
    cotangent = inline(Uses(regrouped, regrouped[0].into).T @ g)
    kept = cotangent.legs[: len(cotangent.legs) - len(sizes)]
    taken = {leg.name for p in cotangent.products for leg in p.legs} | {leg.name for leg in jacobian.diagram.legs}
    fresh = {leg: Leg(next(fresh_names(taken, f"{leg.name}{k}_")), leg.size) for k, leg in enumerate(jacobian.out)}
    jacobian = Jacobian(jacobian.diagram.rename(fresh), tuple(fresh[leg] for leg in jacobian.out), jacobian.into)
    return jacobian, cotangent.rename(dict(zip(cotangent.legs[len(kept) :], jacobian.out, strict=True)))


def schedule(sweep: Sweep, name: str) -> None:
    """Enter the computation of a cotangent, once."""
    if name not in sweep.scheduled:
        sweep.scheduled.add(name)
        call = sweep.owner.get(name)
        where = call.where if call else ""
        terms = tuple(sweep.terms[name])
        before = gathered(terms[0], propagated(sweep)) if sweep.several and len(terms) == 1 else None
        sweep.schedule.append(Backward(f"{sweep.prefix}:{name}", name, terms, where, before))
