"""Entered: what a plan starts from as steps: the forward of the model, and the roots of the loss."""
