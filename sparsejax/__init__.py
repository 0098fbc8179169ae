"""sparsejax: sparse and hybrid sequence models in JAX."""
