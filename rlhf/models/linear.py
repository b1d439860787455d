"""The one place where a weight meets an activation, or a number that looks up one of its rows."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf.sharding import ways

Array = jax.Array


def linear(x: Array, weight: Any, bias: Array | None = None, *, wide: bool = False) -> Array:
    """`x W + b` in the dtype of `x`; the gradient of `W` in its own, as sums over devices need.

    Args:
      x: `[..., in]`.
      weight: `[in, out]`, or an object with `matmul(x [..., in]) -> [..., out]` in its place: a matrix
        with an adapter, or one held in four bits.
      bias: `[out]`.
      wide: in at least float32 instead, sums and all, where the weight is a plain array.
    """
    # One plain matrix product: on CPU its backward pass takes half the time of a batched one.  Not
    # where devices share the columns: XLA would gather them, to put all rows' one after another.
    flat = x if ways("sequence") > 1 else x.reshape(-1, x.shape[-1])
    y = weight.matmul(flat) if hasattr(weight, "matmul") else _product(wide, flat, weight)
    y = y.reshape(*x.shape[:-1], -1)
    return y if bias is None else y + rows(bias, y)


def _product(wide: bool, x: Array, weight: Array) -> Array:
    if weight.dtype.itemsize > x.dtype.itemsize:
        return _of_master(wide, x, weight)
    product = partial(in_float32, jnp.matmul) if wide else jnp.matmul
    return product(x, weight.astype(x.dtype))


# A derivative of its own: that of `astype` would round each device's share of the gradient to 8
# bits before the devices add them up.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _of_master(wide, x, master):
    return jnp.matmul(
        x, master.astype(x.dtype), preferred_element_type=jnp.float32 if wide else None
    )


def _back_of_master(wide, operands, gradient):
    x, master = operands
    gradient = gradient.astype(x.dtype)
    of_x = jnp.matmul(gradient, master.astype(x.dtype).T)
    leading = tuple(range(x.ndim - 1))
    return of_x, jnp.tensordot(x, gradient, (leading, leading), preferred_element_type=master.dtype)


_of_master.defvjp(
    lambda wide, x, master: (_of_master(wide, x, master), (x, master)), _back_of_master
)


def in_float32(product: Callable, a: Array, b: Array) -> Array:
    """`product(a, b)` of two arrays in half precision, its sums in float32; what flows back is
    in half precision again.

    For numbers of which the small differences matter: scores of attention, logits.

    Args:
      product: such as `jnp.matmul`, with `preferred_element_type`; bilinear.

    >>> a, b = jnp.ones((1, 2), jnp.bfloat16), jnp.array([[256], [1]], jnp.bfloat16)
    >>> (a @ b).item(), in_float32(jnp.matmul, a, b).item()  # bfloat16 has no 257
    (256.0, 257.0)
    """
    # Arrays in float32 or above sum that wide anyway, and must not be narrowed to it.
    if a.dtype == b.dtype and a.dtype.itemsize < 4:
        return _in_float32(product, a, b)
    return product(a, b)


# A derivative of its own: that of a product with float32 sums would carry float32 gradients, twice
# the memory, through the whole backward pass.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_float32(product, a, b):
    return product(a, b, preferred_element_type=jnp.float32)


def _back(product, operands, gradient):
    return jax.vjp(product, *operands)[1](gradient.astype(operands[0].dtype))


_in_float32.defvjp(lambda product, a, b: (_in_float32(product, a, b), (a, b)), _back)


def rows(vector: Array, like: Array) -> Array:
    """`[D]` with the rank and dtype of `like [..., D]`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape).astype(like.dtype)


def look_up(table: Array, ids: Array) -> Array:
    """Rows of a table, `[N, D]`, `[...]` -> `[..., D]`; NaN for ids that are below 0 or not below
    N.

    A device cannot raise; and another row's vector in its place would be believed.

    >>> look_up(jnp.ones((2, 1)), jnp.array([1, 2, -1])).tolist()
    [[1.0], [nan], [nan]]
    """
    # `take` counts negative ids from the end, as NumPy does; beyond the end it fills.
    rows = jnp.where(ids < 0, table.shape[0], ids)
    return jnp.take(table, rows, axis=0, mode="fill", fill_value=jnp.nan)


def are_ids(ids: Array, number: int) -> Array:
    """Which of them are in 0 … number - 1."""
    return (ids >= 0) & (ids < number)


def or_zero(ids: Array, number: int, segment_ids: Array) -> Array:
    """Ids, 0 in place of what padding holds beyond their number: it is looked up too, but no
    token attends to it.

    >>> or_zero(jnp.array([[5, 9, 9]]), 8, jnp.array([[1, 1, 0]])).tolist()
    [[5, 9, 0]]
    """
    return jnp.where((segment_ids == 0) & ~are_ids(ids, number), 0, ids)
