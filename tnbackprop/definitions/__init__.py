"""Definitions: what quantities must be, from torch.func and the Jacobians of single lines."""
