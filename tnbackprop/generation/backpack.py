"""Target backpack: a layer's functions as module extensions of BackPACK 1.7.1, through `set_module_extension`.

An extension of BackPACK hands to a module the gradient by its output (first order), or that and columns of a root of
the loss's Hessian, [V, N, *output] (second order), which the module extension pulls back to its input. Both are what
the functions of a layer on its own read. Extensions that propagate anything else are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from string import Template

from ..compiler.emit.layout import Doc, Group
from ..compiler.emit.naming import string
from ..compiler.emit.printer import data
from ..errors import UnsupportedError
from ..quantities import (
    KFAC,
    KFLR,
    BatchGrad,
    BatchL2,
    Bias,
    DiagGGN,
    DiagGGNMC,
    Fisher,
    Quantity,
    Scale,
    SecondMoment,
    SqrtGGN,
    SqrtGGNMC,
    Variance,
)
from .checks.checking import Checks, Recorded, check_lines, lines_of_text, with_records
from .layer_file import LayerFile, checks_of, function_tables, functions, header, tables
from .parts.text import call, docstring, statement, table


@dataclass(frozen=True)
class Extension:
    """One of BackPACK's: its class, and where it leaves its result."""

    name: str
    field: str
    second_order: bool = False


EXTENSIONS: dict[type[Quantity], Extension] = {
    BatchGrad: Extension("BatchGrad", "grad_batch"),
    BatchL2: Extension("BatchL2Grad", "batch_l2"),
    SecondMoment: Extension("SumGradSquared", "sum_grad_squared"),
    Variance: Extension("Variance", "variance"),
    SqrtGGN: Extension("SqrtGGNExact", "sqrt_ggn_exact", True),
    SqrtGGNMC: Extension("SqrtGGNMC", "sqrt_ggn_mc", True),
    DiagGGN: Extension("DiagGGNExact", "diag_ggn_exact", True),
    DiagGGNMC: Extension("DiagGGNMC", "diag_ggn_mc", True),
    KFLR: Extension("KFLR", "kflr", True),
    KFAC: Extension("KFAC", "kfac", True),
}
PER_SAMPLE: dict[type[Quantity], Extension] = {
    DiagGGN: Extension("BatchDiagGGNExact", "diag_ggn_exact_batch", True),
    DiagGGNMC: Extension("BatchDiagGGNMC", "diag_ggn_mc_batch", True),
}


def extension_of(quantity: Quantity) -> Extension:
    """BackPACK's extension with this quantity's values. Raises `UnsupportedError` where it has none."""
    found = EXTENSIONS.get(type(quantity))
    if isinstance(quantity, DiagGGN) and quantity.per_sample:
        found = PER_SAMPLE[type(quantity)]
    if isinstance(quantity, KFAC) and quantity.fisher is Fisher.EMPIRICAL:
        found = None
    if getattr(quantity, "bias", None) is Bias.JOINED:
        raise UnsupportedError(
            f"{quantity.name} joins weight and bias in one block, and BackPACK stores factors with each parameter.\n"
            "  Ask for Bias.OWN, or generate for Target.TORCH."
        )
    if found is None:
        known = ", ".join(cls.__name__ for cls in EXTENSIONS)
        raise UnsupportedError(
            f"{quantity.name} is not available for BackPACK: it has no extension that hands a module what "
            f"{quantity.name} is made of and stores its values.\n  There are {known}; "
            "or generate for Target.TORCH."
        )
    return found


def as_backpack_scales(quantities: Sequence[Quantity]) -> list[Quantity]:
    """The quantities in BackPACK's scale: it works on gradients as the loss scales them."""
    for quantity in quantities:
        extension_of(quantity)
    return [
        replace(quantity, scale=Scale.BACKPACK) if isinstance(quantity, SecondMoment | Variance) else quantity
        for quantity in quantities
    ]


