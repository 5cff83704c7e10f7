"""What the command line takes from a user's file: `path.py:Name`, its example batch, loss and rules."""

from __future__ import annotations

import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compiler.capture.export import model_arguments
from ..errors import InputError, TnError
from ..generation.quantities import TOTAL
from ..notation.syntax import nearest
from ..quantities import Quantity, Total
from ..runtime import Program

PREFIX = "tnbackprop_"
"""Of the names under which users' files are imported."""
LOSSES: Mapping[str, Callable[..., Tensor] | None] = {
    "cross_entropy": F.cross_entropy,
    "mse": F.mse_loss,
    "none": None,
}


@dataclass(frozen=True)
class Loaded:
    """An object of a user's file, and the file as a module."""

    place: str
    value: Any
    file: ModuleType

    def named(self, name: str) -> Any:
        """Another object of the file. Raises `InputError` where it has none of that name."""
        if not hasattr(self.file, name):
            own = [key for key, value in vars(self.file).items() if not key.startswith("_") and not _imported(value)]
            raise InputError(f"{self.file.__file__} has no {name!r}\n  {nearest(name, own) or 'it defines nothing'}")
        return getattr(self.file, name)

    def running(self) -> Boundary:
        """While the user's own code runs: what it raises is told with the line of their file."""
        return Boundary(self.place, str(self.file.__file__))


class Boundary:
    """Tells an error of the user's code as an `InputError`: what was raised, and in which line of their file."""

    def __init__(self, place: str, path: str) -> None:
        self.place, self.path = place, path

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or isinstance(error, TnError) or not isinstance(error, Exception | SystemExit):
            return
        lines = [frame.lineno for frame in traceback.extract_tb(trace) if frame.filename == self.path]
        line = f", line {lines[-1]}" if lines else ""
        what = "exits" if isinstance(error, SystemExit) else f"raises {type(error).__name__}: {error}"
        remedy = (
            "put what runs behind `if __name__ == '__main__':`" if isinstance(error, SystemExit) else "run it alone"
        )
        raise InputError(f"{self.place}{line} {what}\n  To see more, {remedy}.") from error


def load(spec: str) -> Loaded:
    """The object that ``path.py:Name`` names; the file's folder is on the path while it is imported.

    Raises `InputError`: no such file or name, a file that is not Python or raises on import.
    """
    text, colon, name = spec.rpartition(":")
    if not colon or not name.isidentifier():
        raise InputError(f"{spec!r} is not of the form path.py:Name\n  Name a class, function or object of the file.")
    path = Path(text)
    if not path.is_file():
        raise InputError(f"no file {text!r}\n  The folder is {Path.cwd()}.")
    full = str(path.resolve())
    _check_python(full, text)
    found = importlib.util.spec_from_file_location(f"{PREFIX}{path.stem}", full)
    if found is None or found.loader is None:
        raise InputError(f"{text} is not Python: its name must end in .py")
    module = importlib.util.module_from_spec(found)
    sys.modules[module.__name__] = module  # dataclasses look their module up
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with Boundary(text, full):
            found.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.resolve().parent))
    loaded = Loaded(spec, None, module)
    return Loaded(spec, loaded.named(name), module)


def _check_python(path: str, shown: str) -> None:
    try:
        compile(Path(path).read_bytes(), path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) and error.lineno else ""
        what = error.msg if isinstance(error, SyntaxError) else str(error)
        raise InputError(f"{shown}{line} is not Python: {what}") from error
    except OSError as error:
        raise InputError(f"{shown} cannot be read: {error.strerror}") from error


def _imported(value: Any) -> bool:
    return isinstance(value, ModuleType) or not str(getattr(value, "__module__", PREFIX)).startswith(PREFIX)


# -- models and batches


def model_of(loaded: Loaded) -> nn.Module:
    """A module, or what a class or a function without arguments makes. Raises `InputError` for anything else."""
    value = loaded.value
    if callable(value) and not isinstance(value, nn.Module):
        missing = required(value)
        if missing:
            raise InputError(
                f"{loaded.place} needs {', '.join(missing)}\n"
                "  Name an instance, or a function without arguments that returns one."
            )
        with loaded.running():
            value = value()
    if isinstance(value, Program):
        return value.model
    if not isinstance(value, nn.Module):
        _refuse(loaded.place, value)
    return value


def required(value: Callable[..., Any]) -> list[str]:
    """The arguments that a call cannot do without."""
    parameters = inspect.signature(value).parameters.values()
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in starred]


def _refuse(place: str, value: Any) -> NoReturn:
    raise InputError(
        f"{place} is {type(value).__name__}, not a torch.nn.Module, its class, or a function that makes it"
    )


