"""Positions as a number added to every attention score: ALiBi and T5's learned distances."""

import math

import jax
import jax.numpy as jnp

Array = jax.Array


def alibi(heads: int, positions: Array, kv_positions: Array) -> Array:
    """`-slope_n (query - key)`, `[B, N, T, S]`  (ALiBi, arXiv:2108.12409, section 3).

    >>> alibi(2, jnp.array([[3]]), jnp.array([[1, 3]])).tolist()
    [[[[-0.125, 0.0]], [[-0.0078125, 0.0]]]]
    """
    distance = (positions[:, None, :, None] - kv_positions[:, None, None, :]).astype(jnp.float32)
    return -jnp.asarray(_slopes(heads), jnp.float32).reshape(1, heads, 1, 1) * distance


def _slopes(heads: int) -> list[float]:
    """`2 ** (-8 n / N)` for N a power of two; others take every second slope of twice as many heads
    for what is missing.
    """
    # As in the authors' code: the paper gives slopes for powers of two alone.
    power = 2 ** math.floor(math.log2(heads))

    def slopes(n):
        return [2 ** (-8 * i / n) for i in range(1, n + 1)]

    return slopes(power) + slopes(2 * power)[::2][: heads - power]


def relative(
    table: Array, positions: Array, kv_positions: Array, *, causal: bool, max_distance: int
) -> Array:
    """A learned score for each bucket of distances, `[B, N, T, S]`  (T5, arXiv:1910.10683, section
    2.1).

    Args:
      table: `[buckets, N]`; half of the buckets hold one distance each, the others grow up to
        `max_distance`.
      causal: False: half of the buckets are for keys after the query.
    """
    distance = positions[:, :, None] - kv_positions[:, None, :]  # [B, T, S], past is positive
    buckets = table.shape[0] if causal else table.shape[0] // 2
    first = jnp.zeros_like(distance) if causal else jnp.where(distance < 0, buckets, 0)
    distance = jnp.maximum(distance, 0) if causal else jnp.abs(distance)
    exact = buckets // 2
    # Distances from `exact` on share buckets that widen as the logarithm.  The maximum keeps the
    # logarithm of small distances finite; `where` takes the other branch for them.
    growing = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / math.log(
        max_distance / exact
    )
    grown = jnp.minimum(exact + (growing * (buckets - exact)).astype(distance.dtype), buckets - 1)
    bucket = first + jnp.where(distance < exact, distance, grown)
    return jnp.moveaxis(jnp.take(table, bucket, axis=0), -1, 1)
