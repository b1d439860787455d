"""Accelerators: what each can do, and how JAX calls it."""

from typing import NamedTuple

from rlhf.fields import documented

GIB = 2**30


@documented
class Chip(NamedTuple):
    """What a device is; of chips that are two devices, half of the chip.

    Attributes:
      memory: bytes of HBM.
      flops: dense bfloat16 operations a second.
      memory_rate: bytes a second from and to HBM.
      link_rate: bytes a second that one link brings: of a TPU in one direction of one axis of the
        torus; of a GPU its NVLinks together.
      network_rate: bytes a second that a GPU gets from other hosts; 0 where there are none.
      wraps: devices of an axis from which on a TPU's links close to a ring.
    """

    memory: float
    flops: float
    memory_rate: float
    link_rate: float
    network_rate: float = 0.0
    wraps: int = 4


# TPUs: memory, operations and memory rates of https://cloud.google.com/tpu/docs/v4, /v5p, /v5e, /v6e
# and /tpu7x; links in one direction of https://jax-ml.github.io/scaling-book/tpus (v4, v5e: 45 GB/s,
# v5p, v6e: 90 GB/s), of tpu7x the 1,200 GB/s of a chip's six links both ways.
# GPUs: NVIDIA's data sheets of H100 and H200 SXM (operations without sparsity; NVLink 900 GB/s both
# ways); 400 Gbit/s of InfiniBand for each GPU, as in a DGX.
CHIPS = {
    "v4": Chip(16 * GIB, 137.5e12, 0.6e12, 45e9),
    "v5p": Chip(95 * GIB, 459e12, 2.765e12, 90e9),
    "v5e": Chip(16 * GIB, 197e12, 0.819e12, 45e9, wraps=16),
    "v6e": Chip(32 * GIB, 918e12, 1.64e12, 90e9, wraps=16),
    "tpu7x": Chip(96 * GIB, 1153.5e12, 3.69e12, 100e9),
    "h100": Chip(80e9, 989e12, 3.35e12, 450e9, 50e9),
    "h200": Chip(141e9, 989e12, 4.8e12, 450e9, 50e9),
    # No accelerator: figures of a small server, so that a plan of a laptop has numbers.
    "cpu": Chip(4 * GIB, 0.1e12, 0.02e12, 10e9),
}
# Operations a second of what JAX calls a device when it runs, by the start of its kind.  Order
# matters: "TPU v5 lite" starts with "TPU v5" too, and the first that fits is taken.
PEAKS = {
    "NVIDIA H200": CHIPS["h200"].flops,
    "NVIDIA H100": CHIPS["h100"].flops,
    # NVIDIA's data sheet; no topology of it can be planned.
    "NVIDIA A100": 312e12,
    # Its two cores are one device, except in a topology.
    "TPU v4": 2 * CHIPS["v4"].flops,
    "TPU v5 lite": CHIPS["v5e"].flops,
    "TPU v5": CHIPS["v5p"].flops,
    "TPU v6 lite": CHIPS["v6e"].flops,
    "TPU7x": CHIPS["tpu7x"].flops,
}
