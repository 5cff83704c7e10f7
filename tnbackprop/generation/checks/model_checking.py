"""The check of a model's file: roots of the loss's Hessian from the program's own steps, and what they define."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from string import Template
from typing import Any

import sympy

from ...compiler import Compiled
from ...compiler.emit.naming import TAKEN, Scope, string
from ...compiler.emit.source import Writer
from ...compiler.plan.plan import Plan
from ...compiler.program import functions as f
from ...compiler.program.expr import Call, Expr, Slice, Value
from ...compiler.program.inputs import parameter_shapes
from ...compiler.program.lines import alive
from ...compiler.sweep.derived import Columns, Extraction
from ...compiler.sweep.roots import LossRoot, elementwise_root
from ...diagram.core import N, hint_of, leaves
from ...quantities import AxisMoments, Gradient, Quantity
from ..parts.function import Function, Inputs, function
from ..parts.kronecker import Block, absorbed
from ..parts.names import Names
from ..parts.text import assigned
from .checking import SAMPLES, Checks, Key
from .whole import Whole


@dataclass(frozen=True)
class Root:
    """A function of the file that gives columns: all of them, or one round of those that are drawn."""

    function: Function
    quantities: tuple[str, ...]
    drawn: bool
    number: int
    rounds: int = 0  # the columns of one round, where they are drawn in rounds


def splits(compiled: Compiled) -> bool:
    """Whether the loss is a function of one output with the batch in front."""
    graph = compiled.graph
    return isinstance(graph.output, str) and graph.values[graph.output].axes[0][:1] == (N,)


def model_checks(
    compiled: Compiled, quantities: Sequence[Quantity], blocks: dict[Key, Block], roots: Sequence[Root]
) -> Checks:
    """The definitions of every result."""
    checks = Checks(texts=[Template(_RUN).substitute(_HANDED if compiled.derived.handed else _NOTHING)])
    checks.uses |= {"operands"} if compiled.derived.handed else set()
    inside = absorbed(blocks)
    scale = float(sympy.sympify(compiled.derived.scale).subs(N, SAMPLES))
    every = {q.name: [(q.name, name) for name in _names(compiled, q)] for q in quantities}
    keys = {quantity: [key for key in own if key not in inside] for quantity, own in every.items()}
    if not splits(compiled):
        checks.recorded = [key for quantity in quantities for key in keys[quantity.name]]
        return checks
    whole = Whole(scale, lambda quantity: _pull(quantity, roots), lambda quantity: _names(compiled, quantity))
    graph = compiled.graph
    trainable = [dotted[0] for value, dotted in graph.parameters.items() if graph.values[value].depends_on]
    for quantity in quantities:
        mine, pull = keys[quantity.name], _pull(quantity, roots)
        functions = {"G": "gradients", "J": "jacobians"} | ({"V": pull} if pull else {})
        if _by_axis(compiled, quantity, blocks, mine) and checks.enter_whole(quantity, whole, trainable):
            continue
        if any(key in blocks for key in mine):
            for key in mine:
                _enter_factors(checks, compiled, quantity, blocks[key], key, pull)
        elif not checks.add(quantity, functions, scale, "total"):
            checks.recorded += mine
    if checks.references or checks.second or checks.factors or checks.whole or roots:
        checks.texts.append(_TOTAL)
    checks.texts += [_ONE_SAMPLE] if checks.factors else []
    if roots:
        checks.texts += [_pulled_text(root) for root in roots]
        labels = [f"drawn for {', '.join(root.quantities)}" if root.drawn else "that are exact" for root in roots]
        names = [(label, root.function.name, root.drawn) for label, root in zip(labels, roots, strict=True)]
        rows = [f"    {string(label)}: (columns_of_{name}, {drawn})," for label, name, drawn in names]
        checks.texts += ["\n".join(["ROOTS = {", *rows, "}"]), _CHECK_ROOTS]
        checks.calls.append("check_roots(values)")
        checks.uses |= {"sampled", "pulled"}
    return checks


def _names(compiled: Compiled, quantity: Quantity) -> tuple[str, ...]:
    """What the quantity's results are of: parameters, groups of them, or inputs."""
    found = (by for result, by in compiled.plan.results.items() if result.quantity == quantity.name)
    return tuple(dict.fromkeys(name for by in found for name in by))


def _by_axis(compiled: Compiled, quantity: Quantity, blocks: Mapping[Key, Block], keys: Sequence[Key]) -> bool:
    """Whether moments along axes, if it is them, are along those that the parameters have."""
    shapes = parameter_shapes(compiled.graph)
    sizes = {key: tuple(shape[0] for shape in blocks[key].factors.shapes) for key in keys if key in blocks}
    return type(quantity) is not AxisMoments or all(shapes[name] == sizes[_, name] for _, name in keys)


