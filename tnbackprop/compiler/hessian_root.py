"""The root of any loss's Hessian: columns by reverse over reverse, then an eigendecomposition per sample.

The loss is a sum over samples, so one product with the same tangent for all of them gives that column of each block.
"""

from __future__ import annotations

from math import prod

from .arrange import text
from .cost import Kernel
from .forward import call_code
from .graph import Graph
from .listing import lines_of
from .roots import LossRoot
from .store import NO_WORK, Step, Store


def hessian_root(store: Store, graph: Graph, root: LossRoot, number: str) -> tuple[str, str]:
    """Names of the root [D, N, *output], and of its smallest eigenvalue relative to the largest.

    Of a signed one, the columns are roots of the magnitudes, and the second name is that of their signs, [D, N].
    """
    output = root.output
    size, shape = prod(int(s) for s in output.shape[1:]), text(output.shape)
    inputs = _function(store, graph, root, f"loss_{number}")
    own = ", ".join("o" if name == output.name else store.resolve(name) for name in inputs)
    base = store.resolve(output.name)
    eye = f"torch.eye({size}, dtype={base}.dtype, device={base}.device).reshape({size}, 1, {text(output.shape[1:])})"
    gradient = f"torch.func.grad(lambda o: loss_{number}({own}))"
    column = f"torch.func.vmap(lambda e: torch.func.vjp({gradient}, {base})[1](e.expand({shape}))[0])({eye})"
    hessian = store.add(column, (size, *output.shape), Kernel.NATIVE, name=f"hessian_{number}")
    blocks = f"{hessian}.reshape({size}, N, {size}).transpose(0, 1)"
    eigen = store.add(f"torch.linalg.eigh({blocks})", (), Kernel.NATIVE, name=f"eigen_{number}")
    size_of = "abs()" if root.signed else "clamp(min=0)"
    positive = f"{eigen}[0].{size_of}.sqrt().unsqueeze(1)"
    code = f"({eigen}[1] * {positive}).permute(2, 0, 1).reshape({size}, {shape})"
    name = store.add(code, (size, *output.shape), Kernel.NATIVE, name=f"hessian_root_{number}")
    if root.signed:
        return name, f"{eigen}[0].sign().t()"
    smallest = f"{eigen}[0].min() / {eigen}[0].abs().max().clamp(min=torch.finfo({base}.dtype).tiny)"
    return name, store.add(smallest, (), Kernel.NATIVE, name=f"indefinite_{number}")


def _function(store: Store, graph: Graph, root: LossRoot, name: str) -> list[str]:
    """The loss as a function of the output and of what else it reads; returns the names of its arguments."""
    made = {call.output.name for call in root.calls}
    reads = [v.name for call in root.calls for v in call.tensors.values() if v.name not in made]
    inputs = list(dict.fromkeys([root.output.name, *reads]))
    steps = []
    for call in root.calls:
        code = call_code(call, lambda n: n)
        needed = tuple(v.name for v in call.tensors.values())
        steps.append(Step(call.output.name, code, needed, Kernel.NATIVE, NO_WORK))
    body = [f"    N = {root.output.name}.shape[0]", *lines_of(tuple(steps), {str(graph.loss)})]
    store.functions[name] = "\n".join([f"def {name}({', '.join(inputs)}):", *body, f"    return {graph.loss}"])
    return inputs
