"""Derive: bound rules become diagrams of cotangents and results."""
