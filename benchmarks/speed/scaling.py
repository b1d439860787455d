"""What our steps cost over batch, length, vocabulary, group size and layers: an exponent for each."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.speed import jobs, machine, ours
from benchmarks.speed.jobs import Size
from benchmarks.speed.turns import REST, spread
from rlhf.models import transformer

# An axis's exponent is at most this.
BARS = {"batch": 1.05, "vocabulary": 1.05, "group size": 1.05, "layers": 1.05, "length": 2.0}
# Fields of a size that an axis multiplies.
FIELDS = {
    "sft": {
        "batch": "rows",
        "length": "length",
        "vocabulary": "vocabulary",
        "layers": "layers",
    },
    "grpo": {
        "batch": "prompts",
        "group size": "samples",
        "length": "new",
        "vocabulary": "vocabulary",
        "layers": "layers",
    },
}
# Of every axis the smallest size; each next one is twice as large.
SMALLEST = {
    "full": Size(
        hidden=128,
        layers=2,
        heads=2,
        kv_heads=1,
        mlp=512,
        vocabulary=2048,
        rows=8,
        length=128,
        prompts=4,
        prompt=16,
        samples=4,
        new=32,
    ),
    "tiny": jobs.SIZES["tiny"],
}
NUMBER = {"full": 5, "tiny": 3}


def sizes(name: str, job: str, axis: str) -> list[tuple[int, Size]]:
    """An axis's numbers, with the sizes that have them."""
    smallest = SMALLEST[name]
    field = FIELDS[job][axis]
    numbers = [getattr(smallest, field) * 2**i for i in range(NUMBER[name])]
    return [(number, smallest._replace(**{field: number})) for number in numbers]


def axes(only: str | None) -> list[tuple[str, str]]:
    """Jobs with their axes.

    Args:
      only: one job; None: all.
    """
    return [(job, axis) for job in FIELDS for axis in FIELDS[job] if only in (None, job)]


def measure_axis(name: str, job: str, axis: str, steps: int) -> dict[str, Any]:
    """Steps of all sizes in turns, so that a machine that slows down does so for all."""
    points = sizes(name, job, axis)
    of_sizes = [prepared(job, size) for _, size in points]
    programs = [ours.compiled(one) for one in of_sizes]
    states = [one.state for one in of_sizes]
    seconds: list[list[float]] = [[] for _ in points]
    for turn in range(1 + steps):
        for i, program in enumerate(programs):
            time.sleep(REST / 10)
            started = time.perf_counter()
            states[i], _ = jax.block_until_ready(program(states[i], of_sizes[i].batch))
            # The first turn is warm-up.
            if turn:
                seconds[i].append(time.perf_counter() - started)
    numbers = [number for number, _ in points]
    medians = [spread(times)["median"] for times in seconds]
    row = {
        "job": job,
        "axis": axis,
        "sizes": numbers,
        "seconds": medians,
        "exponent": exponent(numbers, medians),
        "bar": BARS[axis],
    }
    if axis == "length":
        # Rows are as long as prompt and completion.
        prompt = points[0][1].prompt if job == "grpo" else 0
        lengths = [number + prompt for number in numbers]
        flops = [machine.step_flops(one) for one in of_sizes]
        row["attention"] = attention_share(lengths, flops)
    return row


def prepared(job: str, size: Size) -> ours.Job:
    lm = transformer(jobs.config(size))
    one = ours.make(job, size, lm, lm.init(jax.random.key(0)), jobs.rows(size)[job])
    return one._replace(batch=jax.device_put(one.batch))


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """The slope of log time over log size, by least squares.

    >>> round(exponent([1, 2, 4], [3, 6, 12]), 6), round(exponent([1, 2, 4], [3, 12, 48]), 6)
    (1.0, 2.0)
    """
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def attention_share(lengths: Sequence[float], flops: Sequence[float]) -> float:
    """Of the operations at the longest length those that grow with its square, since operations are
    `a length + b length²`.
    """
    b, a = np.polyfit(lengths, np.divide(flops, lengths), 1)
    return float(b * lengths[-1] / (a + b * lengths[-1]))


def is_held(row: Mapping[str, Any]) -> bool:
    return row["exponent"] <= BARS[row["axis"]]
