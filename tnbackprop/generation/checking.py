"""The part of a generated file that checks it: values for every argument, and autograd on the file's own forward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..compiler.layer import COTANGENT
from ..diagram import N
from ..quantities import Quantity
from .layer_functions import Prepared
from .references import FACTORED, of_layer
from .text import data, wrapped

EXAMPLE = '''
def example(samples, columns, seed=0):
    """Values for every argument, in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = {}
    for name, (shape, low, high) in ARGUMENTS.items():
        shape = [samples if size == "N" else size for size in shape]
        if isinstance(low, int):
            values[name] = torch.randint(low, high + 1, shape, generator=generator)
        else:
            values[name] = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    output = call(forward, values)
    values["cotangent"] = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    values["columns"] = torch.randn((columns, *output.shape), generator=generator, dtype=torch.float64)
    return values


def call(function, values):
    """The function of those values that are its arguments."""
    code = function.__code__
    return function(**{name: values[name] for name in code.co_varnames[: code.co_argcount]})


def pulled_back(values, cotangent):
    """Each sample's gradient of <cotangent, output>, by autograd on `forward`: {argument: [N, *argument]}."""
    found = {name: [] for name in DIFFERENTIABLE}
    for n in range(len(cotangent)):
        sample = {name: value[n : n + 1] if name in INPUTS else value for name, value in values.items()}
        leaves = {name: sample[name].clone().requires_grad_() for name in DIFFERENTIABLE}
        total = (call(forward, sample | leaves) * cotangent[n : n + 1]).sum()
        gradients = torch.autograd.grad(total, list(leaves.values()), materialize_grads=True)
        for name, gradient in zip(DIFFERENTIABLE, gradients, strict=True):
            found[name].append(gradient if name in INPUTS else gradient.unsqueeze(0))
    return {name: torch.cat(gradients) for name, gradients in found.items()}


def compare(name, got, want, tolerance=1e-9):
    """Print the largest difference, and return whether it is small enough."""
    same = got.shape == want.shape
    error = float((got - want).abs().max() / max(1.0, float(want.abs().max()))) if same else float("inf")
    right = error <= tolerance
    print(f"{'ok   ' if right else 'WRONG'} {name}: {error:.1e}")
    return right
'''

CHECK_QUANTITIES = '''
def check_quantities(values):
    """Every quantity against its definition in individual gradients."""
    G = pulled_back(values, values["cotangent"])
    S = [pulled_back(values, column) for column in values["columns"]]
    V = {name: torch.stack([pulled[name] for pulled in S]) for name in G}
    J = one_hot_gradients(values)
    right = [compare("vjp of input " + name, call(f, values), G[name]) for name, f in VJPS.items()]
    right += [compare("vjp of columns " + name, call(f, values), V[name]) for name, f in VJPS_OF_COLUMNS.items()]
    for (quantity, name), function in FUNCTIONS.items():
        label, got = f"{quantity} of {name}", call(function, values)
        p = STATE[name]
        if quantity in REFERENCES:
            right.append(compare(label, got, REFERENCES[quantity](G[p], V[p], J[p])))
    return right
'''

ONE_HOT = '''
def one_hot_gradients(values):
    """Every output's gradients: {argument: [C, N, *argument]}."""
    output = call(forward, values)
    columns = torch.eye(output[0].numel(), dtype=output.dtype).reshape(-1, 1, *output.shape[1:])
    columns = columns.expand(-1, *output.shape)
    pulled = [pulled_back(values, column) for column in columns]
    return {name: torch.stack([each[name] for each in pulled]) for name in DIFFERENTIABLE}
