"""Capture: a model and its loss as a graph of calls."""
