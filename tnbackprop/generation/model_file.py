"""Target model: the program of a whole model with its loss as one file, with the mapping of names as plain data."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..compiler import Compiled, compile_program
from ..compiler.capture.export import check_trainable, plain
from ..compiler.derive.derive import rules_text
from ..compiler.emit import printer
from ..compiler.emit.layout import Group, Row
from ..compiler.emit.naming import string
from ..compiler.emit.source import Writer
from ..compiler.entered.definite import TOLERATED
from ..compiler.explain.phases import in_short
from ..compiler.explain.text import diagram_text
from ..compiler.program.inputs import parameter_shapes
from ..compiler.translate.graph import Graph
from ..compiler.translate.sizes import shown
from ..diagram.core import N, Size
from ..diagram.reading import Reading
from ..errors import InputError, UnsupportedError
from ..quantities import Quantity
from ..table import Rules, written_out
from ..version import __version__
from .checks.checking import Checks, Recorded, check_lines, lines_of_text, note, with_records
from .checks.model_checking import model_checks, split, split_lines
from .generated import Target
from .parts.domains import Domain, domains
from .parts.function import Function, asked, extractions, flops_of_many, literal, refuse_unchecked
from .parts.kronecker import WITH_ONE_TEXT, Block, blocks_of
from .parts.text import WIDTH, assigned, call, data, definition, docstring, rows, sizes, statement


@dataclass(frozen=True)
class ModelFile:
    """What a file is written from."""

    compiled: Compiled
    quantities: Sequence[Quantity]
    title: str
    rules: Sequence[str]
    bounds: Mapping[str, Domain]  # value -> (shape, least, largest)

    @property
    def blocks(self) -> dict[tuple[str, str], Block]:
        """The Kronecker factors of every parameter that has them."""
        return blocks_of(extractions(self.compiled.derived), self.compiled.graph)


def model_source(
    model: torch.nn.Module,
    loss: Callable[..., torch.Tensor],
    example: Any,
    quantities: Sequence[Quantity],
    rules: Rules,
) -> tuple[str, Target, str, tuple[str, ...]]:
    """The file, and what `Generated` says of it."""
    if not isinstance(example, tuple | list) or len(example) != 2:
        raise InputError("example= of a whole model is a batch (x, y)")
    if not isinstance(model, torch.nn.Module):
        raise InputError(f"cannot generate from {type(model).__name__}: give a torch.nn.Module")
    check_trainable(model, quantities)
    compiled = compile_program(model, loss, (example[0], example[1]), quantities, written_out(rules), here=False)
    refuse_unchecked(compiled.graph)
    rest = shown(compiled.graph.conditions)
    if compiled.graph.least > 1 or rest:
        raise UnsupportedError(
            f"the model does something else {f'where not {rest}' if rest else 'for one sample'} (it branches on the "
            "batch size), and a file is for any batch.\n  Do not branch on x.shape[0]."
        )
    title = f"{type(model).__name__} with {getattr(loss, '__name__', type(loss).__name__)}"
    leaves = [leaf for leaf in pytree.tree_leaves((plain(example[0]), plain(example[1]))) if leaf is not None]
    graph = compiled.graph
    drawn = domains(model, plain(example[0]), graph, dict(zip(graph.inputs, leaves, strict=True)), unit=True)
    file = ModelFile(compiled, quantities, title, tuple(rules_text(compiled.derived, rules)), drawn)
    functions, roots = split(compiled)
    checks = model_checks(compiled, quantities, file.blocks, roots)
    source = with_records(lambda recorded: _source(file, functions, checks, recorded), checks.recorded)
    return source, Target.MODEL, title, ("compute", "program")


def _source(file: ModelFile, functions: Sequence[Function], checks: Checks, recorded: Recorded) -> str:
    compiled = file.compiled
    graph = compiled.graph
    lines = [*_header(file, checks), "", "import sys", "", "import torch", ""]
    lines += ["# parameter or buffer of the model: value in the program"]
    parameters = {dotted[0]: value for value, dotted in graph.parameters.items()}
    lines += data("STATE", parameters | {dotted: value for value, dotted in graph.buffers.items()})
    lines += ["# leaves of (x, y), in order", *assigned("INPUTS", graph.inputs)]
    lines += assigned("BATCH", _batch(graph))
    lines += ["# quantity: {parameter: the shapes of its Kronecker factors}", *data("FACTORS", _factors(file))]
    joined = {key: block for key, block in file.blocks.items() if block.bias}
    if joined:
        lines += ["# (quantity, weight): which factor is that of the input, which ends in a 1 for the bias"]
        lines += data("JOINED", {key: block.input for key, block in joined.items()})
    lines += ["# value: (shape, least and largest value that the check draws)", *data("ARGUMENTS", file.bounds)]
    lines += [*_program(compiled), "", "", *_tensors(compiled), *_operands(compiled)]
    single = isinstance(graph.output, str)
    output = "output[0]" if single else "output"
    read = _HANDED if compiled.derived.handed else dict.fromkeys(_HANDED, "")
    lines += lines_of_text(Template(_COMPUTE).substitute(read, OUTPUT=output, TOLERATED=TOLERATED))
    lines += lines_of_text(_AS_READ) if compiled.derived.handed else []
    both = {"JOINED": _JOINED, "MEANS": _MEANS} if joined else {"JOINED": "", "MEANS": ""}
    lines += lines_of_text(Template(_ASSEMBLED).substitute(both))
    lines += lines_of_text(WITH_ONE_TEXT) if joined else []
    lines += split_lines(compiled, functions)
    low = any(word in compiled.source for word in ("torch.float32", "torch.bfloat16", "torch.float16"))
    lines += check_lines(checks, recorded, low)
    return "\n".join(lines) + "\n"


def _batch(graph: Graph) -> str:
    """The input that says how many samples there are."""
    return next(name for name in graph.inputs if graph.values[name].shape[:1] == (N,))


def _header(file: ModelFile, checks: Checks) -> list[str]:
    compiled = file.compiled
    graph = compiled.graph
    key = hashlib.sha256("\n".join([*file.rules, __version__]).encode()).hexdigest()[:16]
    shapes = ", ".join(f"{name} {sizes(graph.values[name].shape)}" for name in graph.inputs)
    rules = dict.fromkeys(row for rule in file.rules for row in rule.split("\n"))
    called = "model, x, y, operands" if compiled.derived.handed else "model, x, y"
    about = [
        f"{file.title}: derivative quantities in plain PyTorch.",
        f"Generated by tnbackprop {__version__} from a model, a loss and an example batch; needs torch only.",
        *note(checks.recorded),
        f"`compute({called})` gives (loss, output, {{quantity: {{parameter: value}}}}), also with a state_dict.",
        f"Quantities: {asked(file.quantities)}.",
        f"Inputs, for any batch size N: {shapes}. {flops_of_many(compiled.plan)}.",
        *_about_operands(compiled),
        "",
        f"Rules (hash of their text and the version: {key}):",
        *(f"    {row}" for row in rules),
        "",
        "Quantities of each parameter (g and s are cotangents of the value that they are named after):",
    ]
    order = list(graph.parameters)
    for item in sorted(extractions(compiled.derived), key=lambda item: order.index(item.parameter)):
        dotted = graph.parameters[item.parameter][0]
        about += [f"    {dotted}: {diagram_text(str(name), diagram, {})}" for name, diagram in item.diagrams.items()]
    about += ["", "Computed between phases, from sums over parameters:"] if compiled.derived.phases else []
    for phase in compiled.derived.phases:
        totals, outcome = in_short(compiled, phase)
        about.append(f"    for {phase.quantity}: {', '.join(outcome)} from {', '.join(totals)}")
    return docstring(about, "")


def _about_operands(compiled: Compiled) -> list[str]:
    """Keys and shapes, as a caller hands them in."""
    by_key: dict[str, list[tuple[Reading, tuple[Size, ...]]]] = {}
    for reading, shape in _handed_shapes(compiled).values():
        by_key.setdefault(reading.key, []).append((reading, shape))
    return [f"Operands: {'; '.join(f'{key}, {_about(each)}' for key, each in by_key.items())}."] if by_key else []


def _about(read: Sequence[tuple[Reading, tuple[Size, ...]]]) -> str:
    """One for all, or one of each parameter."""
    if not read[0][0].parameter:
        return sizes(read[0][1])
    if all(reading.axes == tuple((leg,) for leg in reading.own) for reading, _ in read):
        return "{parameter: tensor} of their shapes"
    shapes = {reading.parameter: sizes(shape) for reading, shape in read}
    return f"{{{', '.join(f'{name}: {shape}' for name, shape in shapes.items())}}}"


def _factors(file: ModelFile) -> dict[str, dict[str, tuple[tuple[int, ...], ...]]]:
    """The shape of every Kronecker factor: [d, d], or [d] of a diagonal one."""
    found: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {}
    for (quantity, dotted), block in file.blocks.items():
        found.setdefault(quantity, {})[dotted] = block.factors.shapes
    return found


def _program(compiled: Compiled) -> list[str]:
    """The program's own source, in lines that are not too long."""
    writer = Writer(compiled.graph, compiled.plan, width=WIDTH)
    lines = [row for source in writer.helpers.values() for row in ("", "", *source.strip("\n").split("\n"))]
    for each in writer.definitions():
        said = docstring(["Straight-line source, as it was emitted."]) if each.name == "program" else []
        lines += ["", "", *definition(each.name, each.arguments, each.body), *said, *rows(each.body)]
    return lines


