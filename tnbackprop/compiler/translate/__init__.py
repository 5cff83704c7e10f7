"""Translate: an exported program as a graph of calls on values with named axes."""
