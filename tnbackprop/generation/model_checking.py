"""The check of a model's file: definitions on individual gradients, Jacobians and the loss's Hessian, by autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy

from ..compiler import Compiled
from ..diagram import N
from ..quantities import (
    NTK,
    BatchDot,
    BatchGrad,
    BatchL2,
    DiagGGN,
    GGNTrace,
    Grad,
    Jacobians,
    Quantity,
    Scale,
    SecondMoment,
    Variance,
)
from .checking import lines_of_text
from .text import data, statement, wrapped

Recorded = Mapping[str, Mapping[str, tuple[float, ...]]]
SAMPLES = 3

OF_MODEL: dict[type[Quantity], str] = {
    Grad: "G.sum(0)",
    BatchGrad: "G",
    BatchL2: "G.flatten(1).square().sum(1)",
    BatchDot: "G.flatten(1) @ G.flatten(1).T",
    SecondMoment: "G.square().sum(0)",
    Variance: "(G - G.mean(0)).square().mean(0)",
    DiagGGN: "D.sum(0)",
    GGNTrace: "D.flatten(1).sum(1)",
    Jacobians: "J",
    NTK: 'torch.einsum("ncp,mdp->ncmd", J.flatten(2), J.flatten(2))',
}
"""In G [N, *p], J [N, C, *p] and the diagonals of the GGN's shares D [N, *p]."""


def splits(compiled: Compiled) -> bool:
    """Whether the loss is a function of one output with the batch in front."""
    graph = compiled.graph
    return isinstance(graph.output, str) and graph.values[graph.output].axes[0][:1] == (N,)


def of_model(quantity: Quantity, scale: float) -> str | None:
    """The definition; None where there is none. The loss multiplies that of each sample by `scale`."""
    text = OF_MODEL.get(type(quantity))
    kind = getattr(quantity, "scale", Scale.BACKPACK)
    if isinstance(quantity, DiagGGN) and type(quantity) is DiagGGN and quantity.per_sample:
        return "D"
    if text is None or (scale == 1.0 and not isinstance(quantity, SecondMoment)) or kind is Scale.BACKPACK:
        return text
    if isinstance(quantity, SecondMoment):
        return f"(G / {scale!r}).square().mean(0)"
    if isinstance(quantity, Variance):
        return f"{text} / {scale**2!r}"
    power = 1 if isinstance(quantity, BatchGrad) else 2
    return f"{text} / {scale**power!r}" if kind is Scale.UNSCALED else text


def with_records(write: Callable[[Recorded], str], compiled: Compiled, quantities: Sequence[Quantity]) -> str:
    """The file with numbers that it gives itself, for what its check has no definition of."""
    known = [q.name for q in quantities if splits(compiled) and of_model(q, _scale(compiled)) is not None]
    unknown = [q.name for q in quantities if q.name not in known]
    first = write({name: {} for name in unknown})
    if not unknown:
        return first
    namespace: dict[str, Any] = {"__name__": "generated"}
    exec(compile(first, "<generated>", "exec"), namespace)
    results = namespace["run"](namespace["example"]())[2]
    record = namespace["record"]
    found = {
        name: {p: tuple(float(f"{x:.8g}") for x in record(value).tolist()) for p, value in results[name].items()}
        for name in unknown
    }
    return write(found)


def _scale(compiled: Compiled) -> float:
    """What the loss multiplies each sample's by, for the samples of the check."""
    return float(sympy.sympify(compiled.derived.scale).subs(N, SAMPLES))


def check_lines(compiled: Compiled, quantities: Sequence[Quantity], recorded: Recorded) -> list[str]:
    graph = compiled.graph
    texts = {q.name: of_model(q, _scale(compiled)) for q in quantities} if splits(compiled) else {}
    known = {name: text for name, text in texts.items() if text is not None}
    trainable = [name for name in graph.parameters if graph.values[name].depends_on]
    lines = ["", "", *statement(f"DIFFERENTIABLE = {tuple(trainable)!r}"), "REFERENCES = {"]
    lines += [row for name, text in known.items() for row in wrapped(f'    "{name}": lambda G, J, D: {text},')]
    lines += ["}"]
    low = any(word in compiled.source for word in ("torch.float32", "torch.bfloat16", "torch.float16"))
    lines.append(f"TOLERANCE = {1e-4 if low else 1e-9!r}")
    pieces = [_EXAMPLE]
    checks = []
    if known:
        pieces += [_GRADIENTS]
        wants_jacobian = any(word in text for text in known.values() for word in ("J", "D"))
        needs_hessian = any("D" in text for text in known.values())
        pieces += [_JACOBIANS] if wants_jacobian else []
        pieces += [_DIAGONALS] if needs_hessian else []
        check = _CHECK.replace("JACOBIANS", "jacobians(values)" if wants_jacobian else "dict.fromkeys(G)")
        pieces.append(check.replace("DIAGONALS", "diagonals(values, J)" if needs_hessian else "dict.fromkeys(G)"))
        checks.append("check_definitions(values, results)")
    if recorded:
        lines += data("RECORDED", {name: dict(by) for name, by in recorded.items()})
        pieces.append(_RECORDED)
        checks.append("check_recorded(results)")
    for piece in [*pieces, _MAIN.format(checks=" + ".join(checks) or "[True]")]:
        lines += lines_of_text(piece.replace("SAMPLES", str(SAMPLES)))
    return lines


