"""Names of arrays that the backward pass reads, by which `sparsejax.layers.remat` keeps them.

The rules of derivatives name what they compute in the forward pass and read in the backward pass, so that a policy that
keeps these arrays does not run attention or a recurrence twice.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import PyTree

INPUT = "layer_input"
MIXED = "mixed"  # outputs and log-sum-exp of attention, outputs of recurrences
STATE = "state"  # states of recurrences between chunks
PRODUCT = "product"  # products of rows with the matrices of their experts


def name_arrays(arrays: PyTree, name: str) -> PyTree:
    """Names arrays; without a policy this changes nothing."""
    return jax.tree.map(lambda x: checkpoint_name(x, name), arrays)
