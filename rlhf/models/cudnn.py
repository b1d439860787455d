"""cuDNN's fused attention, told the lengths of rows.  Imported where it is used only.

Tested with XLA's form of the same call, and compiled ahead of time for H200; not run on a GPU yet.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from rlhf.models.flash import Options, flash

Array = jax.Array


def by_lengths_or_tiles(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segment_ids: Array,
    kv_positions: Array,
    kv_segment_ids: Array,
    options: Options,
) -> Array:
    """`by_lengths` where each row holds one sequence at most, else `flash`: as the values are when
    the program runs.

    Args: as of `flash`; the queries are those of the keys' last columns.

    Returns: `[B, N, T, H]` in the dtype of q.
    """
    before = jnp.pad(kv_segment_ids[:, :-1], ((0, 0), (1, 0)))
    starts = (kv_segment_ids != 0) & (kv_segment_ids != before)
    has_one = jnp.all(jnp.sum(starts, axis=1) <= 1)

    def with_lengths(q, k, v):
        return by_lengths(q, k, v, kv_segment_ids, scale=options.scale)

    def with_tiles(q, k, v):
        return flash(q, k, v, positions, segment_ids, kv_positions, kv_segment_ids, options)

    return jax.lax.cond(has_one, with_lengths, with_tiles, q, k, v)


def by_lengths(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    *,
    scale: float,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> Array:
    """Causal attention of rows that hold one sequence, by its length: padding on the left is moved to
    the right.

    Args:
      q: `[B, N, T, H]`, of the last T of S columns.  k, v: `[B, K, S, H]`.
      segment_ids: `[B, S]` int32; those that are not 0 lie side by side and are equal.
      scale: on the scores.
      implementation: of `jax.nn.dot_product_attention`; "xla" for tests.

    Returns: `[B, N, T, H]` in the dtype of q, 0 at padding.
    """
    real = segment_ids != 0
    start = jnp.argmax(real, axis=1)
    # Of rows that are all padding the first column, so that no softmax is empty.
    lengths = jnp.maximum(jnp.sum(real, axis=1, dtype=jnp.int32), 1)
    # A causal kernel counts queries and keys from the same column.
    before = k.shape[2] - q.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (before, 0), (0, 0)))

    def moved(x):
        # What a kernel leaves at padding, of results and of gradients, goes no further.
        x = jnp.where(real[:, None, :, None], x, 0)
        return _rolled(jnp.swapaxes(x, 1, 2), start)

    out = jax.nn.dot_product_attention(
        moved(q),
        moved(k),
        moved(v),
        scale=scale,
        is_causal=True,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        implementation=implementation,
    )
    out = jnp.swapaxes(_rolled(out, -start), 1, 2)
    return jnp.where(real[:, None, :, None], out, 0)[:, :, before:]


@jax.custom_vjp
def _rolled(x, shift):
    """Rows `[B, T, ...]`, each moved to the left by a number of its own, around the end."""
    columns = (jnp.arange(x.shape[1])[None] + shift[:, None]) % x.shape[1]
    return jnp.take_along_axis(x, columns.reshape(*columns.shape, *[1] * (x.ndim - 2)), axis=1)


def _rolled_forward(x, shift):
    return _rolled(x, shift), shift


def _rolled_backward(shift, d_out):
    # The gradient of a gather would be a scatter, with atomic sums.
    return _rolled(d_out, -shift), None


_rolled.defvjp(_rolled_forward, _rolled_backward)
