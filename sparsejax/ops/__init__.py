"""Arrays in, arrays out: no parameters, no configuration."""

from sparsejax.ops.attention import IMPLEMENTATIONS, Implementation, ImplementationError, attend

__all__ = ["IMPLEMENTATIONS", "Implementation", "ImplementationError", "attend"]
