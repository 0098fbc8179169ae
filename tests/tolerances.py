"""How exact a result in each dtype has to be: the one table of the tests of ops."""

import numpy as np

# Largest error relative to the largest entry of the array, or to 1 where that is smaller (inputs are of order 1).
TOLERANCE = {"float64": 1e-13, "float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def assert_close(name: str, found, expected, dtype: str):
    """Compares as float64; infinities must agree exactly, and nothing is NaN."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, name
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite], err_msg=name)
    scale = max(1.0, np.abs(expected[finite]).max(initial=0.0))
    error = np.abs(found[finite] - expected[finite]).max(initial=0.0) / scale
    assert error <= TOLERANCE[dtype], f"{name}: error {error:.2e} relative to {scale:.3g}"
