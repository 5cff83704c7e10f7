"""What a rule is tried with: modules of the class with every option changed once, and inputs of many shapes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.translate.opaque import signature_of
from ..compiler.translate.torch_internals import own_tables
from ..definitions.calls import BUILD_ERRORS
from ..definitions.report import LeftOut
from ..errors import InputError
from ..notation.parse import parse_access, parse_expression, parse_legs, parse_program
from ..notation.rule import Rule
from ..notation.syntax import Access, Factors, Node, Rest, Star, accesses, nearest, selects

NUMBERS = ((3, 4, 5, 3, 4, 5), (2, 4, 2, 4, 2, 4), (2,) * 6, (4,) * 6)
"""For the required arguments of a constructor, in turn: the first that it takes."""
NOT_OPTIONS = ("device", "dtype", "inplace")
NOISE = 0.3


@dataclass(frozen=True)
class Made:
    """A module with the call that made it; `changed` is the option that differs from the first ("stride=2")."""

    module: nn.Module
    text: str
    changed: str = ""


def modules(cls: type[nn.Module]) -> tuple[list[Made], list[LeftOut]]:
    """Modules of a class: numbers for what it requires, then every option changed once, then all sizes 1.

    Raises `InputError` where the class wants something else than numbers.
    """
    parameters = list(inspect.signature(cls).parameters.values())
    plain = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    required = [p.name for p in plain if p.default is p.empty]
    first, failed = None, ""
    for numbers in NUMBERS:
        arguments = dict(zip(required, numbers, strict=False))
        try:
            first = Made(cls(**arguments), _call(cls, arguments))
            break
        except BUILD_ERRORS as error:
            failed = f"{_call(cls, arguments)} raises {type(error).__name__}: {_line(error)}"
    if first is None:
        raise InputError(f"cannot make a {cls.__name__}: {failed}\n  Pass one: verify(rule, module={cls.__name__}(…))")
    found, left_out = [first], []
    options = {p.name: p.default for p in plain if p.default is not p.empty and p.name not in NOT_OPTIONS}
    changes = [(name, new) for name, value in options.items() if (new := _other(name, value)) is not None]
    changes += [("", 1)] if required else []
    for name, new in changes:
        arguments = dict(zip(required, numbers, strict=False)) | ({name: new} if name else dict.fromkeys(required, 1))
        if name == "groups":
            arguments |= dict.fromkeys(required, 4)
        try:
            found.append(Made(cls(**arguments), _call(cls, arguments), f"{name}={new!r}" if name else ""))
        except BUILD_ERRORS as error:
            left_out.append(LeftOut(_call(cls, arguments), f"it raises {type(error).__name__}: {_line(error)}"))
    return found, left_out


def _other(name: str, value: Any) -> Any:
    """Another value of an option; None where only its author knows one."""
    match value:
        case bool():
            return not value
        case int():
            return 2 if name == "groups" else value + 1
        case float():
            return 1.5 * value + 0.25
        case _:
            return None


def _call(cls: type, arguments: Mapping[str, Any]) -> str:
    return f"{cls.__name__}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def unsettled(module: nn.Module) -> nn.Module:
    """A copy in float64 on the CPU, with noise on the parameters: zeros and ones would hide what is forgotten."""
    copied = copy.deepcopy(module).double().cpu()
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.is_floating_point():
                parameter.add_(NOISE * torch.randn_like(parameter))
    return copied


# -- inputs


@dataclass(frozen=True)
class Sizes:
    """What shapes are made of: the batch, the axes of `*s`, legs that no parameter has, axes with an affine index."""

    batch: int
    star: tuple[int, ...] = (3,)
    free: tuple[int, ...] = (4, 3, 5)
    image: tuple[int, ...] = (6, 5, 4)

    def __str__(self) -> str:
        return f"N = {self.batch}"


class Inputs:
    """The inputs of a module, by what its rule's text says of their legs."""

    def __init__(self, module: nn.Module, rule: Rule) -> None:
        self.module, self.rule = module, rule
        nodes = _nodes(rule)
        self.read = [access for node in nodes for access in accesses(node)]
        self.read += [parse_legs(name, text) for name, text in rule.legs.items()]
        self.read += [parse_access(key) for key in rule.saved if "[" in key]
        self.selects = [select for node in nodes for select in selects(node)]
        read = {access.tensor for access in self.read}
        self.names = [name for name in _arguments(module) if name in read] or _arguments(module)[:1]
        self.known = {name.lower(): int(size) for name, size in rule.constants.items() if name.isupper()}
        own = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        tensors = {name.replace(".", "_"): tensor for name, tensor in own}
        self._check_names({*tensors, *(name for m in module.modules() for name in own_tables(m)[0])})
        for _ in range(2):  # a grouped axis may need what a later one says
            for access in self.read:
                if access.tensor in tensors:
                    self._learn(access, tuple(tensors[access.tensor].shape))

    def _check_names(self, own: set[str]) -> None:
        """A tensor that nobody has is told here: there are no inputs to bind the rule with yet."""
        lines = parse_program(self.rule.formula) if self.rule.formula.strip() else ()
        known = {*own, *_arguments(self.module), *(line.left.tensor for line in lines), "output", "delta"}
        known |= {parse_access(key).tensor for key in self.rule.saved if "[" in key}
        for access in self.read:
            if access.tensor not in known:
                raise access.place.error(f"unknown tensor '{access.tensor}'", nearest(access.tensor, known - {"delta"}))

    @property
    def has_star(self) -> bool:
        return any(isinstance(item, Star) for name in self.names for item in self._access(name).items)

    def draw(self, sizes: Sizes) -> dict[str, Tensor]:
        """An input for every argument of forward that the rule reads. Raises `InputError` where the legs do not say."""
        free, legs = iter(sizes.free * 4), dict(self.known)
        found = {}
        for name in self.names:
            shape = self._shape(self._access(name), sizes, free, legs)
            found[name] = torch.randn(shape, dtype=torch.float64)
            for select in self.selects:
                if select.index.tensor == name:
                    most = prod(
                        legs.get(n, 2) for item in select.choice if isinstance(item, Factors) for n in item.names
                    )
                    found[name] = torch.randint(most, shape)
        return found

    def _access(self, name: str) -> Access:
        """The one that says most: with as few indices as there are. What only code reads is taken like the output."""
        own = [access for access in self.read if access.tensor in (name, "output")]
        own = [access for access in own if access.tensor == name] or own or [parse_program(self.rule.formula)[-1].left]
        return min(own, key=lambda access: sum(not isinstance(item, Factors | Star) for item in access.items))

    def _learn(self, access: Access, shape: tuple[int, ...]) -> None:
        stars = [k for k, item in enumerate(access.items) if isinstance(item, Star | Rest)]
        if len(stars) > 1 or (not stars and len(access.items) != len(shape)):
            return
        middle = stars[0] if stars else len(access.items)
        pairs = list(zip(access.items[:middle], shape, strict=False))
        after = access.items[middle + 1 :]
        pairs += list(zip(after, shape[len(shape) - len(after) :], strict=True)) if after else []
        for item, size in pairs:
            unknown = [name for name in item.names if name not in self.known] if isinstance(item, Factors) else []
            if isinstance(item, Factors) and len(unknown) == 1:
                self.known[unknown[0]] = size // prod(self.known[n] for n in item.names if n in self.known)

    def _shape(self, access: Access, sizes: Sizes, free: Iterator[int], legs: dict[str, int]) -> list[int]:
        shape: list[int] = []
        images = iter(sizes.image * 2)
        for k, item in enumerate(access.items):
            match item:
                case Star():
                    shape += [sizes.batch, *sizes.star] if k == 0 else sizes.star
                case Factors() if k == 0 and len(item.names) == 1:
                    shape.append(legs.setdefault(item.names[0], sizes.batch))
                case Factors():
                    shape.append(prod(legs.setdefault(name, 0) or self._new(name, legs, free) for name in item.names))
                case Rest():
                    raise InputError(f"'{access}' does not say how many axes there are: pass x, a batch or its shape")
                case _:
                    shape.append(next(images))
        return shape

    @staticmethod
    def _new(name: str, legs: dict[str, int], free: Iterator[int]) -> int:
        legs[name] = next(free)
        return legs[name]


def _nodes(rule: Rule) -> list[Node]:
    lines = parse_program(rule.formula) if rule.formula.strip() else ()
    return [line.right for line in lines] + [parse_expression(text) for text in rule.jacobian.values()]


def _arguments(module: nn.Module) -> list[str]:
    return list(signature_of(module).parameters)
