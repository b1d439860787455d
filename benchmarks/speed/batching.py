"""Continuous batching: `generate_many` beside `generate` on one fixed batch after another."""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.speed import jobs
from benchmarks.speed.jobs import Size
from benchmarks.speed.turns import REST, ratios, spread
from rlhf import rollouts
from rlhf.models import transformer


class Load(NamedTuple):
    """Prompts whose completions end with probability `1 / mean` a token, at most after `limit`."""

    prompts: int = 512
    slots: int = 64
    mean: int = 32
    limit: int = 128


LOADS = {"full": Load(), "tiny": Load(prompts=8, slots=4, mean=2, limit=8)}


def measure(size: Size, load: Load, repeats: int) -> list[dict[str, Any]]:
    """Rows of the results: tokens a second of both, in turns."""
    sides = programs(size, load)
    tokens = {name: sum(int(part.mask.sum()) for part in fn()) for name, fn in sides.items()}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, fn in sides.items():
            seconds[name].append(timed(fn))
    return [
        {
            "way": name,
            "tokens": tokens[name],
            "tokens_per_second": spread([tokens[name] / s for s in seconds[name]]),
            "ratio": ratios(seconds[name], seconds["fixed batches"]),
        }
        for name in sides
    ]


def programs(size: Size, load: Load) -> dict[str, Callable[[], list[rollouts.Rollout]]]:
    lm = transformer(jobs.config(size))
    params = lm.init(jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (load.prompts, size.prompt), 0, size.vocabulary)
    prompts = rollouts.Prompts(tokens, jnp.ones(tokens.shape, bool))
    keys = jax.random.split(jax.random.key(0), load.prompts)
    settings: dict[str, Any] = dict(
        max_new_tokens=load.limit, sampler=rollouts.sampler(ends(load.mean)), eos_ids=(0,)
    )

    def slots() -> list[rollouts.Rollout]:
        many = rollouts.generate_many(lm, params, prompts, keys, slots=load.slots, **settings)
        return [many]

    def one_batch(part: slice) -> rollouts.Rollout:
        rows = jax.tree.map(lambda x: x[part], prompts)
        return rollouts.generate(lm, params, rows, keys[part], **settings)

    def fixed() -> list[rollouts.Rollout]:
        firsts = range(0, load.prompts, load.slots)
        return [one_batch(slice(first, first + load.slots)) for first in firsts]

    return {f"{load.slots} slots": slots, "fixed batches": fixed}


def ends(mean: int) -> Callable:
    """A sampler's transform: token 0, the end, with probability `1 / mean`."""

    def transform(logits, step):
        others = jax.nn.logsumexp(logits[:, 1:], axis=-1)
        return logits.at[:, 0].set(others - math.log(mean - 1))

    return transform


def timed(fn: Callable) -> float:
    time.sleep(REST)
    started = time.perf_counter()
    jax.block_until_ready(fn())
    return time.perf_counter() - started
