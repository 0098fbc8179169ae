import math

import pytest

from sparsejax.config import ConfigError, ShardingConfig
from sparsejax.errors import InputError
from sparsejax.plan import MACHINES, Topology
from sparsejax.sharding import MESH_AXES


def test_topologies_count_devices():
    assert [Topology.parse(text).count for text in ("v5e:4x4", "v5p:2x2x2", "tpu7x:2x2x1", "h100:8")] == [16, 8, 8, 8]
    assert str(Topology.parse("v6e:2x4")) == "v6e:2x4"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("v5x:4x4", "did you mean"),
        ("nvidia:8", "the devices are v5e, v5p"),
        ("v5e", "is not v5e:2x2"),
        ("v5e:0x4", "is not v5e:2x2"),
        ("v5e:16", "v5e has 2 axes; write v5e:4x4"),
        ("v5p:4x4", "v5p has 3 axes; write v5p:4x4x1"),
        ("h100:2x4", "h100 has 1 axes; write h100:8"),
    ],
)
def test_unknown_topologies_are_refused_with_the_nearest(text, problem):
    with pytest.raises(InputError, match=problem):
        Topology.parse(text)


def test_a_mesh_needs_no_devices():
    topology = Topology.parse("v5e:4x4")
    mesh = topology.abstract_mesh(ShardingConfig(data=-1, fsdp=4, tensor=2))
    assert tuple(mesh.shape[axis] for axis in MESH_AXES) == (2, 4, 1, 2)
    assert mesh.abstract_device.device_kind == "TPU v5 lite"
    with pytest.raises(ConfigError, match="is not the number of devices, 16; use data = 2"):
        topology.abstract_mesh(ShardingConfig(data=1, fsdp=4, tensor=2))


def test_every_device_has_its_peaks():
    for machine in MACHINES.values():
        known = machine.flops, machine.bandwidth, machine.interconnect
        assert machine.name == "cpu" or all(0 < peak < math.inf for peak in known)
        assert machine.name == "cpu" or machine.extra
