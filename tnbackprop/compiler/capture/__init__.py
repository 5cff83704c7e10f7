"""Capture: the example runs once, and the model with its loss is exported and checked as a graph of calls."""
