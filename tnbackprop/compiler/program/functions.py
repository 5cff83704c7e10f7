"""Functions: one row for every torch function, method or operator that a program calls.

A row says once how a call is written, what it means, in which operand it is linear, whose memory its result has, and
how it is written over an operand or into memory that is there already.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import Any

import torch

from ...diagram.core import Size
from ...notation.code import Code
from ...notation.code.helper import Helper
from ..translate.torch_internals import OpOverload

Shape = tuple[Size, ...]


class Form(Enum):
    """How a call is written."""

    FUNCTION = "name(x, y)"
    METHOD = "x.name(y)"
    PROPERTY = "x.name"
    OPERATOR = "x name y"
    PREFIX = "name x"
    ITEM = "x[y]"


class Linear(Enum):
    """In which operand a function is linear."""

    NOT = "in none"
    FIRST = "in the first, where the others do not read it"
    EACH = "in each, where the others do not read it"


class Memory(Enum):
    """Whose memory the result has."""

    UNKNOWN = "its own or an operand's"
    OWN = "its own, whatever it is given"
    SEEN = "that of the first operand, in another order or a part of it"
    WHOLE = "that of the first operand, each element once and in the same order, or a copy of it"


@dataclass(frozen=True, eq=False)
class Function:
    """One row.

    name      as it is written
    meaning   what it computes of tensors
    shape     of the result, from that of the first operand and the other arguments; None where it is not needed
    over      what writes the result over an operand of its shape: the method "mul_", or an operator
    into      the function that takes out=
    adding    the method that adds the result to what is there: "addmm_"
    source    of a helper that is written next to the program
    """

    name: str
    form: Form
    meaning: Callable[..., Any]
    linear: Linear = Linear.NOT
    memory: Memory = Memory.UNKNOWN
    shape: Callable[..., Shape] | None = None
    over: str | OpOverload = ""
    into: str = ""
    adding: str = ""
    source: str = ""

    def __repr__(self) -> str:
        return f"<{self.name}>"


def dotted(name: str) -> Any:
    """torch.mm for "torch.mm"."""
    found: Any = torch
    for part in name.split(".")[1:]:
        found = getattr(found, part)
    return found


def function(name: str, **options: Any) -> Function:
    """A row for a function of torch."""
    return Function(name, Form.FUNCTION, dotted(name), **options)


def method(name: str, **options: Any) -> Function:
    """A row for a method of tensors."""
    return Function(name, Form.METHOD, getattr(torch.Tensor, name), **options)


def view(name: str, shape: Callable[..., Shape], whole: bool = False) -> Function:
    """A row for a method that shows a tensor in another way."""
    memory = Memory.WHOLE if whole else Memory.SEEN
    return method(name, linear=Linear.FIRST, memory=memory, shape=shape)


def helper(name: str, source: str, **options: Any) -> Function:
    """A row for a function whose source is written next to the program."""
    namespace: dict[str, Any] = {"torch": torch}
    exec(compile(source, f"<{name}>", "exec"), namespace)
    return Function(name, Form.FUNCTION, namespace[name], source=source, **options)


@lru_cache
def helper_of(called: Helper) -> Function:
    """The same of a function that a rule's code calls."""
    return helper(called.name, called.source)


def _permuted(shape: Shape, *order: int) -> Shape:
    return tuple(shape[k] for k in order)


def _swapped(shape: Shape, one: int, other: int) -> Shape:
    order = list(range(len(shape)))
    order[one], order[other] = order[other], order[one]
    return _permuted(shape, *order)


def _without(shape: Shape, axis: int, *_: Any) -> Shape:
    axis %= len(shape)
    return (*shape[:axis], *shape[axis + 1 :])


def _with_one(shape: Shape, axis: int) -> Shape:
    axis %= len(shape) + 1
    return (*shape[:axis], 1, *shape[axis:])


def _narrowed(shape: Shape, axis: int, first: int, length: Size) -> Shape:
    return (*shape[:axis], length, *shape[axis + 1 :])


def _given(shape: Shape, *sizes: Any) -> Shape:
    return sizes[0] if len(sizes) == 1 and isinstance(sizes[0], tuple) else sizes


RESHAPE = view("reshape", _given, whole=True)
VIEW = view("view", _given, whole=True)
EXPAND = view("expand", _given, whole=True)
UNSQUEEZE = view("unsqueeze", _with_one, whole=True)
SQUEEZE = view("squeeze", _without, whole=True)
CONTIGUOUS = view("contiguous", lambda shape: shape, whole=True)
PERMUTE = view("permute", _permuted)
TRANSPOSE = view("transpose", _swapped)
T = view("t", lambda shape: shape[::-1])
NARROW = view("narrow", _narrowed)
SELECT = view("select", _without)
DIAGONAL = method("diagonal", memory=Memory.SEEN)
UNFOLD = method("unfold", memory=Memory.SEEN)
FLIP = method("flip")
MT = Function("mT", Form.PROPERTY, lambda x: x.mT, Linear.FIRST, Memory.SEEN, lambda shape: _swapped(shape, -2, -1))
ITEM = Function("[]", Form.ITEM, operator.getitem, memory=Memory.SEEN)
DTYPE = Function("dtype", Form.PROPERTY, lambda x: x.dtype)
DEVICE = Function("device", Form.PROPERTY, lambda x: x.device)
SHAPE = Function("shape", Form.PROPERTY, lambda x: x.shape)

