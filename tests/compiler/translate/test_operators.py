"""Laws over the table of operators: what each row says is what torch does on a small example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import tnbackprop as tn
from tnbackprop.compiler.translate.graph import Value
from tnbackprop.compiler.translate.inplace import functional, in_place
from tnbackprop.compiler.translate.operators import PLAIN, TABLE, Copies, Memory, Operator, Same, row_of
from tnbackprop.compiler.translate.torch_internals import (
    arguments_of,
    is_mutation,
    name_of,
    of_aten,
    overload,
    shares_memory,
)

from .examples import CALLS, EVAL, OPTIONS, UNCHANGED, X, drawn

ROWS = {name: row for names, row in TABLE.items() for name in names.split()}
FACTS = [field.name for field in fields(Operator)]


def having(*facts: str) -> list[str]:
    """The operators whose rows say something of one of these."""
    return [name for name, row in ROWS.items() if any(getattr(row, fact) != getattr(PLAIN, fact) for fact in facts)]


def target_of(name: str) -> Any:
    found = overload(name)
    assert found is not None, f"this torch has no {name}"
    return found


def run(name: str, *args: Any) -> Any:
    """The example's call, or one with other arguments; with the same draws each time."""
    torch.manual_seed(0)
    return target_of(name)(*(args or CALLS[name]), **OPTIONS.get(name, {}))


def first(value: Any) -> Tensor:
    found: Tensor = value[0] if isinstance(value, tuple | list) else value
    return found


