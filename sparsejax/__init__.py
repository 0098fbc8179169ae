"""sparsejax: sparse and hybrid sequence models in JAX."""

__version__ = "0.2.0"
