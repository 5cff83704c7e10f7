"""`tnbackprop draw`: a picture of a model, or of a quantity of one parameter."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import tnbackprop as tn

from ..drawing import quantity
from ..drawing.picture import Drawable, check_suffix
from .compiled import compiled
from .loading import free

BOTH = "--quantity and --parameter belong together: the picture is of one quantity of one parameter, or of a total"


def run(arguments: argparse.Namespace) -> int:
    """0. Raises `InputError` where the file, the quantity or the parameter is not there, or the output is."""
    if arguments.parameter and not arguments.quantity:
        raise tn.InputError(BOTH)
    asked = ",".join(arguments.quantity or ()).split(",")
    if len(asked) > 1:
        raise tn.InputError(f"one picture is of one quantity, not of {len(asked)}: --quantity {asked[0]}")
    if arguments.quantity and arguments.depth is not None:
        raise tn.InputError("--depth is of a picture of the model, not of a quantity")
    names = _renamed(arguments.rename)
    free(arguments.output, arguments.force)
    check_suffix(arguments.output)
    program = compiled(arguments, ("grad",) if not arguments.quantity else ())
    if arguments.quantity:
        key, of = next(iter(program.quantities)), arguments.parameter
        if not of and not isinstance(program.quantities[key], tn.Total):
            raise tn.InputError(BOTH)
        what: Drawable = quantity(program, key, of) if of else quantity(program, key)
        title = f"{key} of {of}" if of else f"{key}, the sum over parameters"
        drawing = tn.draw(what, title=title, names=names)
    else:
        drawing = tn.draw(program, names=names, depth=arguments.depth)
    print(drawing.save(arguments.output, force=arguments.force))
    return 0


def _renamed(given: Sequence[str]) -> dict[str, str]:
    """{old: new} of texts OLD=NEW."""
    parts = [text.partition("=") for text in given]
    for text, (old, _, new) in zip(given, parts, strict=True):
        if not old or not new:
            raise tn.InputError(f"--rename {text}: write OLD=NEW, as in --rename g_layer_0=g")
    return {old: new for old, _, new in parts}
