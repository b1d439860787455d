"""What compiled programs move between devices inside their loops, read from XLA's text."""

import re

from rlhf.planning import hlo


def in_loops(text: str) -> list[tuple[str, int]]:
    """`(kind, elements)` of the collectives inside loops, and of what those call."""
    found = []
    for one in hlo.collectives(text):
        if one.depth:
            sizes = re.findall(r"\w+\[([\d,]*)\]", one.shape)
            number = max(hlo.product(size) for size in sizes)
            found.append((one.kind, number))
    return found