def batch_of(loaded: Loaded, model: nn.Module, shape: str | None) -> tuple[Any, Any]:
    """The batch (x, y): `shape` ("8,3,32,32"), the file's ``example()``, or its ``example_input``, ``example_target``.

    A shape stands for normal numbers. y is None where nothing says it.
    """
    file = loaded.file
    if shape is not None:
        return torch.randn(_shape(shape), dtype=_dtype(model)), None
    if hasattr(file, "example"):
        if not callable(file.example):
            what = type(file.example).__name__
            raise InputError(f"`example` of {file.__file__} is {what}: make it a function, def example(), of (x, y)")
        with loaded.running():
            batch = file.example()
        if not isinstance(batch, tuple) or len(batch) != 2:
            raise InputError(f"example() of {file.__file__} must return the pair (x, y), not {type(batch).__name__}")
        return batch
    if hasattr(file, "example_input"):
        x = file.example_input
        if isinstance(x, tuple | list) and x and all(isinstance(size, int) for size in x):
            x = torch.randn(tuple(x), dtype=_dtype(model))
        return x, getattr(file, "example_target", None)
    raise InputError(
        f"no example batch for {loaded.place}\n  Give the shape of x, --input 8,3,32,32, or define in the file "
        "`example_input` (a tensor or a shape) or `example()`, which returns (x, y)."
    )


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.replace("x", ",").split(",")
    if not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
        raise InputError(f"--input {text!r} is no shape: write positive sizes with commas, the batch first: 8,3,32,32")
    return tuple(int(size) for size in sizes)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def loss_of(loaded: Loaded, name: str | None, y: Any) -> Callable[..., Tensor] | None:
    """The loss by name, or the file's `loss`; else cross entropy for integer targets and squared error for others."""
    if name is not None:
        return LOSSES[name]
    if hasattr(loaded.file, "loss"):
        own = loaded.file.loss
        if own is not None and not callable(own):
            raise InputError(f"`loss` of {loaded.file.__file__} is {type(own).__name__}, not a function (output, y)")
        return own if own is None or isinstance(own, nn.Module) or not isinstance(own, type) else _made(loaded, own)
    return F.cross_entropy if isinstance(y, Tensor) and not y.is_floating_point() else F.mse_loss


def _made(loaded: Loaded, cls: Any) -> Callable[..., Tensor]:
    with loaded.running():
        loss: Callable[..., Tensor] = cls()
    return loss


def target_for(loaded: Loaded, model: nn.Module, loss: Callable[..., Tensor] | None, x: Any, y: Any) -> Any:
    """y, or a random target of the right shape: classes for cross entropy, else numbers. Model and loss are tried."""
    args, kwargs = model_arguments(model, x)
    _check_inputs(loaded, model, args, kwargs)
    with torch.no_grad(), loaded.running():
        output = model(*args, **kwargs)
    if loss is None:
        return y
    y = _random_target(loaded, loss, output) if y is None else y
    if loss not in LOSSES.values():
        with torch.no_grad(), loaded.running():
            loss(output, y)
    return y


def _check_inputs(loaded: Loaded, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """A shape stands for one input. Raises `InputError` where forward needs another number of them."""
    signature = inspect.signature(model.forward)
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        names = ", ".join(required(model.forward))
        raise InputError(
            f"forward() of {loaded.place} takes {names or 'no input'}, and x does not fit: {error}\n"
            "  Define example() in the file, which returns (x, y), with a tuple or a dict of the inputs for x."
        ) from error


def _random_target(loaded: Loaded, loss: Callable[..., Tensor], output: Any) -> Tensor:
    if not isinstance(output, Tensor):
        raise InputError(f"{loaded.place} gives {type(output).__name__}, so its target is not known: define example()")
    if loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss):
        if output.ndim < 2:
            raise InputError(f"cross entropy needs classes along axis 1; the output has shape {list(output.shape)}")
        return torch.randint(output.shape[1], (output.shape[0], *output.shape[2:]))
    return torch.randn_like(output)


# -- quantities


def quantities_of(names: list[str] | None, default: tuple[str, ...], loaded: Loaded | None = None) -> list[Quantity]:
    """Quantities by their key; those that the file defines, too, and with "_total" their sums over all parameters.

    Raises `InputError` and lists the known ones.
    """
    known = {quantity.name: quantity for quantity in _known(Quantity, loaded)}  # type: ignore[type-abstract]
    wanted = [name.strip() for text in names or default for name in text.split(",")]
    summed = {name: name.removesuffix(TOTAL) for name in wanted if name not in known and name.endswith(TOTAL)}
    known |= {name: Total(known[each]) for name, each in summed.items() if each in known}
    for name in wanted:
        if name not in known:
            hint = nearest(name, known)
            listed = f"known: {', '.join(sorted(known))}"
            raise InputError(f"no quantity {name!r}\n  " + (listed if hint == listed else f"{hint} {listed}"))
    return [known[name] for name in dict.fromkeys(wanted)]


def _known(base: type[Quantity], loaded: Loaded | None) -> Iterator[Quantity]:
    """An instance of each class of quantity that needs no options: what the package names, and what the file has."""
    file = loaded.file.__name__ if loaded else ""
    for cls in base.__subclasses__():
        own = cls.__module__.split(".")[0] == file or vars(sys.modules["tnbackprop"]).get(cls.__name__) is cls
        if own and not required(cls) and not inspect.isabstract(cls):
            yield cls()  # type: ignore[call-arg]
        yield from _known(cls, loaded)


def free(path: Path, force: bool) -> None:
    """Raises `InputError` where a file is there already and is not to be replaced, or where none can be."""
    if path.is_dir():
        raise InputError(f"{path} is a folder\n  Name a file in it.")
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: No such folder as {path.parent}")
    if path.exists() and not force:
        raise InputError(f"{path} exists\n  Choose another name, or give --force to replace it.")


def write(path: Path, text: str, force: bool) -> None:
    """Write a new file; an existing one only with `force`. Raises `InputError`."""
    free(path, force)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from error
