"""Devices of pods and clusters that are elsewhere, by name, and what such a device can do."""

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf.fields import documented
from rlhf.training.chips import CHIPS, Chip

KNOWN = "v4:4x4x4, v5p:4x4x4, v5e:16x16, v6e:2x4, tpu7x:4x4x4, h100:1x4x8, h200:1x8x8, cpu:8"
GPUS = {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}


@documented
class Topology(NamedTuple):
    """Devices of one pod or cluster.

    Attributes:
      name: such as `v5p:4x4x4`.
      chip: what each device is.
      devices: in the order in which a mesh takes them.
      host: GPUs of a host; 0 of TPUs.
    """

    name: str
    chip: Chip
    devices: Sequence[jax.Device]
    host: int = 0

    def rate(self, group: Sequence[int]) -> float:
        """Bytes a second that each device of a group receives in a collective.

        A torus brings as much as the axes along which the group lies: in both directions where the
        group closes a ring.  GPUs of a host have NVLink; a group of several hosts the network of
        all of its GPUs of one, if that is less.
        """
        if self.host:
            hosts = {number // self.host for number in group}
            of_host = self.chip.network_rate * len(group) / len(hosts)
            return self.chip.link_rate if len(hosts) == 1 else min(self.chip.link_rate, of_host)
        if not hasattr(self.devices[0], "coords"):
            return self.chip.link_rate
        every = np.array([device.coords for device in self.devices])
        sizes = every.max(0) + 1
        here = every[list(group)]
        rate = 0.0
        for axis, size in enumerate(sizes):
            along = len(set(here[:, axis].tolist()))
            if along > 1:
                is_ring = along == size and size >= self.chip.wraps
                rate += self.chip.link_rate * (2 if is_ring else 1)
        # Two devices of one chip: at least as fast as a link.
        return rate or self.chip.link_rate


def find(name: str) -> Topology:
    """The devices that a name stands for; programs can be compiled for them, and not run.

    Args:
      name: `v5p:4x4x4` (chips of a torus), `h200:1x8x8` (slices × hosts × GPUs of a host), `cpu:8`.

    Raises: ValueError for a name that is not known, and where what compiles for it is not installed;
    both say what helps.

    >>> len(find("cpu:1").devices)
    1
    """
    kind, _, shape = name.partition(":")
    sizes = shape.split("x")
    is_known = kind in CHIPS and all(size.isdecimal() and int(size) for size in sizes)
    axes = {"v5e": (2,), "v6e": (2,), "cpu": (1,)}.get(kind, (3,))
    if not is_known or len(sizes) not in axes:
        raise ValueError(
            f"topology {name!r} is not known; there are, in these and other sizes: {KNOWN}"
        )
    chip = CHIPS[kind]
    if kind == "cpu":
        return Topology(name, chip, _cpus(int(shape)))
    if kind in GPUS:
        return Topology(name, chip, _gpus(kind, shape), int(sizes[-1]))
    return Topology(name, chip, _tpus(name))


def _cpus(number: int) -> Sequence[jax.Device]:
    # Before JAX has started its devices their number is a setting; afterwards it stands.
    with contextlib.suppress(RuntimeError):
        jax.config.update(
            "jax_num_cpu_devices", max(number, jax.config.values["jax_num_cpu_devices"])
        )
    there = jax.devices("cpu")
    if len(there) < number:
        raise ValueError(
            f"topology cpu:{number}, but this process has {len(there)} CPU devices; start it with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={number}"
        )
    return there[:number]


def _tpus(name: str) -> Sequence[jax.Device]:
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"topology {name} is compiled by libtpu, which is not installed; pip install "
            "'rlhf[plan-tpu]'"
        )
    # No TPU is asked for what it is, and another process may compile at the same time.
    settings = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5p-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    for variable, value in settings.items():
        os.environ.setdefault(variable, value)
    return _described(name, name, platform="tpu")


def _gpus(kind: str, shape: str) -> Sequence[jax.Device]:
    plugins = ("jax_cuda13_plugin", "jax_cuda12_plugin")
    if not any(importlib.util.find_spec(plugin) for plugin in plugins):
        raise ValueError(
            f"topology {kind}:{shape} is compiled by JAX's CUDA plugin, which is not installed; pip "
            "install 'rlhf[plan-gpu]'"
        )
    config = _target_config(GPUS[kind], CHIPS[kind])
    return _described(
        f"{kind}:{shape}", kind, platform="cuda", target_config=config, topology=shape
    )


def _described(name: str, *args: Any, **kwargs: Any) -> Sequence[jax.Device]:
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(*args, **kwargs).devices
    # XLA's errors of shapes that no pod has, and of libraries that do not load.
    except Exception as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(f"topology {name} cannot be made: {why}; there are {KNOWN}") from error


def _target_config(name: str, chip: Chip) -> str:
    """A GPU as XLA wants it described (GpuTargetConfigProto, as text): a Hopper of 132 processors."""
    return f"""gpu_device_info {{
threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
memory_bandwidth: {chip.memory_rate:.0f} l2_cache_size: 52428800 clock_rate_ghz: 1.98
device_memory_size: {chip.memory:.0f} shared_memory_per_block_optin: 232448
cuda_compute_capability {{ major: 9 }} registers_per_core_limit: 65536
registers_per_block_limit: 65536 thread_dim_limit_x: 1024 thread_dim_limit_y: 1024
thread_dim_limit_z: 64 device_vendor: "NVIDIA Corporation" device_address_bits: 64 name: "{name}"
driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
dnn_version: "9.10.0" }}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}\""""


def devices(name: str) -> Sequence[jax.Device]:
    """`find(name).devices`."""
    return find(name).devices
