"""What the machine can do, and what our step does of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.speed.jobs import Size
from benchmarks.speed.ours import Job
from benchmarks.speed.turns import spread
from rlhf.planning.flops import counted
from rlhf.training.chips import CHIPS, PEAKS


class Product(NamedTuple):
    """Activations `[rows, inner]` times a weight `[inner, outer]`, several times a step."""

    rows: int
    inner: int
    outer: int
    times: int

    @property
    def flops(self) -> int:
        """Of the forward product and the two backward ones, all times."""
        return 3 * 2 * self.rows * self.inner * self.outer * self.times


def products(size: Size) -> list[Product]:
    """Of a step of SFT, with every weight of the model."""
    tokens = size.rows * size.length
    kv = size.hidden // size.heads * size.kv_heads
    return [
        Product(tokens, size.hidden, size.hidden, 2 * size.layers),
        Product(tokens, size.hidden, kv, 2 * size.layers),
        Product(tokens, size.hidden, size.mlp, 2 * size.layers),
        Product(tokens, size.mlp, size.hidden, size.layers),
        Product(tokens, size.hidden, size.vocabulary, 1),
    ]


def forward(x, weight, cotangent):
    return x @ weight


def to_activations(x, weight, cotangent):
    return cotangent @ weight.T


def to_weight(x, weight, cotangent):
    return x.T @ cotangent


def matrix_rate(size: Size, repeats: int) -> dict[str, float]:
    """FLOP/s of the step's products, one by one: forward, and for both gradients."""
    programs = [
        (product, jax.jit(fn))
        for product in products(size)
        for fn in (forward, to_activations, to_weight)
    ]
    total = sum(product.flops for product in products(size))
    seconds = [0.0] * repeats
    for product, program in programs:
        arrays = operands(product)
        jax.block_until_ready(program(*arrays))
        for i in range(repeats):
            seconds[i] += product.times * timed(program, *arrays)
    return {"flops": float(total), **spread([total / s for s in seconds])}


def operands(product: Product) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_key, weight_key, cotangent_key = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(x_key, (product.rows, product.inner))
    weight = jax.random.normal(weight_key, (product.inner, product.outer))
    cotangent = jax.random.normal(cotangent_key, (product.rows, product.outer))
    return x, weight, cotangent


def timed(fn: Callable, *args: Any) -> float:
    started = time.perf_counter()
    jax.block_until_ready(fn(*args))
    return time.perf_counter() - started


def step_flops(job: Job) -> float:
    """Of a step's matrix products, recomputed ones too; loops of decoding are left out."""
    return counted(jax.make_jaxpr(job.step)(job.state, job.batch)).work.flops


def model_flops(size: Size) -> float:
    """Of a step of SFT without what is computed again: every weight's products, and of attention the
    half below the diagonal.
    """
    attention = 3 * 2 * 2 * size.rows * size.length**2 * size.hidden * size.layers / 2
    return sum(product.flops for product in products(size)) + attention


def decode_bytes(size: Size) -> float:
    """That decoding must read: at every token all weights, and the keys and values so far."""
    kv = size.hidden // size.heads * size.kv_heads
    of_layer = 2 * size.hidden * (size.hidden + kv) + 3 * size.hidden * size.mlp
    weights = size.layers * of_layer + size.vocabulary * size.hidden
    columns = size.prompt + size.new / 2
    cache = 2 * size.decode_rows * columns * kv * size.layers
    return jnp.float32.dtype.itemsize * size.new * (weights + cache)


def peaks() -> dict[str, float]:
    """Of the accelerator, where its kind is known: FLOP/s in bfloat16, and bytes a second."""
    if jax.default_backend() == "cpu":
        return {}
    kind = jax.devices()[0].device_kind
    found = {}
    peak = next((peak for name, peak in PEAKS.items() if kind.startswith(name)), None)
    if peak:
        found["flops"] = peak
    chip = next((chip for name, chip in CHIPS.items() if name in kind.lower().split()), None)
    if chip:
        found["memory_rate"] = chip.memory_rate
    return found


def busy_share(seconds: float = 1.0) -> float:
    """Of the processor, what is in use while this process rests."""
    before = processor_times()
    time.sleep(seconds)
    after = processor_times()
    total, idle = (b - a for a, b in zip(before, after, strict=True))
    return 1 - idle / total


def processor_times() -> tuple[int, int]:
    """Since the start of the machine: of everything, and of being idle or waiting for files."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    times = [int(field) for field in fields]
    return sum(times[:8]), times[3] + times[4]


def measure(size: Size, job: Job, repeats: int) -> dict[str, Any]:
    """The row of the results about the machine.

    Args:
      job: of SFT, at this size.
    """
    return {
        "rate": matrix_rate(size, repeats),
        "step_flops": step_flops(job),
        "model_flops": model_flops(size),
        "decode_bytes": decode_bytes(size),
        "peaks": peaks(),
    }