def _enter_factors(
    checks: Checks, compiled: Compiled, quantity: Quantity, block: Block, key: Key, pull: str
) -> None:
    """Factors of the block without positions are exact for one sample."""
    read = {name for diagram in block.factors.diagrams for name in leaves(diagram)}
    own = isinstance(quantity, AxisMoments) or bool(read & compiled.derived.readings.keys())  # of no block
    if block.exact_for_one and pull and not own:
        both = [key[1], block.bias] if block.bias else [key[1]]
        checks.enter_factors(key, "one_sample", pull, both, block.axes)
    else:
        checks.recorded.append(key)


def _pull(quantity: Quantity, roots: Sequence[Root]) -> str:
    """The function that pulls the quantity's columns back."""
    if isinstance(quantity.host, Gradient):
        return "gradients_as_columns"
    mine = [root for root in roots if quantity.name in root.quantities]
    return f"pulled_{mine[0].function.name}" if mine else ""


def split(compiled: Compiled) -> tuple[list[Function], list[Root]]:
    """The output, the loss as a function of it, roots of its Hessian; nothing where there are several outputs."""
    graph, plan = compiled.graph, compiled.plan
    if not splits(compiled) or plan.loss is None:
        return [], []
    output = plan.output[graph.output]
    forward = alive(plan.steps, {output})
    behind = set(forward)
    order = (*graph.inputs, *graph.parameters, *graph.buffers)
    shapes: dict[str, tuple[Any, ...]] = {value: graph.values[value].shape for value in order}
    floating = [value for value in order if graph.values[value].dtype.is_floating_point]
    names = names_of(compiled)
    inputs = Inputs(shapes, graph.constants, floating, names)
    variables = (value for loop in plan.loops for value, _ in loop.rows)
    drawn = {columns.draw for columns in compiled.derived.columns}
    more = {graph.output: output} | {value.key: value for value in variables if value.key in drawn}
    draws = {name: value.shape for name, value in {**plan.noises, **more}.items()}
    whole = Inputs({graph.output: output.shape, **shapes, **draws}, graph.constants, floating, names)
    helpers = Writer(graph, plan).functions

    def made(name: str, steps: tuple[Value, ...], value: Value, doc: str, returns: Expr) -> Function:
        after = tuple(step for step in alive(steps, {value}) if step not in behind)
        return function(name, _only(plan, after), returns, whole, [doc], more, helpers)

    loss = made("loss_of", plan.steps, plan.loss, "The loss of an output.", plan.loss)
    first = function("forward", _only(plan, forward), output, inputs, ["The model's output."], {}, helpers)
    roots = []
    for value, columns, quantities, steps, looped in _columns(compiled):
        if columns.samples:
            doc = "Columns that are drawn" + (", those of one round." if looped else ".")
            returns = value if columns.lead else Call(f.UNSQUEEZE, (value, 0))
            found = made(hint_of(columns.variable), steps, value, doc, returns)
            roots.append(Root(found, quantities, True, columns.number, int(columns.width) if looped else 0))
        else:
            doc = "Columns S of a root of the loss's Hessian: Σ_v S_v S_vᵀ."
            returns = Call(f.ITEM, (value, Slice(stop=int(columns.count))))
            found = made(f"root_{columns.number}", steps, value, doc, returns)
            roots.append(Root(found, quantities, False, columns.number))
    return [first, loss, *(root.function for root in roots)], roots


def names_of(compiled: Compiled) -> Names:
    """Inputs, parameters and draws are called as they are, and the output by a name that is free."""
    output, plan = compiled.graph.output, compiled.plan
    rows = (value.key for loop in plan.loops for value, _ in loop.rows)
    scope = Scope({*TAKEN, "like", *map(hint_of, (*plan.given, *plan.noises, *rows))})
    made = isinstance(output, str) and output not in plan.given
    return Names({output: scope.fresh(hint_of(output))} if made else {})


def _by_position(root: LossRoot) -> bool:
    """Whether the outputs are taken not to mix, as in BL89: then it is no root of the loss's Hessian."""
    return bool(root.root.elementwise) and elementwise_root(root) == root


