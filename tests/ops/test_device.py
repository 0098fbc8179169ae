"""Programs are compiled for the devices of the mesh, which need not be those of this machine."""

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.config import ShardingConfig
from sparsejax.ops import ssd
from sparsejax.ops.device import device_kind, on_cpu
from sparsejax.plan import Topology

SINGLE = ShardingConfig(data=-1, fsdp=1, tensor=1)


def test_the_mesh_decides():
    assert on_cpu()
    with jax.sharding.use_abstract_mesh(Topology.parse("v5e:2x2").abstract_mesh(SINGLE)):
        assert device_kind() == "TPU v5 lite"
        assert not on_cpu()


def test_chunks_are_cut_into_blocks_on_a_cpu_only():
    """Products of whole chunks of 64 positions for a TPU, of blocks of 32 for a CPU."""
    x, dt, A, B = jnp.ones((1, 128, 2, 4)), jnp.ones((1, 128, 2)), -jnp.ones(2), jnp.ones((1, 128, 1, 4))

    def sizes():
        text = str(jax.make_jaxpr(lambda x: ssd(x, dt, A, B, B, chunk=64)[0])(x))
        return {size for size in (32, 64) if f"{size},{size}]" in text}

    assert sizes() == {32}
    with jax.sharding.use_abstract_mesh(Topology.parse("v5e:2x2").abstract_mesh(SINGLE)):
        assert sizes() == {64}
    assert np.isfinite(ssd(x, dt, A, B, B, chunk=64)[0]).all()
