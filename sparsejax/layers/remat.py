"""Rematerialization: what the backward pass of a layer keeps, and what it recomputes.

| policy | keeps |
|---|---|
| `none` | every activation that the backward pass reads |
| `dots` | the products with matrices of parameters, and what `attention` keeps |
| `attention` | the outputs of attention with their log-sum-exp, and the states and outputs of recurrences |
| `offload` | what `attention` keeps and the input of the layer, both in the memory of the host except for states |
| `full` | the input of the layer |

A policy knows what to keep by its name, see `sparsejax.ops.residuals`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import PyTree

from sparsejax.errors import InputError, suggest
from sparsejax.ops.device import has_host_memory
from sparsejax.ops.residuals import INPUT, MIXED, PRODUCT, STATE

CUDNN = "dot_product_attention_fwd_wrapper"  # the primitive whose results cuDNN's backward pass reads

_policies = jax.checkpoint_policies


def _keep(*names: str) -> Callable[..., bool]:
    by_name = _policies.save_only_these_names(*names)
    return _policies.save_from_both_policies(by_name, lambda primitive, *_, **__: primitive.name == CUDNN)


POLICIES: dict[str, Callable[..., Any] | None] = {
    "none": _policies.everything_saveable,
    "full": None,
    "dots": _policies.save_from_both_policies(_keep(MIXED, STATE, PRODUCT), _policies.dots_with_no_batch_dims_saveable),
    "attention": _keep(MIXED, STATE),
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[STATE],  # JAX offloads no array of a single iteration of a loop
        names_which_can_be_offloaded=[INPUT, MIXED],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def require_policy(config: Any, name: str) -> None:
    """Raises InputError if this attribute of `config` is no policy."""
    if (policy := getattr(config, name)) not in POLICIES:
        raise InputError(name, f"{policy!r} is not a policy; {suggest(str(policy), POLICIES, 'policies')}")


def rematerialize(function: Callable[..., PyTree], policy: str) -> Callable[..., PyTree]:
    """Returns a function whose backward pass keeps what `policy` says, and recomputes the rest.

    Raises:
      InputError: The policy is "offload", and the platform has no pinned memory of the host.
    """
    if policy == "none":
        return function
    if policy == "offload" and not has_host_memory():
        raise InputError("remat", "'offload' needs pinned host memory, which this platform lacks; use 'attention'")
    return jax.checkpoint(function, policy=POLICIES[policy])