def backpack_source(file: LayerFile, title: str) -> str:
    """The file. Raises `UnsupportedError` where BackPACK's interface does not reach."""
    _refuse(file)
    check = Template(_CHECK).substitute(FACTORS="as_list(want)" if file.prepared.blocks else "want")
    checks = checks_of(file, ("check_inside_backpack(values)", check))
    return with_records(lambda recorded: _source(file, title, checks, recorded), checks.recorded)


def _refuse(file: LayerFile) -> None:
    prepared = file.prepared
    if len(prepared.arguments) != 1:
        raise UnsupportedError(
            f"the module has the inputs {', '.join(prepared.arguments)}: a module extension of BackPACK sees a module "
            "with one input.\n  Generate for Target.TORCH, or give the others to the module as buffers."
        )
    if prepared.layer.graph.constants:
        raise UnsupportedError("the module makes tensors of its own: register them as its buffers.")
    for (quantity, dotted), block in prepared.blocks.items():
        if any(block.factors.dropped):
            why = "; ".join(filter(None, block.factors.dropped))
            raise UnsupportedError(
                f"{quantity} of {dotted!r} is no more than a diagonal, and BackPACK's factors are dense: {why}.\n"
                "  Ask for DiagGGN, or generate for Target.TORCH."
            )
        if block.order != block.factors.parameter:
            raise UnsupportedError(
                f"{quantity} of {dotted!r}: its factors do not follow the parameter's axes, as those of BackPACK do.\n"
                "  Generate for Target.TORCH, whose docstrings say which axes a factor acts on."
            )
    for dotted in prepared.parameters:
        if "." in dotted:
            raise UnsupportedError(
                f"parameter {dotted!r} belongs to a submodule, and BackPACK extends modules without submodules.\n"
                "  Make it a parameter of the module itself, or generate for Target.TORCH."
            )


def _source(file: LayerFile, title: str, checks: Checks, recorded: Recorded) -> str:
    extensions = {quantity.name: extension_of(quantity) for quantity in file.prepared.quantities}
    second = any(extension.second_order for extension in extensions.values())
    first = not all(extension.second_order for extension in extensions.values())
    needs = "needs torch and backpack-for-pytorch"
    lines = [*header(file, title, "BackPACK 1.7.1", needs, checks), "", "import sys", ""]
    lines += ["import torch", "from backpack import backpack, extend, extensions"]
    lines += ["from backpack.extensions.firstorder.base import FirstOrderModuleExtension"] if first else []
    lines += ["from backpack.extensions.module_extension import ModuleExtension"] if second else []
    lines += ["", *tables(file), *functions(file)]
    for quantity, extension in extensions.items():
        lines += ["", "", *_class(file, quantity, extension)]
    lines += ["", "", "# extension of BackPACK: (its module extension, the quantity, where the values are)"]
    entries = {f"extensions.{each.name}": (each, quantity) for quantity, each in extensions.items()}
    lines += table("EXTENSIONS", {key: _entry(quantity, each) for key, (each, quantity) in entries.items()})
    lines += lines_of_text(_INSTALL)
    lines += lines_of_text(_AS_LIST) if file.prepared.blocks else []
    lines += [*function_tables(file), *check_lines(checks, recorded)]
    return "\n".join(lines) + "\n"


def _entry(quantity: str, extension: Extension) -> Doc:
    return Group("(", (_class_name(extension), string(quantity), string(extension.field)), ")")


def _class_name(extension: Extension) -> str:
    return f"Layer{extension.name}"


