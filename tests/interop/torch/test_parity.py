"""Random models of every family agree with transformers: the first cases of `parity.py`.

Run with `pytest -m external tests/interop/torch`. torch and transformers are in this interpreter or in the interpreter
that the environment variable SPARSEJAX_TORCH_PYTHON names.
"""

import importlib.util
import os
import sys

import pytest

from benchmarks.harness import OtherProcess
from tests.interop.torch.parity import WORKER, check
from tests.interop.torch.random_models import FAMILIES

pytestmark = pytest.mark.external

CASES = 3


@pytest.fixture(scope="module")
def torch():
    """The process with torch and transformers."""
    python = os.environ.get("SPARSEJAX_TORCH_PYTHON", sys.executable)
    if python == sys.executable and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        pytest.skip("torch and transformers are not installed, and SPARSEJAX_TORCH_PYTHON names no interpreter")
    with OtherProcess(python, WORKER) as process:
        yield process


@pytest.mark.parametrize("number", range(CASES))
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_random_model_agrees(torch, family, number):
    assert check(torch, family, 0, number).problem == ""