'''

CHECK_RECORDED = '''
def check_recorded(values):
    """Kronecker factors that are exact for one sample: the block. Else: what it was when this file was written."""
    one = {name: value[:1] if name in INPUTS else value for name, value in values.items()}
    one |= {"cotangent": values["cotangent"][:1], "columns": values["columns"][:, :1]}
    columns = [pulled_back(one, column) for column in one["columns"]]
    right = []
    for (quantity, name), recorded in RECORDED.items():
        label, function = f"{quantity} of {name}", FUNCTIONS[quantity, name]
        if recorded is None:
            V = torch.stack([pulled[STATE[name]] for pulled in columns]).flatten(1)
            block, *others = call(function, one)
            for factor in others:
                block = torch.kron(block, factor)
            right.append(compare(f"{label}, one sample", block, V.T @ V))
        else:
            got, want = record(call(function, values)), torch.tensor(recorded, dtype=torch.float64)
            right.append(compare(f"{label}, as recorded", got, want, 1e-5))
    return right


def record(value):
    """One number for a tensor, or for each of several."""
    tensors = value if isinstance(value, tuple) else (value,)
    return torch.stack([t.flatten() @ torch.cos(torch.arange(t.numel(), dtype=t.dtype)) for t in tensors])
'''

CHECK_TOGETHER = '''
def check_together(values):
    """What `compute` gives is what the functions give."""
    state = {name: values[argument] for name, argument in STATE.items()}
    given = [values[name] for name in (*INPUTS, *GIVEN)]
    found = compute(state, *given)
    right = []
    for (quantity, name), function in FUNCTIONS.items():
        alone, together = call(function, values), found[quantity][name]
        pairs = zip(alone, together, strict=True) if isinstance(alone, tuple) else [(alone, together)]
        right += [compare(f"compute, {quantity} of {name}", one, other) for one, other in pairs]
    return right
'''

MAIN = '''
def check():
    """Compare everything with autograd, in float64; returns the exit status."""
    values = example(samples=3, columns=4)
    right = {checks}
    print(f"{{sum(right)}} of {{len(right)}} agree")
    return 0 if all(right) else 1


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        print(__doc__)
        sys.exit(2 if sys.argv[1:] else 0)
    sys.exit(check())
'''


def lines_of_text(text: str) -> list[str]:
    """A piece of a file: two empty lines, then the text."""
    return ["", "", *(row for line in text.strip("\n").split("\n") for row in wrapped(line))]


def arguments(prepared: Prepared, x: Sequence[torch.Tensor]) -> list[str]:
    """ARGUMENTS = {name: (shape, low, high)}, from the layer's tensors: positive ones stay positive."""
    graph = prepared.layer.graph
    named = dict(prepared.module.named_parameters()) | dict(prepared.module.named_buffers())
    tensors = dict(zip([v for v in graph.inputs if v != COTANGENT], x, strict=True))
    tensors |= {value: named[dotted[0]].detach() for value, dotted in graph.parameters.items()}
    tensors |= {value: named[dotted] for value, dotted in graph.buffers.items()}
    table = {}
    for value, tensor in tensors.items():
        shape = tuple("N" if size == N else size for size in graph.values[value].shape)
        table[prepared.names.of[value]] = (shape, *bounds(tensor))
    return data("ARGUMENTS", table)


def bounds(tensor: torch.Tensor, given: bool = False) -> tuple[float, float] | tuple[int, int]:
    """Between which numbers a value may lie, by what it is in the example; `given` ones may be probabilities."""
    if not tensor.is_floating_point():
        used = tensor[tensor >= 0] if bool((tensor >= 0).any()) else tensor  # a negative label among others is ignored
        return (int(used.min()), int(used.max())) if tensor.numel() else (0, 0)
    if given and bool(((tensor >= 0) & (tensor <= 1)).all()):
        return (0.0, 1.0)
    return (0.5, 1.5) if tensor.numel() and bool((tensor > 0).all()) else (-1.0, 1.0)


def references(quantities: Sequence[Quantity]) -> list[str]:
    """REFERENCES = {quantity: its definition}, as source."""
    lines = ["REFERENCES = {"]
    for quantity in quantities:
        text = of_layer(quantity)
        if text is not None and not isinstance(quantity, FACTORED):
            lines.append(f'    "{quantity.name}": lambda G, V, J: {text},')
    return [*lines, "}"] if len(lines) > 1 else ["REFERENCES = {}"]

