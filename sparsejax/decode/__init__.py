"""Decoding: caches and generation."""

from sparsejax.decode.generate import generate

__all__ = ["generate"]
