"""Diagrams: sums of products on named legs, and their algebra."""