def _tensors(compiled: Compiled) -> list[str]:
    """Constants and noise, as functions of the batch."""
    graph, plan = compiled.graph, compiled.plan
    lines = ["def constants(like):", '    """Tensors that belong to the program, not to the model."""']
    every = {**graph.constants} | {name: t for phase in compiled.derived.phases for name, t in phase.constants.items()}
    constants = (Row((f"{string(name)}: ", literal(name, value))) for name, value in every.items())
    lines += statement("    return ", Group("{", tuple(constants), "}"))
    lines += ["", "", "def noise(N, like, generator):", '    """Uniform numbers for drawn columns."""']
    options = ("dtype=like.dtype", "device=like.device", "generator=generator")
    drawn = {name: call("torch.rand", (printer.data(tuple(v.shape)), *options)) for name, v in plan.noises.items()}
    noises = (Row((f"{string(name)}: ", each)) for name, each in drawn.items())
    return [*lines, *statement("    return ", Group("{", tuple(noises), "}"))]


def _operands(compiled: Compiled) -> list[str]:
    """What quantities are handed, as a function of the batch size."""
    if not compiled.derived.handed:
        return []
    lines = [
        "",
        "",
        "def operands_read(N):",
        '    """What quantities are handed, {value: (key, parameter or "", shape, shape in the program)}."""',
        "    return {",
    ]
    for name, (reading, shape) in _handed_shapes(compiled).items():
        own = Group("(", (string(reading.key), string(reading.parameter), _sizes(shape), _sizes(reading.sizes)), ")")
        lines += statement(f"        {string(name)}: ", own, ",")
    return [*lines, "    }"]


