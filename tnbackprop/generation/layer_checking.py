"""The check of a layer's file: what is handed in, and which definitions its functions have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import Template

import torch

from ..compiler.derive.output import output_legs
from ..compiler.emit import printer
from ..compiler.sweep.derived import Backward, Given
from ..diagram.core import N
from ..quantities import Average, Exact, HesScale, Quantity
from ..quantities.propagation import COTANGENT
from .checks.checking import Checks, Key, needed
from .layer_functions import Prepared
from .parts.domains import domains
from .parts.kronecker import Block, Places, places
from .parts.text import call, data

COLUMNS, AVERAGE = (each.handed.value for each in (Exact, Average) if each.handed is not None)
PULLED = {"vjp": ("gradients", "lambda G: G"), "vjp_columns": ("pulled_columns", "lambda V: V")}
"""The definition of what is pulled back to an input, where it has one for every layer."""


def arguments(prepared: Prepared, x: Sequence[torch.Tensor]) -> list[str]:
    """ARGUMENTS = {name: (shape, low, high)}, from the layer's tensors: what must be positive stays positive."""
    graph = prepared.layer.graph
    inputs = dict(zip([v for v in graph.inputs if v != COTANGENT], x, strict=True))
    found = domains(prepared.module, prepared.example, graph, inputs)
    return data("ARGUMENTS", {prepared.names.of[value]: domain for value, domain in found.items()})


def layer_checks(prepared: Prepared, pulled: Sequence[Key], *more: tuple[str, str]) -> Checks:
    """The definitions of every function; `more` are (call, text) of a kind of file."""
    checks = Checks(texts=[_complete(prepared), _TOTAL], calls=[call for call, _ in more])
    functions = {"G": "gradients", "J": "jacobians"} | ({"V": "pulled_columns"} if COLUMNS in prepared.handed else {})
    for quantity in prepared.quantities:
        keys = [key for key in prepared.keys if key[0] == quantity.name]
        if any(key in prepared.blocks for key in keys):
            for key in keys:
                checks.recorded += [] if _factors(checks, prepared, quantity, key) else [key]
        elif _diagonal(prepared, quantity):
            checks.enter_second(quantity.name, "with_diagonal", getattr(quantity, "per_sample", False))
        elif not checks.add(quantity, functions, 1.0, "with_hessian"):
            checks.recorded += keys
    for word, own in pulled:
        _pulled(checks, prepared, word, own)
    matrices = [each.name for each in prepared.layer.handed if each.matrix]
    average = "".join(f'        values["{name}"] = average_of(values["columns"])\n' for name in matrices)
    used = [text for name, text in _TEXTS.items() if name in needed(checks.uses)]
    checks.texts += [Template(text).substitute(AVERAGE=average) for text in used]
    checks.texts += [text for _, text in more]
    return checks


def _single(prepared: Prepared) -> bool:
    """Whether the layer is one line: then what is propagated as a diagonal or an average is exact."""
    bound = prepared.layer.derived.bound
    return len(bound) == 1 and len(bound[0][1].equations) == 1


def _diagonal(prepared: Prepared, quantity: Quantity) -> bool:
    return isinstance(quantity, HesScale) and type(quantity).extract is HesScale.extract and _single(prepared)


def _pulled(checks: Checks, prepared: Prepared, word: str, own: str) -> None:
    """The definition of what is pulled back to an input."""
    match word:
        case _ if word in PULLED:
            checks.enter(word, *PULLED[word])
        case "pulled_diagonal" if _single(prepared):
            checks.enter_second(word, "with_diagonal", True)
        case "pulled_average" if _single(prepared):
            checks.enter(word, "averages", "lambda A: A")
        case _:
            checks.recorded.append((word, own))


def _factors(checks: Checks, prepared: Prepared, quantity: Quantity, key: Key) -> bool:
    """Enter which columns make the factors exact, if some do."""
    block = prepared.blocks[key]
    handed = quantity.host.alone.handed
    name = handed.value if handed is not None else ""
    gradient = name == COTANGENT
    if name not in (COTANGENT, COLUMNS, AVERAGE):
        return False
    found = _places(prepared, block, name)
    if found is not None and not (gradient and len(found.tied) > 1):
        legs = output_legs(prepared.layer.derived.bound, prepared.layer.graph.output)
        sizes = tuple("N" if leg.size == N else int(leg.size) for leg in legs)
        function = "at_places"
        exact = call(function, map(printer.data, (sizes, found.tied, found.spread)))
    elif block.exact_for_one:
        exact = function = "one_sample"
    else:
        return False
    names = (key[1], block.bias) if block.bias else (key[1],)
    checks.enter_factors(key, exact, "gradients_as_columns" if gradient else "pulled_columns", names, block.axes)
    checks.uses.add(function)
    return True


