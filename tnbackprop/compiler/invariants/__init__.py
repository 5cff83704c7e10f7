"""Invariants: what holds after every stage."""