def _handed_shapes(compiled: Compiled) -> dict[str, tuple[Reading, tuple[Size, ...]]]:
    """Value -> the operand that it is read from, and its shape."""
    shapes = parameter_shapes(compiled.graph)
    order = {name: k for k, name in enumerate(shapes)}
    ordered = sorted(compiled.derived.handed.items(), key=lambda item: order.get(item[1].parameter, 0))
    return {name: (each, each.shape(shapes.get(each.parameter, ()))) for name, each in ordered}


def _sizes(shape: tuple[Size, ...]) -> str:
    """A shape as code, where N is the batch size."""
    return f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})"


_HANDED = {
    "ARGUMENT": "operands=None, ",
    "ABOUT": """    operands   {key: tensor} or {key: {parameter: tensor}}, as in `operands_read`
""",
    "READ": """    tensors |= as_read(operands, len(tensors[BATCH]), state, like)
""",
}

_AS_READ = '''
def as_read(operands, N, state, like):
    """Operands by value, as the program reads them. Raises ValueError for other keys, shapes, dtypes or devices."""
    known = {}
    for key, parameter, _, _ in operands_read(N).values():
        known.setdefault(key, []).append(parameter)
    check_keys("operands", operands, known)
    found = {}
    for value, (key, parameter, shape, read) in operands_read(N).items():
        what, tensor = f"operand {key!r}", operands[key]
        if parameter:
            check_keys(what, tensor, known[key])
            what, tensor = f"{what} of {parameter!r}", tensor[parameter]
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{what} is {type(tensor).__name__}, not a tensor")
        if tensor.shape != shape:
            raise ValueError(f"{what} has shape {list(tensor.shape)}; it is {list(shape)} for {N} samples")
        own = state.get(parameter, like)
        if (tensor.dtype, tensor.device) != (own.dtype, own.device):
            raise ValueError(f"{what} is {tensor.dtype} on {tensor.device}; give {own.dtype} on {own.device}")
        found[value] = tensor.detach().reshape(read)
    return found


def check_keys(what, given, known):
    """Raises ValueError where a mapping has other keys."""
    known = list(dict.fromkeys(known))
    if not isinstance(given, dict) or set(given) != set(known):
        has = list(given) if isinstance(given, dict) else type(given).__name__
        raise ValueError(f"{what}: give a dictionary with the keys {known}, not {has}")
'''

