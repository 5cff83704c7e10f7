"""Proof: a compiled program against PyTorch's own autograd."""
