"""Fingerprints: what a compilation can depend on, written down, so that two of them are equal where nothing changed.

An object is written as its class and what it holds, each once (what is met again is a number: so ties are seen), a
function as its code, defaults, closure and the globals that it reads. Of the model's own tensors the values do not
count, for a program reads them when it is called; what is known only by its identity is followed weakly, and a
fingerprint of something that is gone is equal to none. Where an object hides what it holds, there is no fingerprint.
"""

from __future__ import annotations

import dis
import functools
import io
import logging
import os
import pickle
import sys
import sysconfig
import threading
import types
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from ..compiler.translate.torch_internals import OpOverload, OpOverloadPacket, global_hooks, hooks_of, version

Alive = Callable[[], object]

PLAIN = (int, str, bool, types.NoneType, bytes, range, torch.dtype, torch.device, torch.layout, torch.Size)
"""Types whose values say all when they are compared."""
EMPTY = (OrderedDict, dict, set, types.NoneType)
REPRESENTED = (float, complex)
"""Types that say all where nothing is in them, and types whose values do not: nan is not nan, and 0.0 is -0.0."""
CONTAINERS = (OrderedDict, defaultdict, dict, list, tuple, set, frozenset, deque, types.MappingProxyType)
PARTS: Mapping[type, tuple[str, ...]] = {
    types.MethodType: ("__func__", "__self__"),
    functools.partial: ("func", "args", "keywords", "__dict__"),
    functools.partialmethod: ("func", "args", "keywords"),
    functools.cached_property: ("func",),
    property: ("fget", "fset"),
    staticmethod: ("__func__",),
    classmethod: ("__func__",),
    slice: ("start", "stop", "step"),
    types.CellType: ("cell_contents",),
}
"""What is read of objects that are made of others."""
IDENTITY = (
    types.ModuleType, types.CodeType, types.BuiltinFunctionType, types.WrapperDescriptorType, types.MethodWrapperType,
    types.MethodDescriptorType, types.ClassMethodDescriptorType, types.GetSetDescriptorType,
    types.MemberDescriptorType, OpOverload, OpOverloadPacket, torch.Generator,
    type(threading.Lock()), type(threading.RLock()), threading.local, io.IOBase, logging.Filterer, logging.Manager,
    Enum,
)  # fmt: skip
"""Types on whose inside no number of a model depends, or that never change."""
LEFT = (nn.Module, Tensor, nn.Parameter)
"""Classes that nobody changes."""
BOOKKEEPING = frozenset({
    "__doc__", "__module__", "__qualname__", "__dict__", "__weakref__", "__annotations__", "__abstractmethods__",
    "_abc_impl", "__parameters__", "__orig_bases__", "__slots__", "__match_args__", "__dataclass_fields__",
    "__dataclass_params__", "__firstlineno__", "__static_attributes__", "__annotate_func__", "__annotations_cache__",
})  # fmt: skip
"""Entries of a class that change nothing that runs."""
ROOTS = tuple(
    str(folder) + os.sep
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), PurePath(__file__).parents[1])
)
INSTALLED = frozenset({"site-packages", "dist-packages"})
GENERATED = "<string>"
"""Where the methods of a dataclass are."""
IMMUTABLE, HEAP = 1 << 8, 1 << 9  # type flags: of a class that is written in C, and of one that is written in Python


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """What was written, and what of it is known by its identity."""

    written: list[object]
    alive: tuple[Alive, ...]

    def matches(self, other: Fingerprint) -> bool:
        """Whether nothing changed; `other` is the one that was taken just now."""
        return self.written == other.written and all(member() is not None for member in self.alive)


def fingerprint(model: nn.Module, *others: object, built_in: tuple[object, ...] = ()) -> Fingerprint | None:
    """Of a model and of what is compiled with it; None where that cannot be told.

    built_in   what is compared as it is, and not looked into
    """
    walk = _Walk()
    walk.written.append(built_in)
    walk.add(torch.get_default_dtype())
    walk.add(torch.get_default_device())
    for each in global_hooks():
        walk.add(tuple(each.values()))
    walk.visit(model, own=True)
    for other in others:
        walk.visit(other)
    return None if walk.hidden else Fingerprint(walk.written, tuple(walk.alive))


