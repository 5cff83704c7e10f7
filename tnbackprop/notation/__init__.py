"""Notation: the text of a rule, parsed once, bound to shapes."""
