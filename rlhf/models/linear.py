"""The one place where a weight meets an activation, or a number that looks up one of its rows."""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


def linear(x: Array, weight: Any, bias: Array | None = None) -> Array:
    """`x W + b` in the dtype of `x`.

    Args:
      x: `[..., in]`.
      weight: `[in, out]`, or an object with `matmul(x [N, in]) -> [N, out]` in its place: a matrix with an adapter, or one
        held in four bits.
      bias: `[out]`.
    """
    flat = x.reshape(-1, x.shape[-1])  # one plain matrix product: on CPU its backward pass takes half the time of a batched one
    y = weight.matmul(flat) if hasattr(weight, "matmul") else flat @ weight.astype(x.dtype)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + rows(bias, y)


def rows(vector: Array, like: Array) -> Array:
    """`[D]` with the rank and dtype of `like [..., D]`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape).astype(like.dtype)


def look_up(table: Array, ids: Array, number: int | None = None, offset: int = 0) -> Array:
    """Rows of a table, `[N, D]`, `[...]` -> `[..., D]`: row `id + offset`, NaN for ids that are below 0 or not below `number`.

    A device cannot raise; and another row's vector in its place would be believed.

    Args:
      number: of ids there are; None: all rows, N.

    >>> look_up(jnp.ones((2, 1)), jnp.array([1, 2, -1])).tolist()
    [[1.0], [nan], [nan]]
    """
    rows = jnp.where(are_ids(ids, table.shape[0] - offset if number is None else number), ids + offset, table.shape[0])
    return jnp.take(table, rows, axis=0, mode="fill", fill_value=jnp.nan)


def are_ids(ids: Array, number: int) -> Array:
    """Which of them are in 0 … number - 1."""
    return (ids >= 0) & (ids < number)


def or_zero(ids: Array, number: int, segment_ids: Array) -> Array:
    """Ids, 0 in place of what padding holds beyond their number: it is looked up too, and seen by nobody.

    >>> or_zero(jnp.array([[5, 9, 9]]), 8, jnp.array([[1, 1, 0]])).tolist()
    [[5, 9, 0]]
    """
    return jnp.where((segment_ids == 0) & ~are_ids(ids, number), 0, ids)