_EXAMPLE = '''
def example():
    """Values for every parameter, buffer and input, in float64."""
    generator = torch.Generator().manual_seed(0)
    values = {}
    for name, (shape, low, high) in ARGUMENTS.items():
        shape = [SAMPLES if size == "N" else size for size in shape]
        if isinstance(low, int):
            values[name] = torch.randint(low, high + 1, shape, generator=generator)
        else:
            values[name] = low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)
    return values


def run(values):
    """`compute` on the example."""
    state = {name: values[value] for value, name in (PARAMETERS | BUFFERS).items()}
    return compute(state, [values[name] for name in INPUTS], generator=torch.Generator().manual_seed(0))


def compare(name, got, want, tolerance):
    """Print the largest difference, and return whether it is small enough."""
    same = got.shape == want.shape
    error = float((got - want).abs().max() / max(1.0, float(want.abs().max()))) if same else float("inf")
    right = error <= tolerance
    print(f"{'ok   ' if right else 'WRONG'} {name}: {error:.1e}")
    return right
'''

_GRADIENTS = '''
def call(function, values):
    """The function of those values that are its arguments."""
    code = function.__code__
    return function(**{name: values[name] for name in code.co_varnames[: code.co_argcount]})


def of_copies(values):
    """The output where every sample has a copy of its own of each parameter, and the copies."""
    copies = {name: values[name].expand(SAMPLES, *values[name].shape).clone() for name in DIFFERENTIABLE}
    for copy in copies.values():
        copy.requires_grad_()
    outputs = []
    for n in range(SAMPLES):
        sample = values | {name: values[name][n : n + 1] for name in INPUTS if values[name].ndim}
        outputs.append(call(forward, sample | {name: copy[n] for name, copy in copies.items()}))
    return torch.cat(outputs), copies


def gradients(values):
    """Derivatives of the loss by the copies, [N, *p]."""
    output, copies = of_copies(values)
    loss = call(loss_of, values | {OUTPUT: output})
    return dict(zip(copies, torch.autograd.grad(loss, list(copies.values()), materialize_grads=True), strict=True))
'''

_JACOBIANS = '''
def jacobians(values):
    """Derivatives of every output by the copies, [N, C, *p]."""
    output, copies = of_copies(values)
    rows = []
    for column in output.reshape(SAMPLES, -1).unbind(1):
        rows.append(torch.autograd.grad(column.sum(), list(copies.values()), retain_graph=True, materialize_grads=True))
    return {name: torch.stack(each, 1) for name, each in zip(copies, zip(*rows, strict=True), strict=True)}
'''

_DIAGONALS = '''
def diagonals(values, J):
    """Diagonals of each sample's share of the GGN, [N, *p], from the Hessian of the loss by the output."""
    output = call(forward, values)

    def loss(flat):
        return call(loss_of, values | {OUTPUT: flat.reshape(output.shape)})

    H = torch.autograd.functional.hessian(loss, output.flatten())
    H = H.reshape(SAMPLES, output.numel() // SAMPLES, SAMPLES, -1)
    own = torch.stack([H[n, :, n] for n in range(SAMPLES)])
    flat = {name: j.flatten(2) for name, j in J.items()}
    found = {name: torch.einsum("ncp,ncd,ndp->np", j, own, j) for name, j in flat.items()}
    return {name: d.reshape(SAMPLES, *J[name].shape[2:]) for name, d in found.items()}
'''

_CHECK = '''
def check_definitions(values, results):
    """Every quantity that has one against its definition."""
    G = gradients(values)
    J = JACOBIANS
    D = DIAGONALS
    right = []
    for quantity, reference in REFERENCES.items():
        for value in DIFFERENTIABLE:
            name = PARAMETERS[value]
            want = reference(G[value], J[value], D[value])
            right.append(compare(f"{quantity} of {name}", results[quantity][name], want, TOLERANCE))
    return right
'''

_RECORDED = '''
def check_recorded(results):
    """Quantities without a definition in a few lines: what they were when this file was written."""
    right = []
    for quantity, by_name in RECORDED.items():
        for name, recorded in by_name.items():
            got, want = record(results[quantity][name]), torch.tensor(recorded, dtype=torch.float64)
            right.append(compare(f"{quantity} of {name}, as recorded", got, want, 1e-5))
    return right


def record(value):
    """One number for a tensor, or for each of several."""
    tensors = value if isinstance(value, tuple) else (value,)
    return torch.stack([t.double().flatten() @ torch.cos(torch.arange(t.numel()).double()) for t in tensors])
'''

_MAIN = '''
def check():
    """Compare with autograd, in float64; returns the exit status."""
    values = example()
    loss, _, results = run(values)
    print(f"loss {{float(loss):.6g}}")
    right = {checks}
    print(f"{{sum(right)}} of {{len(right)}} agree")
    return 0 if all(right) else 1


if __name__ == "__main__":
    if sys.argv[1:] != ["--check"]:
        print(__doc__)
        sys.exit(2 if sys.argv[1:] else 0)
    sys.exit(check())
'''