def _places(prepared: Prepared, block: Block, handed: str) -> Places | None:
    """Where columns must be the same, if what is handed in is read as it is."""
    layer = prepared.layer
    output = layer.graph.output
    starts = {c.variable: c.schedule for c in layer.derived.columns if isinstance(c.start, Given)}
    schedule = starts.get(handed, layer.derived.schedule)
    names = [i.name for i in schedule if isinstance(i, Backward) and (i.value == output or i.name == f"K_{output}")]
    legs = output_legs(layer.derived.bound, output)
    return places(block, names[0], legs) if names else None


def _complete(prepared: Prepared) -> str:
    """`complete`: what is handed in, drawn."""
    lines = [
        "",
        "def complete(values, generator):",
        '    """What is handed in at the output as well."""',
        "    output = call(forward, values)",
        "    options = {\"generator\": generator, \"dtype\": output.dtype}",
        "    values[\"cotangent\"] = torch.randn(output.shape, **options)",
    ]
    matrices = [each.name for each in prepared.layer.handed if each.matrix]
    for each in prepared.layer.handed:
        shape = "(4, *output.shape)" if each.columns else "output.shape"
        if each.matrix and COLUMNS not in prepared.handed and each.name == matrices[0]:
            lines.append('    values["columns"] = torch.randn((4, *output.shape), **options)')
        made = 'average_of(values["columns"])' if each.matrix else f"torch.randn({shape}, **options)"
        lines.append(f'    values["{each.name}"] = {made}')
        if each.weights:
            lines.append(f'    values["{each.weights}"] = torch.randn((4, len(output)), **options)')
    lines.append("    return values")
    if matrices:
        lines += _AVERAGE_OF.split("\n")[:-1]
    return "\n".join(lines) + "\n" + _COMPUTED


_COMPUTED = '''

def computed(values, *keys):
    """All results, or those of some keys: {(quantity, parameter): value}."""
    functions = PULLED | FUNCTIONS
    return {key: call(functions[key], values) for key in keys or functions}
'''

_AVERAGE_OF = '''

def average_of(columns):
    """The sum of their outer products, one matrix for all samples."""
    flat = columns.reshape(-1, columns.shape[2:].numel())
    return (flat.T @ flat).reshape(columns.shape[2:] * 2)
'''

_TOTAL = '''
def total(values, output):
    """A number that has the cotangent as its gradient by the output."""
    return (output * values["cotangent"]).sum()
'''

_TEXTS: Mapping[str, str] = {
    "with_hessian": '''
def with_hessian(values, output):
    """The same, with the Hessian Σ_v w_v S_v S_vᵀ by the output."""
    along = flattened(values["hessian_columns"] * (output - output.detach()), 2).sum(2)
    return total(values, output) + (values["hessian_weights"] * along.square()).sum() / 2
''',
    "with_diagonal": '''
def with_diagonal(values, output):
    """The same, with the diagonal as its Hessian by the output."""
    return total(values, output) + (values["diagonal"] * (output - output.detach()).square()).sum() / 2
''',
    "pulled_columns": '''
def pulled_columns(values):
    """The columns that were handed in, pulled back."""
    return pulled(values, values["columns"])
''',
    "averages": '''
def averages(values):
    """(1/N) Σ_n J_nᵀ average J_n of every input."""
    found = {}
    for name, J in jacobians(values).items():
        if name in INPUTS:
            flat = flattened(J, 2)
            matrix = values["average"].reshape(len(flat), len(flat))
            mean = torch.einsum("cnp,cd,dnq->pq", flat, matrix, flat) / J.shape[1]
            found[name] = mean.reshape(J.shape[2:] * 2)
    return found
''',
    "one_sample": '''
def one_sample(quantity, name):
    """Without positions, factors are exact for one sample."""
    return example(1)
''',
    "at_places": '''
def at_places(axes, tied, spread):
    """Factors are exact for columns that have the same values at every place and are zero at all others.

    tied    axes of the output along which every place has columns of its own
    spread  axes along which each column is the same
    """

    def exact(quantity, name):
        values = example(SAMPLES)
        output = values["cotangent"]
        sizes = [len(output) if size == "N" else size for size in axes]
        same = torch.randn([1 if k in (*tied, *spread) else size for k, size in enumerate(sizes)], dtype=output.dtype)
        ones = [size if k in tied else 1 for k, size in enumerate(sizes)]
        count = torch.Size(ones).numel()
        columns = torch.eye(count, dtype=output.dtype).reshape(count, *ones) * same
        values["columns"] = columns.expand(count, *sizes).reshape(count, *output.shape)
        values["cotangent"] = same.expand(sizes).reshape(output.shape)
$AVERAGE        return values

    return exact
''',
}
"""Texts by the name of their function."""

