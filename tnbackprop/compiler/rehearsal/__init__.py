"""Rehearsal: the example runs once, before it is captured, to see what a graph would not show."""
