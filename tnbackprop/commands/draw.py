"""`tnbackprop draw`: a picture of a model, or of a quantity of one parameter."""

from __future__ import annotations

import argparse

import tnbackprop as tn

from ..drawing import quantity
from ..drawing.picture import check_suffix
from .compiled import compiled
from .loading import free


def run(arguments: argparse.Namespace) -> int:
    """0. Raises `InputError` where the file, the quantity or the parameter is not there, or the output is."""
    if bool(arguments.quantity) != bool(arguments.parameter):
        raise tn.InputError(
            "--quantity and --parameter belong together: the picture is of one quantity of one parameter"
        )
    asked = ",".join(arguments.quantity or ()).split(",")
    if len(asked) > 1:
        raise tn.InputError(f"one picture is of one quantity, not of {len(asked)}: --quantity {asked[0]}")
    free(arguments.output, arguments.force)
    check_suffix(arguments.output)
    program = compiled(arguments, ("grad",) if not arguments.quantity else ())
    if arguments.quantity:
        key = next(iter(program.quantities))
        drawing = tn.draw(quantity(program, key, arguments.parameter), title=f"{key} of {arguments.parameter}")
    else:
        drawing = tn.draw(program)
    print(drawing.save(arguments.output, force=arguments.force))
    return 0
