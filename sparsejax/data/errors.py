"""Errors about data."""

from sparsejax.errors import InputError


class DataError(InputError):
    """Data that cannot be read or that a configuration cannot use; `argument` is the configuration key."""
