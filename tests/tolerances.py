"""How exact a result in each dtype has to be: the one place for the tests of ops."""

import numpy as np

# Largest error relative to the largest entry of the array, or to 1 where that is smaller (inputs are of order 1).
TOLERANCE = {"float64": 1e-13, "float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


# Of kernels also the norm of the error, relative to that of the array.
NORM = {"float32": 1e-6, "float16": 5e-4, "bfloat16": 3e-3}


def assert_close(name: str, found, expected, dtype: str):
    """Compares as float64; infinities must agree exactly, and nothing is NaN."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, name
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite], err_msg=name)
    scale = max(1.0, np.abs(expected[finite]).max(initial=0.0))
    error = np.abs(found[finite] - expected[finite]).max(initial=0.0) / scale
    assert error <= TOLERANCE[dtype], f"{name}: error {error:.2e} relative to {scale:.3g}"


def assert_norm_close(name: str, found, expected, dtype: str):
    """Compares whole arrays, where they are finite; an array of zeros must be found."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    finite = np.isfinite(expected)
    found, expected = found[finite], expected[finite]
    error, size = np.linalg.norm(found - expected), np.linalg.norm(expected)
    assert error <= NORM[dtype] * size, f"{name}: error {error:.2e}, of a norm of {size:.3g}"
