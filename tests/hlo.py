"""What compiled programs move between devices, read from XLA's text."""

import re

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def computations(text: str) -> dict[str, list[str]]:
    """Name -> instructions, one a line."""
    found: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if begins := re.match(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{", line):
            lines = found[begins[1]] = []
        else:
            lines.append(line)
    return found


def in_loops(text: str) -> list[tuple[str, int]]:
    """`(kind, elements)` of the collectives inside loops, and of what those call."""
    of_names = computations(text)
    called = r"(?:body|to_apply|calls|branch_computations|true_computation|false_computation)="
    bodies = [
        body
        for lines in of_names.values()
        for body in re.findall(r"body=%?([\w.\-]+)", "\n".join(lines))
    ]
    found: list[tuple[str, int]] = []
    seen: set[str] = set()
    while bodies:
        name = bodies.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in of_names.get(name, []):
            bodies += re.findall(rf"{called}\{{?%?([\w.\-]+)", line)
            instruction = re.match(r"\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(", line)
            if instruction and instruction[2].removesuffix("-start") in COLLECTIVES:
                sizes = re.findall(r"\w+\[([\d,]*)\]", instruction[1])
                number = max(_product(size) for size in sizes)
                found.append((instruction[2], number))
    return found


def _product(size: str) -> int:
    number = 1
    for part in filter(None, size.split(",")):
        number *= int(part)
    return number
