"""Fresh processes: the time to the first step, and to a checkpoint that is loaded."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers import Process
from benchmarks.speed import sides
from benchmarks.speed.turns import spread

# Jobs whose first step is waited for; that of `load` is the load.
FIRST = ("sft", "grpo", "load")
# torch compiles nothing here.
COMPILING = ("ours", "tunix")


def measure(names: Sequence[str], folder: Path, starts: int) -> list[dict[str, Any]]:
    """Rows of the table of starts: each side `starts` times in turns, without and with JAX's
    persistent compilation cache, which a start before the counted ones has filled.
    """
    for name in names:
        # An environment that is not there yet is made before the clock starts.
        sides.python(name, "sft", isolated=len(names) > 1)
    return [row for job in FIRST for row in until_first_step(names, job, folder, starts)]


def until_first_step(
    names: Sequence[str], job: str, folder: Path, starts: int
) -> list[dict[str, Any]]:
    rows = []
    isolated = len(names) > 1
    with tempfile.TemporaryDirectory() as cache:
        caches: dict[bool, Path | None] = {False: None, True: Path(cache)}
        if job == "load":
            del caches[True]
        for is_cached, where in caches.items():
            taking_part = [name for name in names if not is_cached or name in COMPILING]
            if is_cached:
                for name in taking_part:
                    one_start(name, job, folder, isolated, where)
            found: dict[str, list] = {name: [] for name in taking_part}
            for _ in range(starts):
                for name in taking_part:
                    found[name].append(one_start(name, job, folder, isolated, where))
            rows += [row_of(job, name, is_cached, lines) for name, lines in found.items()]
    return rows


def one_start(
    side: str, job: str, folder: Path, isolated: bool, cache: Path | None
) -> dict[str, Any]:
    """The reply of a fresh process's first step, with the seconds since it was started."""
    started = time.perf_counter()
    process: Process = sides.start(side, job, folder, isolated=isolated, cache=cache)
    reply = process.ask(rest=0.0)
    reply["since_start"] = time.perf_counter() - started
    process.close()
    return reply


def row_of(job: str, side: str, is_cached: bool, lines: list[dict]) -> dict[str, Any]:
    row: dict[str, Any] = {"job": job, "side": side, "cached": is_cached}
    failed = [line["error"] for line in lines if "error" in line]
    if failed:
        return row | {"error": failed[0]}
    row |= spread([line["since_start"] for line in lines])
    # Only our side compiles in a call of its own, before the step.
    compiled = [line["parts"]["compile"] for line in lines if "compile" in line["parts"]]
    return row | ({"compile": spread(compiled)["median"]} if compiled else {})
