"""Modules that bring their own rule."""

from __future__ import annotations

from torch import nn

from ..notation.rule import Rule
from ..table import Table

TABLE = Table()


class Declared(nn.Module):
    """A module that says its rule itself: `rule`, an attribute of the instance or of the class.

    ``signature``, an `inspect.Signature`, names the arguments of a forward that takes ``*args``.
    """

    rule: Rule | str


TABLE.rule(Declared)(lambda layer: layer.rule)
