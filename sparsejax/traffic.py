"""The bytes that the shards of a sequence exchange in a training step: counted in the traced program, never measured.

Ops exchange keys and states by explicit collectives over the axis `sequence`, see `sparsejax.ops.sequence`. A layer is
traced on an abstract mesh, forward and backward, and each of these collectives counts with the bytes that a device
receives.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters.partial_eval import dce_jaxpr
from jax.sharding import AbstractMesh, AxisType
from jaxtyping import Array

from sparsejax.config import ModelConfig
from sparsejax.model import Functional
from sparsejax.ops.sequence import AXIS

# By primitive: the name in a compiled program, and the bytes that one of n devices receives, relative to those of the
# operand, in rings of n - 1 steps.
COLLECTIVES: dict[str, tuple[str, Callable[[int], float]]] = {
    "ppermute": ("collective-permute", lambda n: 1),
    "all_gather": ("all-gather", lambda n: n - 1),
    "reduce_scatter": ("reduce-scatter", lambda n: (n - 1) / n),
    "psum": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "pmax": ("all-reduce", lambda n: 2 * (n - 1) / n),
    "all_to_all": ("all-to-all", lambda n: (n - 1) / n),
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a layer exchanges.

    Attributes:
      kind: What travels, such as "halo"; see `MixerConfig.exchange`.
      received: Bytes that a device receives per row and training step, by collective.
    """

    kind: str
    received: dict[str, float]

    @property
    def total(self) -> float:
        """Bytes of all collectives."""
        return sum(self.received.values())


def count_traffic(config: ModelConfig, length: int, shards: int) -> list[Traffic]:
    """Returns the traffic of each layer in order.

    Args:
      config: The model.
      length: Tokens per row, which `shards` divides.
      shards: Number of devices that share a row.
    """
    by_name = {name: _count_layer(config, name, length, shards) for name in dict.fromkeys(config.names)}
    return [by_name[name] for name in config.names]


def _count_layer(config: ModelConfig, name: str, length: int, shards: int) -> Traffic:
    """The traffic of a model of this layer alone; embedding and head exchange nothing."""
    alone = dataclasses.replace(config, schedule=name, scan=False)
    model = Functional(alone)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def total(parameters: dict[str, Any], tokens: Array) -> Array:
        return model.bind(parameters).forward(tokens).features.astype(jnp.float32).sum()

    mesh = AbstractMesh((shards,), (AXIS,), axis_types=(AxisType.Auto,))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.make_jaxpr(jax.grad(total))(model.shapes, ids)
    used, _ = dce_jaxpr(traced.jaxpr, [True] * len(traced.jaxpr.outvars))
    received: Counter[str] = Counter()
    for primitive, operand in _list_collectives(used):
        name_in_program, share = COLLECTIVES[primitive]
        received[name_in_program] += operand * share(shards)
    return Traffic(config.layers[name].exchange(length, shards), dict(received))


def _list_collectives(jaxpr: Any, times: int = 1) -> Iterator[tuple[str, float]]:
    """The collectives over the sequence in a program, and the bytes of their operands."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name.removesuffix("_invariant")
        if name in COLLECTIVES and AXIS in _axes(equation.params):
            for operand in equation.invars:
                yield name, times * math.prod(operand.aval.shape) * operand.aval.dtype.itemsize
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_program):
            if _is_program(inner):
                yield from _list_collectives(getattr(inner, "jaxpr", inner), times * repeats)


def _axes(parameters: dict[str, Any]) -> tuple[str, ...]:
    axes = parameters.get("axes", parameters.get("axis_name", ()))
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")
