"""One run of torch.export, and what is said where it fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ...errors import TnError, UnsupportedError
from ...table import Composite, Rules
from ..running.bags import refuse_ragged
from ..running.failure import frame_here, line_at, place
from ..running.numbers import reads_numbers
from ..running.parts import WRITES, in_parts
from ..running.repeated import Repeats
from ..running.torch_quiet import Quiet, noting_forwards
from ..running.torch_tracer import module_calls
from ..running.torch_versions import lstm_states, refuse_valueless, sizes_by_builtins
from ..translate.foreign import MISTAKES
from ..translate.inplace import copy_views, cut_blocks, mutates_view, nodes_of
from ..translate.opaque import Opaque, opaque_calls
from ..translate.sizes import Condition, Sizes
from ..translate.symbolic import shapes_only, symbolic_kernels
from ..translate.torch_internals import (
    OpOverload,
    UnsupportedOperatorException,
    any_target,
    decomposed,
    evenly,
    export_refusals,
    guards_of_sizes,
    name_of,
    traced_here,
    whole_einsums,
)
from .kept import attributes_kept


class OneSizeError(UnsupportedError):
    """The exported graph holds for some batch sizes only.

    modules  the globals of code that made numbers of a size where it was fixed
    """

    def __init__(self, text: str, modules: Sequence[dict[str, Any]] = ()) -> None:
        super().__init__(text)
        self.modules = modules


class ExportError(UnsupportedError):
    """torch.export fails on what runs by itself."""


@dataclass(frozen=True)
class Exported:
    """What torch.export makes of the model and the loss.

    opaque      modules and primitives that stay one operator, by its name
    conditions  on the batch size, under which it is what they do
    repeated    how many modules have the operators of one that is equal
    """

    program: torch.export.ExportedProgram
    opaque: dict[str, Opaque]
    conditions: tuple[Condition, ...]
    repeated: int = 0


def exported(
    wrapped: nn.Module, example: tuple[Any, Any], rules: Rules, batch: Any, repeats: Repeats | None = None
) -> Exported:
    """Export with axis 0 of every input as `batch`; `repeats`: modules that are equal are traced once.

    Raises `OneSizeError`, `ExportError` and `UnsupportedError`.
    """
    shapes = pytree.tree_map(lambda leaf: {0: batch} if isinstance(leaf, Tensor) and leaf.ndim else None, example)
    asked: list[tuple[Any, str]] = []
    modules: list[dict[str, Any]] = []

    def guarded(condition: Any) -> None:
        frame = frame_here()
        asked.append((condition, line_at(frame)))
        if frame is not None and reads_numbers(frame) and not any(frame.f_globals is each for each in modules):
            modules.append(frame.f_globals)

    with (
        opaque_calls(wrapped, rules) as opaque,
        symbolic_kernels(),
        whole_einsums(),
        any_target(),
        traced_here(),
        nullcontext() if repeats is None else module_calls(repeats),
        evenly(),
        noting_forwards(),
        sizes_by_builtins(),
        lstm_states(),
        attributes_kept(wrapped),
        torch.enable_grad(),
        guards_of_sizes(guarded),
    ):
        try:
            with Quiet():
                with shapes_only(), in_parts(rules):
                    program = torch.export.export(wrapped, example, dynamic_shapes=shapes, strict=False)
                refuse_valueless(program)
                refuse_ragged(program.graph_module)
                parts = _composites(program.graph_module, rules)
                if parts and not mutates_view(program.graph_module):
                    copy_views(program.graph_module)
                if parts or has_autocast(program.graph_module) or mutates_view(program.graph_module):
                    cut_blocks(program.graph_module)
                    program = decomposed(program, parts | WRITES)
            conditions = Sizes(program).conditions(asked) if batch is torch.export.Dim.DYNAMIC else ()
            return Exported(program, opaque, conditions, 0 if repeats is None else repeats.count)
        except TnError as error:  # torch adds what it was executing
            raise type(error)(_said(error)) from error
        except export_refusals() as error:
            _refuse(wrapped, error, asked, modules)
        except (RuntimeError, AssertionError, *MISTAKES) as error:
            at = place(wrapped, error.__traceback__)
            unknown = isinstance(error, UnsupportedOperatorException)
            raise ExportError(
                f"torch.export fails on the {at.whole}, which runs as it is{at.within}: "
                f"{'torch has no shape function of ' * unknown}{_said(error)}{at.line}\n"
                f"  Write that otherwise{' (.detach() for .data)' * (not unknown)}, or give the module a rule "
                "(examples/add_a_layer.py)."
            ) from error


def _composites(program: torch.fx.GraphModule, rules: Rules) -> dict[Any, Callable[..., Any]]:
    """What the operators that are made of others are made of. All of them, as one may be made of another."""
    rows = {target: row for target, row in rules.items() if isinstance(row, Composite)}
    called = {name_of(node.target) for node in nodes_of(program) if isinstance(node.target, OpOverload)}
    made = {name_of(target) for target in rows if isinstance(target, OpOverload)}
    if not {(name.removesuffix("_"), which) for name, which in called} & made:
        return {}  # what writes in place has the row of what it is called without a _
    known = torch.export.default_decompositions()
    return {target: row.function or known[target] for target, row in rows.items()}


def has_autocast(program: torch.fx.GraphModule) -> bool:
    """Whether a part of it is in autocast: what torch casts there shows once its operators are made of their parts."""
    return any(node.target is torch.ops.higher_order.wrap_with_autocast for node in nodes_of(program))


ADDED = ("\n\nWhile executing", "While executing %", "\n\nThe error above occurred", "\nFor more information")
"""What torch writes after a message: where it was in code that it made, and how to look there."""
LONGEST = 300


def _said(error: Exception) -> str:
    """What an error says, without what torch adds."""
    text = str(error)
    for added in ADDED:
        text = text.partition(added)[0]
    text = text.strip() if isinstance(error, TnError) else re.split(r"(?<=\w\w)\. ", text.strip(), maxsplit=1)[0]
    return text if isinstance(error, TnError) or len(text) <= LONGEST else text[:LONGEST].rsplit(" ", 1)[0] + " …"


def _refuse(
    wrapped: nn.Module, error: Exception, asked: list[tuple[Any, str]], modules: list[dict[str, Any]]
) -> NoReturn:
    text = str(error)
    at = place(wrapped, error.__traceback__)
    sizes = "specialized" in text or "Constraints violated" in text or "not all values of batch" in text
    if sizes and "data-dependent" not in text:
        raise OneSizeError(
            f"the model or the loss is written for one batch size (or a range): the graph must hold for any."
            f"{_place_of_size(asked)}\n  Use x.shape[0] or -1 for the batch axis, not a number, and neither branch on "
            "it nor loop over samples or parts of the batch: each sample goes through by itself.",
            modules,
        ) from error
    target = "the loss, as a module," if at.loss else "that module"
    raise UnsupportedError(
        f"the graph of the {at.whole} depends on the data{at.within}: an if, a loop or a shape is decided by the "
        f"value of a tensor.{at.line}\n  Use torch.where, or one mask for all that it picks (mask = y > 0; f[mask], "
        f"y[mask]), or give {target} a rule (examples/add_a_layer.py)."
    ) from error


def _place_of_size(asked: list[tuple[Any, str]]) -> str:
    """The first line of the user's own that takes one size for granted, or else some sizes."""
    one = [line for condition, line in asked if isinstance(condition, sympy.Eq) and line]
    return next(iter([*one, *(line for _, line in asked if line)]), "")
