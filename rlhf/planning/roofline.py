"""The least time that a program needs on its devices: by its products, its memory and its links.

The three overlap in the best case, so that a step takes the longest of them.  Real steps take longer:
products below the peak rate, and links that wait.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rlhf.fields import documented
from rlhf.planning.hlo import Collective
from rlhf.planning.topologies import Topology
from rlhf.training.chips import Chip


@documented
class Times(NamedTuple):
    """Seconds on every device.

    Attributes:
      matrix: of matrix products, at the peak rate of bfloat16.
      memory: of reading and writing the device's memory.
      links: of collectives, one after the other.
    """

    matrix: float
    memory: float
    links: float

    @property
    def step(self) -> float:
        """The longest of the three."""
        return max(self)

    @property
    def bound(self) -> str:
        """Which of them that is."""
        return max(zip(self, self._fields, strict=True))[1]


def times(
    chip: Chip, flops: float, traffic: float, moved: Sequence[Collective], topology: Topology
) -> Times:
    """Times of one device.

    Args:
      chip: what the device is.
      flops: operations of one device.
      traffic: bytes that it reads and writes.
      moved: collectives that it takes part in.
      topology: whose links they use.
    """
    links = sum(one.total / topology.rate(one.devices) for one in moved if one.total)
    return Times(flops / chip.flops, traffic / chip.memory_rate, links)


def mfu(parameters: int, tokens: int, devices: int, chip: Chip, seconds: float) -> float:
    """Share of the peak that 6 operations a parameter and token are, which `metrics.jsonl` logs too.

    >>> chip = Chip(memory=1.0, flops=600.0, memory_rate=1.0, link_rate=1.0)
    >>> mfu(parameters=10, tokens=20, devices=2, chip=chip, seconds=2.0)
    0.5
    """
    return 6 * parameters * tokens / (devices * chip.flops * seconds)
