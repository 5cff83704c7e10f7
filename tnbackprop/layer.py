"""A module from a formula."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from math import sqrt
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .compiler.formula import formula_function
from .compiler.translate.opaque import named_tensors
from .diagram.core import N
from .errors import InputError, RuleError
from .notation.bind import Axes
from .notation.parse import parse_program
from .notation.rule import Constant, Rule
from .notation.solve import compare
from .notation.syntax import Access, Apply, Factors, Line, Node, Star, accesses, nearest
from .rules.declared import Declared

Initialiser = Callable[[Tensor], object]
BATCH = "n"


def einsum_layer(formula: str, /, **tensors: Any) -> EinsumLayer:
    """A module whose forward is the formula, with parameters of the given shapes.

        tn.einsum_layer("output[n, *s, o] = weight[o, i] * input[n, *s, i] + bias[o]", weight=(8, 5), bias=(8,))

    Each name that the formula reads is given as a shape, for a parameter; as a pair ``(shape, initialiser)``, where
    ``initialiser(tensor)`` fills it in place (`torch.nn.init`); as an `nn.Parameter`; as a tensor, for a buffer; or as
    a number, for a constant (``eps=1e-5``; a capital letter says the size of its leg). The others are forward's
    arguments, in the order in which the formula reads them, and have the batch: leg n, or where the formula has no
    leg n the first one of the output. A parameter without an initialiser is drawn as `nn.Linear` draws its weight,
    uniform with Kaiming's bound and a = √5. One with at most one axis is one where it is a factor (a gain), zero where
    it is added or the argument of a function (a bias), and uniform in ±1/√I where its leg i is summed.

    Raises `RuleError` where the formula is none, a shape does not fit it, or a name is missing or not read.
    """
    return EinsumLayer(formula, tensors)


class EinsumLayer(Declared):
    """What `einsum_layer` makes. It brings its rule along: nothing is registered."""

    planned: ClassVar[Callable[..., Callable[[Mapping[str, Tensor]], Tensor]]]

    def __init__(self, formula: str, tensors: Mapping[str, Any]) -> None:
        super().__init__()
        self._prepare()
        lines = parse_program(Rule(formula).formula)
        read = _read(lines)
        _check_names(formula, tensors, read)
        self.constants: dict[str, Constant] = {}
        self.initialisers: dict[str, Initialiser] = {}
        for name, given in tensors.items():
            self._enter(name, given, lines)
        self.batch = _batch_item(lines)
        self.inputs = {name: first for name, first in read.items() if name not in tensors}
        _check_inputs(self.inputs, self.batch)
        self.rule: Rule = Rule(formula, constants=self.constants)
        uses = [*(line.left for line in lines), *(a for line in lines for a in accesses(line.right))]
        own = {name: _axes(tensor) for name, tensor in named_tensors(self).items()}
        compare(uses, own, self.constants, "einsum_layer")
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        self.signature = inspect.Signature([inspect.Parameter(name, kind) for name in self.inputs])
        self.reset_parameters()

    def _enter(self, name: str, given: Any, lines: tuple[Line, ...]) -> None:
        """One keyword: a constant, a buffer or a parameter."""
        if _is_number(given):
            self.constants[name] = given
            return
        if hasattr(self, name) or name in ("rule", "signature", "inputs", "batch"):
            raise RuleError(f"'{name}' is an attribute of every module: choose another name in the formula")
        if isinstance(given, nn.Parameter):
            self.register_parameter(name, given)
            return
        if isinstance(given, Tensor):
            self.register_buffer(name, given)
            return
        shape, initialiser = given if _is_pair(given) else (given, None)
        if not isinstance(shape, tuple | list) or not all(type(size) is int and size > 0 for size in shape):
            raise RuleError(
                f"{name}={given!r} is none of what a name can be",
                hint="give a shape (8, 5), a pair (shape, initialiser), a tensor or a number",
            )
        self.register_parameter(name, nn.Parameter(torch.empty(tuple(shape))))
        self.initialisers[name] = initialiser or (_kaiming if len(shape) > 1 else _of_one_leg(name, lines))

    def reset_parameters(self) -> None:
        """Draw the parameters that were given as shapes again."""
        with torch.no_grad():
            for name, initialise in self.initialisers.items():
                parameter = self.get_parameter(name).fill_(torch.nan)
                try:
                    initialise(parameter)
                except (ValueError, TypeError, RuntimeError) as error:
                    what = f"the initialiser of '{name}' fails on shape {list(parameter.shape)}: {error}"
                    raise RuleError(what) from error
                if parameter.isnan().any():
                    hint = "use one of torch.nn.init, or lambda tensor: tensor.fill_(…)"
                    raise RuleError(f"the initialiser of '{name}' does not fill it in place", hint=hint)

    def _prepare(self) -> None:
        """Planning is no part of a graph; saying so imports torch's compiler, paid for by users of this class."""
        if not hasattr(EinsumLayer, "planned"):
            EinsumLayer.planned = staticmethod(torch.compiler.disable(_function))  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The formula's output. Raises `RuleError` where a shape does not fit."""
        given = self.signature.bind(*args, **kwargs).arguments
        for name, value in given.items():
            if not isinstance(value, Tensor):
                raise InputError(f"einsum_layer: '{name}' is {type(value).__name__}, not a tensor")
        tensors = {**named_tensors(self), **given}
        shapes = tuple((name, self._axes_of(name, t), t.dtype) for name, t in tensors.items())
        constants = tuple(self.constants.items())
        device = next(iter(tensors.values())).device.type
        output: Tensor = self.planned(self.rule.formula, constants, shapes, tuple(self.inputs), device)(tensors)
        return output

    def _axes_of(self, name: str, tensor: Tensor) -> Axes:
        """The sizes of a tensor; of an input N on the batch axis, so that the plan holds for every batch."""
        if name not in self.inputs:
            return _axes(tensor)
        items = self.inputs[name].items
        place = next(k for k, item in enumerate(items) if str(item) == self.batch)
        if any(isinstance(item, Star) for item in items[:place]):
            place -= len(items)
        if not -tensor.ndim <= place < tensor.ndim:
            raise InputError(f"einsum_layer: '{name}' has {tensor.ndim} axes, but the formula says {self.inputs[name]}")
        return tuple((N,) if k == place % tensor.ndim else (int(size),) for k, size in enumerate(tensor.shape))

    def extra_repr(self) -> str:
        own = [f"{name} {list(tensor.shape)}" for name, tensor in named_tensors(self).items()]
        own += [f"{name} = {value}" for name, value in self.constants.items()]
        return "\n".join([*(line.strip() for line in self.rule.formula.strip().split("\n")), ", ".join(own)])


