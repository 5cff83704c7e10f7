"""Batched: where the batch stands in a value, what mixes samples, and calls whose batch gets an axis of its own."""
