"""Where people from other systems find what they know."""

from typing import Literal

from rlhf.options import TRL
from rlhf.ranges import checked


@checked
def main(topic: Literal["trl"] = "trl") -> None:
    """Lists option names of TRL that work here, and what they are called.

    Args:
      topic: whose names.
    """
    for theirs, ours in TRL.items():
        print(f"  --{theirs:<32}--{ours}")
