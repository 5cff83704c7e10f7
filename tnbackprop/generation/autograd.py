"""Target autograd: a torch.autograd.Function of a layer, whose backward is derived and keeps only what it reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..compiler.emit.layout import Row
from ..errors import UnsupportedError
from ..quantities import Grad, Quantity
from .checks.checking import check_lines
from .layer_file import LayerFile, checks_of, function_tables, functions, header, tables
from .parts.function import Function
from .parts.text import definition, docstring, statement


def autograd_quantities(quantities: Sequence[Quantity]) -> list[Quantity]:
    """The gradient, which is all that autograd asks for. Raises `UnsupportedError` for another quantity."""
    for quantity in quantities:
        if type(quantity) is not Grad:
            raise UnsupportedError(
                f"{quantity.name} is not available for autograd: a torch.autograd.Function gives gradients.\n"
                "  Ask for Grad, or generate for Target.TORCH; torch.func.vmap over its gradient gives individual ones."
            )
    return list(quantities) or [Grad()]


def autograd_source(file: LayerFile, title: str) -> str:
    """The file."""
    checks = checks_of(file, ("check_autograd(values)", _CHECK))
    checks.uses.add("gradients")
    lines = [*header(file, title, "torch.autograd", "needs torch only", checks), "", "import sys", "", "import torch"]
    lines += ["", *tables(file), *functions(file), "", "", *_class(file)]
    lines += [*function_tables(file), *check_lines(checks, {})]
    return "\n".join(lines) + "\n"


def _class(file: LayerFile) -> Iterator[str]:
    arguments = file.output.arguments
    backward = _backward(file)
    read = [a for a in arguments if any(a in each.arguments for each in backward.values())]
    positions = {name: k for k, name in enumerate(arguments)}
    yield "class Layer(torch.autograd.Function):"
    yield from docstring([f"output = Layer.apply({', '.join(arguments)}).", "Saved is what the wanted gradients read."])
    yield from ("", "    generate_vmap_rule = True", "", "    @staticmethod")
    yield from definition("forward", arguments, (), "    ")
    yield from statement("        return ", file.output.call({name: name for name in arguments}))
    yield from ("", "    @staticmethod", "    def setup_context(ctx, inputs, output):")
    kept = ", ".join(name if name in read else "_" for name in arguments)
    yield f"        {kept}{',' * (len(arguments) == 1)} = inputs"
    yield from ("        needs = ctx.needs_input_grad", "        ctx.save_for_backward(")
    for name in read:
        users = [positions[of] for of, each in backward.items() if name in each.arguments]
        yield f"            {name} if {' or '.join(f'needs[{k}]' for k in users)} else None,"
    yield from ("        )", "", "    @staticmethod", "    def backward(ctx, cotangent):")
    if read:
        yield f"        {', '.join(read)}{',' * (len(read) == 1)} = ctx.saved_tensors"
    yield "        needs = ctx.needs_input_grad"
    fixed = [name for name in arguments if name not in backward]
    for name in fixed:
        yield f"        if needs[{positions[name]}]:"
        yield f'            raise NotImplementedError("{name} had no gradient when this was generated")'
    yield "        return ("
    for name in arguments:
        if name in backward:
            code = backward[name].call({each: each for each in backward[name].arguments})
            yield from statement(" " * 12, Row((code, f" if needs[{positions[name]}] else None")), ",")
        else:
            yield "            None,"
    yield "        )"


def _backward(file: LayerFile) -> dict[str, Function]:
    """argument -> the function that gives its gradient."""
    prepared = file.prepared
    found = {own: each for (_, own), each in file.pulled.items()}
    found |= {prepared.parameters[dotted]: each for (_, dotted), each in file.functions.items()}
    return {name: each for name, each in found.items() if name in file.output.arguments}


_CHECK = '''
def check_autograd(values):
    """Numerical derivatives, twice; and gradients of single samples by torch.func."""
    names = forward.__code__.co_varnames[: forward.__code__.co_argcount]
    given = [values[name].clone().requires_grad_(name in DIFFERENTIABLE) for name in names]
    right = []
    for test in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        right.append(bool(test(Layer.apply, given, atol=1e-6)))
        print(f"ok    {test.__name__}")
    wanted = tuple(k for k, name in enumerate(names) if name in DIFFERENTIABLE)
    rows = tuple(0 if name in INPUTS else None for name in names)

    def number(cotangent, *sample):
        whole = [v.unsqueeze(0) if name in INPUTS else v for name, v in zip(names, sample, strict=True)]
        return (Layer.apply(*whole) * cotangent.unsqueeze(0)).sum()

    derive = torch.func.grad(number, tuple(k + 1 for k in wanted))
    plain = [value.detach() for value in given]
    got = torch.func.vmap(derive, (0, *rows))(values["cotangent"], *plain)
    want = gradients(values)
    for k, gradient in zip(wanted, got, strict=True):
        right.append(compare(f"vmap(grad) by {names[k]}", gradient, want[names[k]]))
    return right
'''