class _Walk:
    """One pass over everything that can be reached."""

    def __init__(self) -> None:
        self.written: list[object] = []
        self.alive: list[Alive] = []
        self.hidden = False
        self._seen: dict[int, int] = {}
        self._kept: list[object] = []  # an id stays that of its object
        self._next: deque[tuple[Any, bool]] = deque()
        self._names: set[str] = set()  # attributes that the code that was followed reads
        self._waiting: dict[str, list[types.FunctionType]] = {}  # methods whose names nothing has read so far

    def visit(self, value: object, own: bool = False) -> None:
        """Write an object, and all that it leads to. `own`: a module whose tensors a program reads by name."""
        self.add(value, own)
        while self._next:
            found, of_model = self._next.popleft()
            self._open(found, of_model)

    def add(self, value: Any, own: bool = False) -> None:
        """Write a value, or the number of an object that is opened later."""
        kind = type(value)
        if kind in PLAIN:
            self.written += (kind, value)
            return
        if kind in REPRESENTED:
            self.written += (kind, repr(value))
            return
        number = self._seen.setdefault(id(value), len(self._seen))
        self.written.append(number)
        if number == len(self._kept):
            self._kept.append(value)
            self._next.append((value, own))

    def _open(self, value: Any, own: bool) -> None:
        kind = type(value)
        if kind is types.FunctionType:
            self._function(value)
        elif issubclass(kind, nn.Module):
            self._module(value, own)
        elif issubclass(kind, Tensor):
            self._tensor(value)
        elif issubclass(kind, type):
            self._class(value)
        elif issubclass(kind, IDENTITY):
            self._identity(value)
        elif issubclass(kind, weakref.ref):
            self.add(value())
        elif kind in PARTS:
            self.add(kind)
            for part in PARTS[kind]:
                self.add(_contents(value) if kind is types.CellType else getattr(value, part))
        else:
            self._object(value, kind)

    def _object(self, value: Any, kind: type) -> None:
        """What an object holds: its elements, its attributes, or what it is pickled by."""
        self.add(kind)
        container = next((each for each in CONTAINERS if issubclass(kind, each)), None)
        if container is not None:
            self._elements(value)
        state = list(_attributes(value, kind))
        for name, member in state:
            self.written.append(name)
            self.add(member)
        if kind is object:
            self._identity(value)
        elif {*filter(_is_of_c, kind.__mro__)} - {object, *CONTAINERS} or (container is None and not state):
            self._pickled(value)

    def _elements(self, values: Any) -> None:
        self.written.append(len(values))
        self.add(getattr(values, "default_factory", None))
        for each in list(values.items()) if isinstance(values, Mapping) else list(values):
            if isinstance(values, Mapping):
                self.add(each[0])
                self.add(each[1])
            else:
                self.add(each)

    def _pickled(self, value: Any) -> None:
        """What pickle would store of an object that is not written in Python; some say nothing."""
        try:
            self.add(value.__reduce_ex__(4))
        except (TypeError, AttributeError, RuntimeError, NotImplementedError, ValueError, pickle.PicklingError):
            self.hidden = True

    def _module(self, module: nn.Module, own: bool) -> None:
        """A module: its tensors by what they are, everything else by what it holds."""
        self.hidden = self.hidden or isinstance(module, torch.jit.ScriptModule)
        self.add(type(module))
        for name, member in module.__dict__.items():
            self.written.append(name)
            if name in ("_parameters", "_buffers"):
                for key, tensor in member.items():
                    self.written.append(key)
                    self._registered(tensor, own)
            elif name == "_modules":
                for key, child in member.items():
                    self.written.append(key)
                    self.add(child, own)
            elif type(member) in EMPTY and not member:
                self.written.append(type(member))
            else:
                self.add(member)

    def _registered(self, tensor: Tensor | None, own: bool) -> None:
        """A parameter or buffer. The program of a model reads its values by name; others are known by identity."""
        if tensor is None or id(tensor) in self._seen:
            self.add(tensor)
            return
        self._seen[id(tensor)] = len(self._kept)
        self._kept.append(tensor)
        self._kind_of(tensor)
        if not own:
            self._identity(tensor)

    def _tensor(self, tensor: Tensor) -> None:
        """A tensor that is a constant of the graph. Its values may have been read as numbers: so a version counts.

        So does the memory that it is in, which `.data =` changes and no version tells.
        """
        self._kind_of(tensor)
        self._identity(tensor)
        self.written.append(None if tensor.is_inference() else version(tensor))
        try:
            self.written.append(tensor.data_ptr() if tensor.layout == torch.strided else None)
        except RuntimeError:  # one that torch.func wraps shows no memory
            self.hidden = True

    def _kind_of(self, tensor: Tensor) -> None:
        self.add(type(tensor))
        self.written += (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad)
        for more in (*hooks_of(tensor), vars(tensor)):
            if more:
                self.add(more)

    def _identity(self, value: Any) -> None:
        """An object by what it is: weakly, or for good where that is not possible, as for what C defines."""
        try:
            self.alive.append(weakref.ref(value))
        except TypeError:
            self.alive.append(lambda: value)
        self.written.append(id(value))

    def _class(self, kind: type) -> None:
        """A class: all that it and its bases define; the methods of a class of the user's by their code at least."""
        self._identity(kind)
        for base in kind.__mro__:
            if base in LEFT or _is_of_c(base):
                continue
            library = _is_library(base.__module__)
            if library and not any(map(_is_foreign, vars(base).values())):
                self.written.append(tuple(vars(base).values()))
                continue
            for name, member in list(vars(base).items()):
                if name in BOOKKEEPING:
                    continue
                self.written.append(name)
                if type(member) is not types.FunctionType:
                    self._attribute(member, library)
                elif name == "forward" or name.startswith("__") or name in self._names or _overrides(kind, base, name):
                    self.add(member)
                else:
                    self.written.append(member.__code__)
                    self._waiting.setdefault(name, []).append(member)

    def _attribute(self, member: Any, library: bool) -> None:
        """What a class holds, if it is no function: all of it; of a library's classes what is not its own."""
        if not library or type(member) in PLAIN or type(member) in PARTS:
            self.add(member)
        else:
            self._identity(member)

    def _function(self, function: types.FunctionType) -> None:
        """A function: its code, and what its code can read. What a library's reads stays as it is."""
        self.written.append(function.__code__)
        for member in (function.__defaults__, function.__kwdefaults__, function.__closure__, function.__dict__):
            if member:
                self.add(member)
        if _is_installed(function.__code__.co_filename):
            return
        read, attributes = _names_of(function.__code__)
        for name in attributes - self._names:
            for method in self._waiting.pop(name, ()):
                self.add(method)
        self._names |= attributes
        for name in sorted(read):
            if name in function.__globals__:
                self.written.append(name)
                self._global(function.__globals__[name], attributes, set())

    def _global(self, value: Any, attributes: frozenset[str], above: set[int]) -> None:
        """A global that code reads; of a module, the attributes that the code reads."""
        if not isinstance(value, types.ModuleType):
            self.add(value)
            return
        if id(value) in above:
            return
        above.add(id(value))
        for name in sorted(attributes & vars(value).keys()):
            member = vars(value)[name]
            self.written.append(name)
            if isinstance(member, types.ModuleType):
                self._global(member, attributes, above)
            elif _is_library(value.__name__) and type(member) not in PLAIN and type(member) is not types.FunctionType:
                self._identity(member)
            else:
                self.add(member)


