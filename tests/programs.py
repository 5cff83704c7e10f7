"""Programs in tests: a store of given values, the text of its steps, and their values by meaning and by text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
import sympy
import torch
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.compiler.emit.printing import torch_code
from tnbackprop.compiler.emit.source import Writer
from tnbackprop.compiler.lower.arrange import arranged
from tnbackprop.compiler.lower.table import LOWERINGS
from tnbackprop.compiler.plan.slices import columns_first
from tnbackprop.compiler.program.cost import CPU, Rates, size_at
from tnbackprop.compiler.program.expr import Ref, Value, helpers, reads
from tnbackprop.compiler.program.functions import Function, helper
from tnbackprop.compiler.program.interpret import Interpreter
from tnbackprop.compiler.program.store import LIKE, Store
from tnbackprop.diagram.core import N, Operand, Size, Tensor, operand_tensors

Shapes = Mapping[str, tuple[Size, ...]]


def shapes_of(*operands: Operand) -> Shapes:
    """The shapes of the tensors that operands read."""
    found = (tensor for operand in operands for tensor in operand_tensors(operand))
    return {tensor.name: tuple(leg.size for leg in tensor.legs) for tensor in found}


def store_of(shapes: Shapes, rates: Rates = CPU, batch: int = 3, itemsize: int = 8, one_sample: bool = False) -> Store:
    """A store of values that are given."""
    return with_given(Store(rates, batch, itemsize, one_sample), shapes)


def with_given(store: Store, shapes: Shapes) -> Store:
    """The store with these values from outside."""
    for name, shape in shapes.items():
        store.given(name, shape)
    store.like = store.given(LIKE, ())
    store.lowerings, store.outermost = LOWERINGS, (columns_first,)
    return store


def seen(tensor: Tensor, store: Store) -> Ref:
    """A given value with the legs of a tensor."""
    return Ref(store.find(tensor.name), tensor.legs, tensor.legs)


def writer(steps: Iterable[Value], **plan: Any) -> Writer:
    """What writes these steps; values that none of them makes are called by their own names."""
    steps = list(steps)
    outside = [value for step in steps for value in step.inputs if value not in steps]
    given = {value.key: value for value in outside}
    whole = SimpleNamespace(timed=[(step, 1) for step in steps], given=given, **plan)
    return Writer(SimpleNamespace(inputs=()), whole)  # type: ignore[arg-type]


def codes(store: Store) -> list[str]:
    """The text of the steps of a store."""
    text = writer(store.steps)
    named = [text.names(step) for step in store.steps]
    assert len(set(named)) == len(named)
    return [text.printer.text(step.expr) for step in store.steps]


def shown(expr: Any) -> str:
    """The text of an expression of values that have hints."""
    return writer([Value("shown", expr, (), inputs=reads(expr))]).printer.text(expr)


def code_of(program: tn.Program) -> dict[Value, str]:
    """The text of every step of a compiled program."""
    return {step: code for step, (_, code) in program.compiled.texts.items()}


def source_of(text: Writer) -> dict[str, Any]:
    """The functions next to the program, and what a source knows."""
    namespace: dict[str, Any] = {"torch": torch, "progress": iter}
    for source in text.known.values():
        exec(source, namespace)
    for body in text.bodies:
        exec("\n".join(text._function(body)), namespace)
    return namespace


def elementwise(expr: sympy.Expr, values: Mapping[sympy.Symbol, Any]) -> Any:
    """A sympy expression of tensors."""
    names = {symbol: f"value{k}" for k, symbol in enumerate(values)}
    return eval(torch_code(expr, names), {"torch": torch} | {names[s]: value for s, value in values.items()})


def assert_same(one: Any, other: Any, what: str) -> None:
    """Tensors of equal shape, dtype and numbers; anything else equal."""
    ones, others = pytree.tree_leaves(one), pytree.tree_leaves(other)
    assert len(ones) == len(others), what
    for a, b in zip(ones, others, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), what
        else:
            assert a == b, what


def run(store: Store, ref: Ref, values: Mapping[str, torch.Tensor], size: int) -> torch.Tensor:
    """Each step from nothing but its inputs, by meaning and by text; its shape is what the plan says."""
    result = arranged(store, ref, tuple((leg,) for leg in ref.order))
    text = writer([*store.steps, Value("result", result, (), inputs=reads(result))])
    namespace = source_of(text) | {"N": size}
    interpreter = Interpreter({N: size}, elementwise)
    env: dict[Value, Any] = {store.like: torch.zeros((), dtype=torch.float64)}
    env |= {store.find(name): value for name, value in values.items()}

    def computed(expr: Any, inputs: Iterable[Value]) -> Any:
        own = {value: env[value] for value in inputs}
        code = text.printer.text(expr)
        found = interpreter.value(expr, own)
        assert_same(found, eval(code, namespace | {text.names(v): value for v, value in own.items()}), code)
        return found

    for step in store.steps:
        env[step] = computed(step.expr, step.inputs)
        planned = tuple(size_at(s, size) for s in step.shape)
        assert tuple(env[step].shape) == planned, f"{step} = {text.printer.text(step.expr)}"
    found: torch.Tensor = computed(result, reads(result))
    return found.reshape([size_at(leg.size, size) for leg in ref.order])


def called(steps: Iterable[Value], function: Function) -> list[Value]:
    """The steps that call a helper."""
    return [step for step in steps if function in helpers(step.expr)]


def broken(module: object, name: str, source: str) -> pytest.MonkeyPatch:
    """A patch that gives the helper of a module another source; to be undone."""
    patch = pytest.MonkeyPatch()
    old: Function = getattr(module, name)
    patch.setattr(module, name, helper(old.name, source, memory=old.memory))
    return patch
