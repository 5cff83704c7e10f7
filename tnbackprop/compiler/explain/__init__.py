"""Explain: every stage as text."""
