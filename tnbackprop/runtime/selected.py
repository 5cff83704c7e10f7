"""Selected: which parameters a program is of. To it the others are frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

from torch import Tensor, nn

from ..compiler.translate.torch_internals import alone
from ..errors import InputError

Selection = str | Sequence[str] | Callable[[str], bool]
"""Names or patterns ("encoder.*", "*.bias"), one or several; or a predicate of a parameter's name."""


def left_out(model: nn.Module, parameters: Selection | None) -> frozenset[str]:
    """The trainable parameters that are not selected, by their first names. Raises `InputError` where none is."""
    if parameters is None or not isinstance(model, nn.Module):
        return frozenset()
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    names = {aliases[id(p)][0]: aliases[id(p)] for _, p in model.named_parameters() if p.requires_grad}
    if isinstance(parameters, nn.Module | Tensor):
        raise InputError(
            f"parameters is a {type(parameters).__name__}: give names or patterns (\"head.*\"), or a function of a name"
        )
    if callable(parameters):
        chosen = {first for first, every in names.items() if any(parameters(name) for name in every)}
    else:
        if not isinstance(parameters, str | Iterable):
            raise InputError(f"parameters={parameters!r}: give names or patterns, or a function of a name")
        patterns = [parameters] if isinstance(parameters, str) else list(parameters)
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise InputError(f"parameters={parameters!r}: give names or patterns, or a function of a name")
            if not any(fnmatchcase(name, pattern) for every in names.values() for name in every):
                known = ", ".join(list(names)[:6]) + (", …" if len(names) > 6 else "")
                inside = any(name.startswith(f"{pattern}.") for every in names.values() for name in every)
                remedy = f"write '{pattern}.*' for those inside" if inside else f"there are {known}"
                raise InputError(f"parameters: {pattern!r} fits no trainable parameter of the model: {remedy}")
        fits = ((first, name) for first, every in names.items() for name in every)
        chosen = {first for first, name in fits if any(fnmatchcase(name, pattern) for pattern in patterns)}
    if not chosen:
        raise InputError("parameters selects no trainable parameter of the model")
    return frozenset(names) - chosen


@contextmanager
def frozen(model: nn.Module, names: frozenset[str]) -> Iterator[None]:
    """While it is entered these parameters require no gradient; others who compile wait."""
    others = [p for name, p in model.named_parameters() if name in names] if names else []
    if not others:
        yield
        return
    with alone():
        try:
            for parameter in others:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)