def _attributes(value: Any, kind: type) -> Iterator[tuple[str, Any]]:
    """What an object has in its `__dict__` and its slots."""
    yield from list(getattr(value, "__dict__", {}).items())
    for base in kind.__mro__:
        slots = vars(base).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else tuple(slots):
            mangled = f"_{base.__name__.lstrip('_')}{name}" if name.startswith("__") and name[-2:] != "__" else name
            if name not in ("__dict__", "__weakref__") and hasattr(value, mangled):
                yield name, getattr(value, mangled)


def _is_of_c(kind: type) -> bool:
    return not kind.__flags__ & HEAP or bool(kind.__flags__ & IMMUTABLE)


def _contents(cell: types.CellType) -> Any:
    """What a variable of a closure holds; nothing where it is still empty."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _is_foreign(member: Any) -> bool:
    """Whether what a library's class holds is somebody else's function."""
    function = getattr(member, "fget", getattr(member, "__func__", member)) if type(member) in PARTS else member
    file = function.__code__.co_filename if type(function) is types.FunctionType else GENERATED
    return file != GENERATED and not _is_installed(file)


def _overrides(kind: type, base: type, name: str) -> bool:
    """Whether a library's class calls a method of this name, and so perhaps this one."""
    above = kind.__mro__[kind.__mro__.index(base) + 1 :]
    callers = (other for other in above if other not in (*LEFT, object) and _is_library(other.__module__))
    return any(name in vars(other) for other in callers)


@functools.lru_cache(maxsize=1024)
def _is_library(module: str) -> bool:
    """Whether a module's name is that of an installed package, or of Python itself."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return module.split(".")[0] in sys.builtin_module_names if file is None else _is_installed(file)


@functools.lru_cache(maxsize=4096)
def _is_installed(file: str) -> bool:
    """Whether code is that of an installed package: it reads what it always read."""
    return file.startswith(ROOTS) or file.startswith("<frozen") or not INSTALLED.isdisjoint(PurePath(file).parts)


@functools.lru_cache(maxsize=4096)
def _names_of(code: types.CodeType) -> tuple[frozenset[str], frozenset[str]]:
    """The globals and the attributes that code reads, that of functions inside it included."""
    found: tuple[set[str], set[str]] = set(), set()
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found[0].add(step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            found[1].add(step.argval)
    for inside in code.co_consts:
        if isinstance(inside, types.CodeType):
            for mine, its in zip(found, _names_of(inside), strict=True):
                mine |= its
    return frozenset(found[0]), frozenset(found[1])
