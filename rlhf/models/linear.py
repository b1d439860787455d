"""The one place where a weight meets an activation."""

from typing import Any

import jax

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
