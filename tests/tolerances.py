"""Tolerances of numerical tests."""

import numpy as np

from sparsejax.ops.reference import TOLERANCE, relative_error

# Largest norm of a kernel's error, relative to the norm of the array.
NORM = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 3e-3}


def assert_close(name: str, actual, expected, dtype: str):
    """Compares as float64; infinities must be equal, and NaN is an error."""
    assert np.shape(actual) == np.shape(expected), name
    error = relative_error(np.asarray(actual, np.float64), np.asarray(expected, np.float64))
    assert error <= TOLERANCE[dtype], f"{name}: error {error:.2e}"


def assert_norm_close(name: str, actual, expected, dtype: str):
    """Compares the norms of error and array where they are finite; an array of zeros must be exact."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    actual, expected = actual[finite], expected[finite]
    error, size = np.linalg.norm(actual - expected), np.linalg.norm(expected)
    assert error <= NORM[dtype] * size, f"{name}: error {error:.2e}, of a norm of {size:.3g}"
