"""Devices by name; what is not known or not installed says what helps."""

import importlib.util

import jax
import pytest

from rlhf.planning import topologies
from rlhf.planning.topologies import Topology
from rlhf.training.chips import CHIPS


@pytest.mark.parametrize(
    "name", ["v9:2x2", "v5p", "v5p:4x4", "v5e:4x4x4", "cpu:x", "h200:0x1x8", ""]
)
def test_an_unknown_topology_lists_those_that_are(name):
    with pytest.raises(ValueError, match=r"is not known; there are.* v5p:4x4x4, v5e:16x16"):
        topologies.find(name)


@pytest.mark.parametrize(("name", "extra"), [("v5p:2x2x1", "plan-tpu"), ("h200:1x1x8", "plan-gpu")])
def test_a_missing_compiler_says_how_to_install_it(name, extra, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"not installed; pip install 'rlhf\[{extra}\]'"):
        topologies.find(name)


def test_more_cpu_devices_than_the_process_has_say_how_to_get_them():
    assert topologies.devices("cpu:8") == jax.devices()[:8]
    with pytest.raises(ValueError, match="xla_force_host_platform_device_count=9000"):
        topologies.find("cpu:9000")


class Core:
    def __init__(self, *coords):
        self.coords = coords


def torus(kind, *sizes):
    x, y, z = sizes
    cores = [Core(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    return Topology(f"{kind}:{x}x{y}x{z}", CHIPS[kind], cores)


def test_a_ring_brings_from_both_sides_and_two_axes_twice():
    pod = torus("v5p", 4, 4, 4)
    link = CHIPS["v5p"].link_rate
    assert pod.rate((0, 1, 2, 3)) == 2 * link
    assert pod.rate((0, 1)) == link
    assert pod.rate(range(16)) == 4 * link
    # A v6e of 2 × 4 closes no ring.
    assert torus("v6e", 2, 4, 1).rate(range(8)) == 2 * CHIPS["v6e"].link_rate


def test_hosts_share_their_networks():
    chip = CHIPS["h200"]
    cluster = Topology("h200:1x2x8", chip, jax.devices()[:1], 8)
    assert cluster.rate(range(8)) == chip.link_rate
    assert cluster.rate(range(16)) == 8 * chip.network_rate
    assert cluster.rate((0, 8)) == chip.network_rate