_COMPUTE = '''
def compute(model, x, y=None, ${ARGUMENT}generator=None):
    """(loss, output, {quantity: {parameter: value}}) of a batch; Kronecker factors are tuples of matrices.

    model      a module with these parameters and buffers, or {name: tensor} (a state_dict)
    x, y       tensors, or trees of them, as the model and the loss take them
${ABOUT}    generator  for what is drawn
    """
    state = model
    if isinstance(model, torch.nn.Module):
        state = dict(model.named_parameters()) | dict(model.named_buffers())
    tensors = {value: state[name] for name, value in STATE.items()}
    given = leaves((x, y))
    if len(given) != len(INPUTS):
        raise ValueError(f"the batch has {len(given)} tensors, not {len(INPUTS)}: {INPUTS}")
    tensors |= dict(zip(INPUTS, given, strict=True))
    like = next(value for value in tensors.values() if value.is_floating_point())
    tensors |= constants(like) | noise(len(tensors[BATCH]), like, generator)
${READ}    with torch.no_grad():
        loss, output, results, *checks = program(tensors)
    for smallest in (each for found in checks for each in found):
        if smallest < -$TOLERATED:
            raise ValueError("the loss Hessian is indefinite: it has no real square root")
    return loss, $OUTPUT, assembled(results)
'''

_ASSEMBLED = '''
def assembled(results):
    """Kronecker factors as square matrices."""
${MEANS}    for quantity, by_name in FACTORS.items():
        results[quantity] = {
            name: tuple(map(square, results[quantity][name], shapes)) for name, shapes in by_name.items()
        }
${JOINED}    return results


def square(factor, shape):
    """A factor that is the same everywhere is stored once."""
    return factor.reshape(shape) if factor.numel() == torch.Size(shape).numel() else factor.expand(shape)


def leaves(tree):
    """The tensors of a tree of tuples, lists and dictionaries, in order."""
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (tuple, list)):
        return [leaf for branch in tree for leaf in leaves(branch)]
    return [] if tree is None else [tree]
'''

_MEANS = """    means = {(quantity, name): results[quantity][name][-1] for quantity, name in JOINED}
"""

_JOINED = """    for (quantity, name), k in JOINED.items():
        factors = results[quantity][name]
        results[quantity][name] = (factors[1 - k], with_one(factors[k], means[quantity, name]))
"""
