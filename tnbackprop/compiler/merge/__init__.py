"""Merge: how the results of several batches join."""