def _columns(compiled: Compiled) -> Iterator[tuple[Value, Columns, tuple[str, ...], tuple[Value, ...], bool]]:
    """(value, columns, quantities, steps, whether it is of a round): roots that are drawn, and the exact one, once."""
    plan = compiled.plan
    exact: list[tuple[Value, Columns]] = []
    served: list[str] = []
    for columns in compiled.derived.columns:
        root = columns.start
        if not isinstance(root, LossRoot) or root.signed or root.labels is not None or _by_position(root):
            continue  # else it is no root of the loss's Hessian
        items = [item for item in columns.schedule if isinstance(item, Extraction)]
        mine = tuple(dict.fromkeys(name for item in items for name in item.quantities))
        if columns.samples:
            loop = next((loop for loop in plan.loops if any(v.key == columns.draw for v, _ in loop.rows)), None)
            steps = (*plan.steps, *loop.body.steps) if loop is not None else plan.steps
            yield plan.columns[columns.variable], columns, mine, steps, loop is not None
        else:
            served += mine
            exact.append((plan.columns[columns.variable], columns))
    if exact:
        value, columns = exact[0]
        yield value, columns, tuple(served), plan.steps, False


def _only(plan: Plan, steps: tuple[Value, ...]) -> Plan:
    """The plan with these steps and nothing else."""
    return replace(plan, steps=steps, results={})


def split_lines(compiled: Compiled, functions: Sequence[Function]) -> list[str]:
    """The functions as source, and what the check must know of the model."""
    graph = compiled.graph
    trainable = tuple(name for name in graph.parameters if graph.values[name].depends_on)
    lines = [row for each in functions for row in ("", "", *each.lines)]
    lines += ["", "", *assigned("DIFFERENTIABLE", trainable)]
    if functions and isinstance(graph.output, str):
        lines += assigned("OUTPUT", names_of(compiled).shown(graph.output))
    return lines


_RUN = '''
def complete(values, generator):
    """Nothing is missing."""
    return values


def computed(values, *keys):
    """All results, {(quantity, parameter): value}."""
    state = {name: values[value] for name, value in STATE.items()}
    generator = torch.Generator().manual_seed(0)
    _, _, results = compute(state, [values[name] for name in INPUTS], ${HANDED}generator=generator)
    return {(quantity, name): value for quantity, by_name in results.items() for name, value in by_name.items()}
'''

_HANDED, _NOTHING = {"HANDED": "operands=operands(values), "}, {"HANDED": ""}

_TOTAL = '''
def total(values, output):
    """The loss, as a function of the output."""
    return call(loss_of, values | {OUTPUT: output})
'''

_ONE_SAMPLE = '''
def one_sample(quantity, name):
    """Without positions, factors are exact for one sample."""
    return example(1)
'''


def _pulled_text(root: Root) -> str:
    name, number = root.function.name, root.number
    called = f"call({name}, values | drawn)"
    rounds = ""
    if root.rounds:
        called = f'torch.cat([call({name}, values | drawn | {{"draw_{number}": each}}) for each in rounds])'
        cut = f"split({root.rounds})" if root.rounds > 1 else "unbind(0)"
        rounds = f'    rounds = drawn["noise_{number}"].{cut}\n'
    return f'''
def columns_of_{name}(values, output):
    """The columns at this output, [V, N, *output]."""
    drawn = noise(len(output), output, torch.Generator().manual_seed(0))
    drawn = {{OUTPUT: output}} | {{name.replace(":", "_"): each for name, each in drawn.items()}}
{rounds}    return {called}


def pulled_{name}(values):
    """The same, pulled back."""
    return pulled(values, columns_of_{name}(values, call(forward, values)))
'''


_CHECK_ROOTS = '''
def check_roots(values):
    """uᵀ S Sᵀ u against uᵀ H u for vectors u and the Hessian H of the loss by the output; on average for drawn S."""
    samples, right = len(values[BATCH]), []
    here = call(forward, values)
    for name, (columns_of, drawn) in ROOTS.items():
        copies = max(16, min(4096, 2**21 // here.numel())) if drawn else 1
        many = {key: torch.cat([value] * copies) if sampled(key) else value for key, value in values.items()}
        output = torch.cat([here] * copies)
        S = flattened(columns_of(many, output), 2)
        vectors = torch.randn((8, *here.shape), generator=torch.Generator().manual_seed(0), dtype=here.dtype)
        rest, got, want = output[samples:], [], []
        for u in vectors:
            along = (S * flattened(torch.cat([u] * copies), 1)).sum(2).square().sum(0)
            got.append(along.reshape(copies, samples).mean(0))
            leaf = here.clone().requires_grad_()
            (first,) = torch.autograd.grad(total(many, torch.cat([leaf, rest])), leaf, create_graph=True)
            (second,) = torch.autograd.grad((first * u).sum(), leaf)
            want.append(flattened(u * second, 1).sum(1))
        got, want = torch.stack(got), torch.stack(want)
        largest = want.abs().max()
        label = f"Hessian of the loss by the output from columns {name}{', on average' * drawn}"
        right.append(compare(label, got / largest, want / largest, 12 / copies**0.5 if drawn else TOLERANCE))
    return right
'''