MUL = Function("*", Form.OPERATOR, operator.mul, Linear.EACH, Memory.OWN, over="mul_", into="torch.mul")
NEG = method("neg", linear=Linear.FIRST, memory=Memory.OWN, over="neg_", into="torch.neg")
ADD = Function("+", Form.OPERATOR, operator.add, memory=Memory.OWN, over="add_")
SUB = Function("-", Form.OPERATOR, operator.sub)
DIV = Function("/", Form.OPERATOR, operator.truediv)
FLOOR_DIV = Function("//", Form.OPERATOR, operator.floordiv)
LESS = Function("<", Form.OPERATOR, operator.lt)
AT_LEAST = Function(">=", Form.OPERATOR, operator.ge)
EQUAL = Function("==", Form.OPERATOR, operator.eq)
AND = Function("&", Form.OPERATOR, operator.and_)
OR = Function("|", Form.OPERATOR, operator.or_)

SUM = method("sum", linear=Linear.FIRST, memory=Memory.OWN)
SQUARE = method("square", memory=Memory.OWN, over="square_")
NORM = function("torch.linalg.vector_norm", memory=Memory.OWN)
MM = function("torch.mm", linear=Linear.EACH, memory=Memory.OWN, into="torch.mm", adding="addmm_")
BMM = function("torch.bmm", linear=Linear.EACH, memory=Memory.OWN, into="torch.bmm", adding="baddbmm_")
MV = function("torch.mv", linear=Linear.EACH, memory=Memory.OWN)
PAD = function("torch.nn.functional.pad")
CAT = function("torch.cat", memory=Memory.OWN)
CONV = {k: function(f"torch.nn.functional.conv{k}d", memory=Memory.OWN) for k in (1, 2, 3)}
CONV_BACKWARD = function("torch.ops.aten.convolution_backward")
CONV_OF = """\
def conv{dims}d_{by}({first}, g, stride, padding, dilation, groups):
    {unread} = g.new_empty(size)
    both = torch.ops.aten.convolution_backward(
        g, x, weight, None, stride, padding, dilation, False, {whole}, groups, {wanted}
    )
    return both[{place}]"""
"""As torch.nn.grad has them, without copying an input or a weight that is not read."""


def _of_dims(by: str, first: str, unread: str, place: int) -> dict[int, Function]:
    wanted = (place == 0, place == 1, False)
    options = {"by": by, "first": first, "unread": unread, "place": place, "wanted": wanted}
    each = {k: CONV_OF.format(dims=k, whole=[0] * k, **options) for k in (1, 2, 3)}
    return {k: helper(f"conv{k}d_{by}", text, memory=Memory.OWN) for k, text in each.items()}


CONV_INPUT = _of_dims("input", "size, weight", "x", 0)
CONV_WEIGHT = _of_dims("weight", "x, size", "weight", 1)

ARANGE = function("torch.arange")
EYE = function("torch.eye")
EMPTY = function("torch.empty")
WHERE = function("torch.where")
EIGH = function("torch.linalg.eigh")
VMAP = function("torch.func.vmap")
VJP = function("torch.func.vjp")
GRAD = function("torch.func.grad")
APPLY = Function("", Form.FUNCTION, lambda f, *args: f(*args))
"""The call of what the first operand is."""
NEW_FULL = method("new_full")
NEW_ZEROS = method("new_zeros")
NEW_ONES = method("new_ones")
INDEX_SELECT = method("index_select", memory=Memory.OWN)
INDEX_ADD = method("index_add_")
MASKED_FILL = method("masked_fill_", memory=Memory.OWN)
TO = method("to")
DOUBLE = method("double")
ABS = method("abs")
CLAMP = method("clamp")
SQRT = method("sqrt")
SIGN = method("sign")
AMAX = method("amax")
MIN = method("min")
CLONE = method("clone")

GATE = Code.parsed("torch.ops.aten.threshold_backward({value}, {gate}, 0)")
"""A value where a gate is above 0, and 0 elsewhere, also of an infinity."""

ONE_BY_ONE = """\
def one_by_one(vjp, axes, cotangents, *rows):
    # The VJP of each sample, for one cotangent [N, ...] with so many axes, or several on axes in front.
    columns = cotangents.reshape(-1, *cotangents.shape[-axes:])
    found = [vjp(*sample, g) for column in columns for *sample, g in zip(*rows, column, strict=True)]
    return torch.stack(found).unflatten(0, cotangents.shape[: cotangents.ndim - axes + 1])"""
LOOP = helper("one_by_one", ONE_BY_ONE)


@lru_cache(4096)
def aten(
    target: OpOverload, memory: Memory = Memory.UNKNOWN, over: str | OpOverload = ""
) -> Function:
    """The row of an operator's overload."""
    return Function(f"torch.ops.{target!s}", Form.FUNCTION, target, memory=memory, over=over)