@lru_cache(maxsize=512)
def _function(
    formula: str,
    constants: tuple[tuple[str, Constant], ...],
    shapes: tuple[tuple[str, Axes, torch.dtype], ...],
    inputs: tuple[str, ...],
    device: str,
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The forward at these shapes, planned once."""
    operands = {name: (axes, dtype) for name, axes, dtype in shapes}
    return formula_function(Rule(formula, constants=dict(constants)), operands, inputs, device, "einsum_layer")


def _read(lines: tuple[Line, ...]) -> dict[str, Access]:
    """Every tensor that the formula reads and does not define, with its first access."""
    made = {line.left.tensor for line in lines} | {"delta"}
    found: dict[str, Access] = {}
    for line in lines:
        for access in accesses(line.right):
            if access.tensor not in made:
                found.setdefault(access.tensor, access)
    return found


def _check_names(formula: str, tensors: Mapping[str, Any], read: Mapping[str, Access]) -> None:
    """What is given is read: a tensor by its legs, a number by its name or as the size of a leg."""
    words = {word for leg in re.findall(r"\w+", formula) for word in (leg, leg.upper())}
    for name, given in tensors.items():
        if name not in (words if _is_number(given) else read):
            hint = f"a tensor without axes is read as {name}[]" if name in words else nearest(name, read)
            raise RuleError(f"'{name}' is given, but the formula does not read it", hint=hint)
        if _is_number(given) and name in read:
            raise read[name].place.error(f"'{name}' is a number, but the formula reads {read[name]}", "give its shape")


def _check_inputs(inputs: Mapping[str, Access], batch: str) -> None:
    """What is not given is an argument of forward, and those have the batch."""
    without = {name: first for name, first in inputs.items() if not any(str(item) == batch for item in first.items)}
    for name, first in without.items():
        hint = f"pass its shape, {name}=(…), or a tensor; only arguments of forward are left out"
        if len(without) == len(inputs):
            legs = ", ".join([BATCH, *map(str, first.items)])
            hint = f"the formula has no batch leg: write {name}[{legs}] and output[{BATCH}, …]\nor {hint}"
        raise first.place.error(f"'{name}' is not given and has no batch leg '{batch}'", hint)
    if not inputs:
        raise RuleError("the formula reads no input: every name is given", hint="leave out what forward receives")


def _batch_item(lines: tuple[Line, ...]) -> str:
    """The leg n; where there is none, the first one of the output."""
    every = [item for line in lines for access in (line.left, *accesses(line.right)) for item in access.items]
    if any(isinstance(item, Factors) and item.names == (BATCH,) for item in every):
        return BATCH
    return next((str(item) for item in lines[-1].left.items), BATCH)


def _is_number(given: Any) -> bool:
    return isinstance(given, Real) and not isinstance(given, bool)


def _is_pair(given: Any) -> bool:
    return isinstance(given, tuple) and len(given) == 2 and callable(given[1])


def _axes(tensor: Tensor) -> Axes:
    return tuple((int(size),) for size in tensor.shape)


def _kaiming(tensor: Tensor) -> None:
    nn.init.kaiming_uniform_(tensor, a=sqrt(5))


def _of_one_leg(name: str, lines: tuple[Line, ...]) -> Initialiser:
    """That of a parameter with at most one axis: a gain is one, a bias zero, what is summed over uniform."""
    for line in lines:
        kept = {str(item) for item in line.left.items}
        for read, factor in _roles(line.right, False):
            if factor and read.tensor == name:
                return nn.init.ones_ if all(str(item) in kept for item in read.items) else _fan_in
    return nn.init.zeros_


def _roles(node: Node, factor: bool) -> Iterator[tuple[Access, bool]]:
    """Every read of an expression, and whether it is a factor of another read."""
    match node:
        case Access():
            yield node, factor
        case Apply(op="*" | "/" as op, args=(left, right)):
            for arg, other in ((left, right), (right, left)):
                yield from _roles(
                    arg, factor or (op == "/" and arg is right) or next(accesses(other), None) is not None
                )
        case Apply(op="neg" | "**" | "if", args=args):
            for arg in args:
                yield from _roles(arg, factor)
        case Apply(args=args):
            for arg in args:
                yield from _roles(arg, False)


def _fan_in(tensor: Tensor) -> None:
    bound = 1 / sqrt(max(tensor.numel(), 1))
    nn.init.uniform_(tensor, -bound, bound)
