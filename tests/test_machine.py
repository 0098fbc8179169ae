import os

import pytest

from sparsejax.machine import find_cores, find_devices, share_out

pytestmark = pytest.mark.quick


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("slots", range(1, 9))
def test_shares(count, slots):
    """Equal parts that overlap only where there are too few items, and then as little as can be."""
    shares = [share_out(range(count), slot, slots) for slot in range(slots)]
    used = [item for share in shares for item in share]
    if count >= slots:
        assert {len(share) for share in shares} == {count // slots}
        assert len(set(used)) == len(used)
    elif count:
        assert {len(share) for share in shares} == {1}
        assert max(map(used.count, used)) - min(map(used.count, used)) <= 1
    else:
        assert used == []


@pytest.mark.parametrize(
    ("platforms", "visible", "devices"),
    [
        (None, "3,5", ("3", "5")),
        ("cuda,cpu", "GPU-a", ("GPU-a",)),
        ("cuda", "", ()),
        ("cpu", "0,1", ()),
        ("tpu", "0", ()),
    ],
)
def test_devices(monkeypatch, platforms, visible, devices):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if platforms is None:
        monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    else:
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
    assert find_devices() == devices


def test_cores():
    assert set(find_cores()) == os.sched_getaffinity(0)