def _class(file: LayerFile, quantity: str, extension: Extension) -> Iterator[str]:
    """One module extension: a method for each parameter, and how columns are pulled back."""
    prepared = file.prepared
    base = "ModuleExtension" if extension.second_order else "FirstOrderModuleExtension"
    yield f"class {_class_name(extension)}({base}):"
    yield from docstring([f"{quantity} for BackPACK's {extension.name}."])
    yield ""
    yield "    def __init__(self):"
    yield from statement("        super().__init__(params=", data(list(prepared.parameters)), ")")
    values = {own: f"module.{name}" for name, own in prepared.state.items()}
    values |= {prepared.arguments[0]: "module.input0", "cotangent": "g_out[0]", "columns": "bpQuantities"}
    for dotted in prepared.parameters:
        yield ""
        yield f"    def {dotted}(self, ext, module, g_inp, g_out, bpQuantities):"
        yield "        refuse_subsampling(ext)"
        code = file.functions[quantity, dotted].call(values)
        returned = call("as_list", [code]) if (quantity, dotted) in prepared.blocks else code
        yield from statement("        return ", returned)
    if extension.second_order:
        yield ""
        yield "    def backpropagate(self, ext, module, g_inp, g_out, bpQuantities):"
        pulled = file.pulled.get(("vjp_columns", prepared.arguments[0]))
        yield from statement("        return ", pulled.call(values) if pulled is not None else "None")


_AS_LIST = '''
def as_list(factors):
    """As BackPACK has Kronecker factors: a list of matrices. Block-diagonal ones are multiplied out to one matrix."""
    factors = [factor.diag() if factor.ndim == 1 else factor for factor in factors]
    if factors[0].ndim == 2:
        return factors
    blocks, *others = factors
    for factor in others:
        blocks = torch.stack([torch.kron(a, b) for a, b in zip(blocks, factor, strict=True)])
    return [torch.block_diag(*blocks)]
'''

_INSTALL = '''
def install(extension, module_class):
    """Teach an extension of BackPACK this layer: `with backpack(install(extensions.BatchGrad(), MyLayer)): ...`."""
    if type(extension) not in EXTENSIONS:
        known = ", ".join(each.__name__ for each in EXTENSIONS)
        raise NotImplementedError(f"this file has no {type(extension).__name__}: it was generated for {known}")
    extension.set_module_extension(module_class, EXTENSIONS[type(extension)][0](), overwrite=True)
    return extension


def refuse_subsampling(extension):
    """The functions are of all samples."""
    if hasattr(extension, "get_subsampling") and extension.get_subsampling() is not None:
        raise NotImplementedError("generated extensions do not subsample: take rows of the result")
'''

_CHECK = '''
class Layer(torch.nn.Module):
    """The layer with some values for its parameters."""

    def __init__(self, values):
        super().__init__()
        for name, argument in STATE.items():
            value = values[argument].clone()
            if argument in DIFFERENTIABLE:
                self.register_parameter(name, torch.nn.Parameter(value))
            else:
                self.register_buffer(name, value)

    def forward(self, input):
        values = {argument: getattr(self, name) for name, argument in STATE.items()}
        return call(forward, values | {INPUTS[0]: input})


def check_inside_backpack(values):
    """Every extension in a backward pass of BackPACK, against the functions with cotangents of squared errors."""
    model = extend(torch.nn.Sequential(Layer(values), torch.nn.Flatten()))
    loss, x = extend(torch.nn.MSELoss(reduction="sum")), values[INPUTS[0]].clone()
    x.requires_grad_(x.is_floating_point())
    given = dict(values)
    with torch.no_grad():
        output = call(forward, values)
        given["cotangent"] = 2 * output
        columns = torch.eye(output[0].numel(), dtype=output.dtype).reshape(-1, 1, *output.shape[1:])
        given["columns"] = 2**0.5 * columns.expand(-1, *output.shape)
    right = []
    for extension, (_, quantity, field) in EXTENSIONS.items():
        drawn = extension.__name__.endswith("MC") or extension.__name__ == "KFAC"
        with backpack(install(extension(), Layer)):
            loss(model(x), torch.zeros_like(output.flatten(1))).backward()
        for name, parameter in model[0].named_parameters():
            got, want = getattr(parameter, field), call(FUNCTIONS[quantity, name], given)
            pairs = zip(got, $FACTORS, strict=True) if isinstance(want, tuple) else [(got, want)]
            for one, other in pairs:  # what is drawn has the right shape
                other = torch.zeros_like(other[:1] if quantity.startswith("sqrt") else other) if drawn else other
                right.append(compare(f"{field} of {name}", 0 * one if drawn else one, other))
    return right
'''
