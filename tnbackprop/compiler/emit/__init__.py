"""Emit: the program as Python source; names and text are made here alone."""
