"""Errors about foreign checkpoints."""

from sparsejax.errors import InputError


class ConversionError(InputError):
    """A checkpoint that cannot be converted exactly; `argument` is a file, a key of config.json or a tensor."""