def bound(name: str, args: tuple[Any, ...] | None = None) -> dict[str, Any]:
    """The arguments as a call in a graph has them."""
    found: dict[str, Any] = {}
    args = CALLS[name] if args is None else args
    for k, argument in enumerate(arguments_of(target_of(name))):
        given = args[k] if k < len(args) else OPTIONS.get(name, {}).get(argument.name, argument.default_value)
        found["input" if argument.name == "self" else argument.name] = given
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def spelled(target: Any, arguments: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """What another spelling gives, where the values of the graph are tensors again."""
    torch.manual_seed(0)
    names = ((a.name, "input" if a.name == "self" else a.name) for a in arguments_of(target))
    values = {name: arguments[key] for name, key in names if key in arguments}
    assert set(arguments) == {"input" if name == "self" else name for name in values}
    return target(**pytree.tree_map(lambda v: tensors[v.name] if isinstance(v, Value) else v, values))


def with_values(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors: dict[str, Tensor] = {}

    def value(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensors[f"x{len(tensors)}"] = leaf
        return Value(f"x{len(tensors) - 1}", tuple((size,) for size in leaf.shape), leaf.dtype)

    return pytree.tree_map(value, dict(arguments)), tensors


def equal(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_each_operator_is_there_and_has_an_example() -> None:
    for name in ROWS:
        assert overload(name) is not None, name
        assert name in CALLS, name
        assert row_of(target_of(name)) is ROWS[name]
    assert all(row != PLAIN for row in ROWS.values())
    assert row_of(torch.nn.Linear) is PLAIN and row_of(overload("tan")) is PLAIN


def test_each_fact_is_tried() -> None:
    """Of every field there is a row, and a test below."""
    assert all(having(fact) for fact in FACTS if fact not in ("given", "source"))


# the same values


@pytest.mark.parametrize("name", having("same"))
def test_same(name: str) -> None:
    row, args = ROWS[name], UNCHANGED.get(name, CALLS[name])
    got, given = run(name, *args), bound(name, args)[row.given]
    assert got.dtype == given.dtype and torch.equal(got, given)
    other, source = run(name), CALLS[name][0]
    if row.same is Same.CAST:
        assert other.dtype != source.dtype and torch.equal(other, source.to(other.dtype))
    else:
        assert (row.same is Same.ALWAYS) == torch.equal(other, source)


@pytest.mark.parametrize("name", having("reshapes"))
def test_reshapes(name: str) -> None:
    """Also where the elements lie in another order."""
    for source in (CALLS[name][0], CALLS[name][0].transpose(0, -1).contiguous().transpose(0, -1)):
        try:
            got = run(name, source, *CALLS[name][1:])
        except RuntimeError:  # view
            assert ROWS[name].copying
            got = target_of(ROWS[name].copying)(source, *CALLS[name][1:])
        assert torch.equal(got.flatten(), source.flatten())


SPELT: dict[str, tuple[Any, ...]] = {"cat": ([X],), "concat": ([X],)}
"""Calls that have another spelling, where the first ones that come to mind have none."""


@pytest.mark.parametrize("name", having("canonical"))
def test_canonical(name: str) -> None:
    args = SPELT.get(name, CALLS[name])
    arguments, tensors = with_values(bound(name, args))
    want = first(run(name, *args))
    if "empty" in name:  # whatever the memory had
        want = torch.zeros_like(want)
    spelling = ROWS[name].canonical
    assert spelling is not None
    found = spelling(arguments, tuple(want.shape))
    assert found is not None
    equal(spelled(*found, tensors), want)
    again = row_of(found[0]).canonical
    assert again is None or again(found[1], tuple(want.shape)) in (None, found)


@pytest.mark.parametrize("name", having("copying"))
def test_copying(name: str) -> None:
    turned = X.transpose(0, 1)
    with pytest.raises(RuntimeError, match="view"):
        run(name, turned, *CALLS[name][1:])
    other = target_of(ROWS[name].copying)
    assert torch.equal(other(turned, *CALLS[name][1:]), run(name, turned.contiguous(), *CALLS[name][1:]))


# several outputs


@pytest.mark.parametrize("name", having("pieces", "outputs"))
def test_outputs(name: str) -> None:
    row, outputs = ROWS[name], run(name)
    arguments, tensors = with_values(bound(name))
    shapes = [tuple(output.shape) for output in outputs]
    for k, output in enumerate(outputs):
        if row.pieces is not None:
            equal(spelled(*row.pieces(arguments, shapes, k), tensors), output)
        elif row.outputs[k]:
            other = tn.compiler.translate.spellings.call_of(overload(row.outputs[k]), arguments)
            equal(spelled(*other, tensors), output)
        else:
            assert k == 0
    assert row.pieces is not None or len(row.outputs) == len(outputs)


# derivatives


@pytest.mark.parametrize("name", having("no_gradient"))
def test_no_gradient(name: str) -> None:
    args = pytree.tree_map_only(Tensor, lambda a: a.clone().requires_grad_(a.is_floating_point()), CALLS[name])
    output, inputs = run(name, *args), [a for a in pytree.tree_leaves(args) if getattr(a, "requires_grad", False)]
    if name in ("bernoulli.p", "normal_functional"):  # torch knows none: nothing depends on the numbers
        assert torch.equal(output, run(name, X.exp(), *args[1:]))
    elif output.requires_grad:
        gradients = torch.autograd.grad(output.sum(), inputs, allow_unused=True, materialize_grads=True)
        assert not any(gradient.any() for gradient in gradients)


# what is coupled


def couples(name: str, source: Tensor, axis: int) -> bool:
    """Whether an output beside an entry changes with it, or the entries along the axis are not treated alike."""

    def called(tensor: Tensor) -> Tensor:
        args = pytree.tree_map(lambda leaf: tensor if leaf is source else leaf, CALLS[name])
        found = first(run(name, *args))
        return found.unsqueeze(CALLS[name][1]) if found.ndim < tensor.ndim else found

    output = called(source)
    if output.shape[axis] != source.shape[axis]:
        return True
    for k in range(source.shape[axis]):
        changed = source.clone()
        changed.select(axis, k).mul_(-0.7).add_(0.1)
        same = torch.isclose(called(changed), output, rtol=0, atol=1e-9).transpose(0, axis)
        if not (same[:k].all() and same[k + 1 :].all()):
            return True
    rolled = torch.isclose(called(source.roll(1, axis)), output.roll(1, axis), rtol=0, atol=1e-9)
    return not bool(rolled.all())


@pytest.mark.parametrize("name", having("along", "takes", "positions"))
def test_coupled_axes(name: str) -> None:
    """Exactly those axes: where the batch may be, each sample is on its own."""
    row, arguments = ROWS[name], bound(name)
    source = arguments[row.source]
    said = {
        *row.along(arguments, source.ndim), *row.takes(arguments, source.ndim), *row.positions(arguments, source.ndim)
    }  # fmt: skip
    assert said == {axis for axis in range(source.ndim) if couples(name, source, axis)}
    assert not said or len(said) < source.ndim


@pytest.mark.parametrize("name", having("takes"))
def test_takes(name: str) -> None:
    assert first(run(name)).ndim == X.ndim - 1


def test_flat_axes() -> None:
    """Without an axis these take the tensor as flat."""
    for name, arguments in (("roll", {"dims": ()}), ("take_along_dim", {"dim": None})):
        assert set(ROWS[name].along({**bound(name), **arguments}, 3)) == {0, 1, 2}
    assert not torch.equal(X.roll(1), X.roll(1, 0)) and not torch.equal(X.roll(1), X.roll(1, 2))
    assert not ROWS["flip"].along({"dims": ()}, 3)


def test_batch_first() -> None:
    for name in ("lstm.input", "gru.input"):
        assert set(ROWS[name].positions({"batch_first": True}, 3)) == {1, 2}


@pytest.mark.parametrize("name", having("indices"))
def test_indices(name: str) -> None:
    """Entry k picks along axis k: what is not picked keeps its place."""
    (axis,) = [k for k, index in enumerate(bound(name)[ROWS[name].indices]) if index is not None]
    assert [k for k in range(X.ndim) if couples(name, X, k)] == [axis]


@pytest.mark.parametrize("name", having("equation"))
def test_equation(name: str) -> None:
    equation, *rest = run(name), *CALLS[name][1]
    torch.testing.assert_close(equation, torch.einsum(bound(name)[ROWS[name].equation], rest))


@pytest.mark.parametrize("name", having("copies"))
def test_copies(name: str) -> None:
    if ROWS[name].copies is Copies.ONE:
        assert torch.equal(run(name, X[:1], (6, -1, -1)), torch.cat([X[:1]] * 6))
        return
    outer = ROWS[name].copies is Copies.OUTER
    copies = run(name).unflatten(0, (2, 3) if outer else (3, 2))
    for k in range(2):
        assert torch.equal(copies.select(0 if outer else 1, k), X)


@pytest.mark.parametrize("name", having("counts"))
def test_counts(name: str) -> None:
    assert run(name).tolist() == [0, 1, 2, 3, 4]


# memory


def memory(tree: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)}


def kinds(name: str) -> Iterator[tuple[Any, ...]]:
    """The example, and one in which nothing is to be done."""
    yield CALLS[name]
    yield from (table[name] for table in (EVAL, UNCHANGED) if name in table)
    if CALLS[name][0] is X:
        yield X.transpose(0, 1).reshape(5, 4, 3).transpose(0, 2), *CALLS[name][1:]
    if name in ("add.Tensor", "mul.Tensor", "sub.Tensor", "div.Tensor"):
        yield X, torch.tensor(float(name[:3] in ("mul", "div")), dtype=X.dtype)
    if name == "relu":
        yield (X.abs(),)


@pytest.mark.parametrize("name", having("memory"))
def test_memory(name: str) -> None:
    kind = ROWS[name].memory
    results = [(args, run(name, *args)) for args in kinds(name)]
    shared = [bool(memory(got) & memory(args)) for args, got in results]
    if kind is Memory.OWN:
        assert not any(shared)
    elif kind is Memory.EITHER:
        assert not shared[0] and shared[1] and not shares_memory(target_of(name))
    else:
        assert all((got.data_ptr(), got.stride()) == (a[0].data_ptr(), a[0].stride()) for a, got in results)


@pytest.mark.parametrize("name", having("into"))
def test_into_the_first_operand(name: str) -> None:
    want, (own, *others) = run(name), CALLS[name]
    own = own.clone()
    into = ROWS[name].into
    got = target_of(f"{name}.{into}")(own, *others, **{into: own})
    assert torch.equal(got, want) and torch.equal(own, want)


ALONE = [
    target for target in tn.RULES
    if of_aten(target) and in_place(target) is not None and name_of(target)[0] not in ("clamp", "clip")
    and [a.name for a in arguments_of(target) if not a.has_default_value()] == ["self"]
]  # fmt: skip


@pytest.mark.parametrize("target", ALONE, ids=str)
def test_in_place(target: Any) -> None:
    """The twin of an operator without another operand computes the same, over its operand."""
    own = X.abs().add(1.1 if "acosh" in str(target) else 0.2)
    want, twin = target(own), in_place(target)
    assert twin is not None and is_mutation(twin) and functional(twin, "") is target
    got = twin(own)
    assert got is own and torch.equal(own.nan_to_num(), want.nan_to_num())


def test_many_are_in_place() -> None:
    assert len(ALONE) > 40 and in_place(overload("view")) is None and in_place(overload("t")) is None


@pytest.mark.parametrize("name", having("functional"))
def test_functional(name: str) -> None:
    other, own = functional(target_of(name), ""), X.clone()
    assert other is target_of(ROWS[name].functional) and not is_mutation(other) and is_mutation(target_of(name))
    torch.manual_seed(0)
    assert torch.equal(other(X, *CALLS[name][1:]), run(name, own, *CALLS[name][1:]))
    assert torch.equal(own, run(name, X.clone(), *CALLS[name][1:]))


def test_no_functional_counterpart() -> None:
    with pytest.raises(tn.UnsupportedError, match="no functional counterpart"):
        functional(target_of("rrelu_with_noise"), "here")


@pytest.mark.parametrize("name", having("refused"))
def test_refused(name: str) -> None:
    table = drawn(4, 5)
    before = table.clone()
    run(name, table, *CALLS[name][1:])
    assert is_mutation(target_of(name)) and not torch.equal(table, before)
