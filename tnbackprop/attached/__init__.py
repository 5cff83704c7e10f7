"""Attach: quantities come out of the user's own `loss.backward()`, without a second forward."""

from .attached import Attached, attach
from .replaced import check_detached

__all__ = ["Attached", "attach", "check_detached"]
