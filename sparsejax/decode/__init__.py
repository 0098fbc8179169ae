"""Decoding: generation from caches."""

from sparsejax.decode.generate import generate

__all__ = ["generate"]
