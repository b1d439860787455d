"""Checks and small helpers that every objective shares."""

import jax
import jax.numpy as jnp

Array = jax.Array
MAX_LOG_RATIO = 20.0  # nats; exp(20) = 4.9e8, far beyond any trust region and far from overflow
# Arrays that an objective can do without.
OPTIONAL = ("segment_ids", "margin", "entropy", "log_importance")


def check_shapes(**arrays) -> None:
    """Raises unless all arrays have the shape of the last one named; of those that are `OPTIONAL`
    `None` is skipped.

    A `mask`, where there is one, must also be boolean.
    """
    given = {name: x for name, x in arrays.items() if x is not None or name not in OPTIONAL}
    # A field of a batch that nobody has set is None.
    if missing := [name for name, x in given.items() if x is None]:
        raise ValueError(
            f"{missing[0]} is None; give an array, or set it in the batch: "
            f"batch._replace({missing[0]}=...)"
        )
    # Keyword arguments keep their order: the caller chooses the reference by naming it last.
    reference = list(given)[-1]
    expected = jnp.shape(given[reference])
    for name, x in given.items():
        if jnp.shape(x) != expected:
            raise ValueError(f"{name} {list(jnp.shape(x))} but {reference} {list(expected)}")
    if "mask" in given and jnp.result_type(given["mask"]) != jnp.bool_:
        raise TypeError(
            f"mask must be bool, True on trained tokens, but is {jnp.result_type(given['mask'])}"
        )
    if "segment_ids" in given and not jnp.issubdtype(
        jnp.result_type(given["segment_ids"]), jnp.integer
    ):
        raise TypeError(
            "segment_ids must be integers, 0 = padding, but are "
            f"{jnp.result_type(given['segment_ids'])}"
        )


def check_positive(**values) -> None:
    """Raises where a Python number is not above 0, or not finite; traced values are trusted."""
    for name, value in values.items():
        # Traced values cannot be compared in Python; those that trace know what they give.
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be above 0, but is {value}")


def check_clip(clip_low, clip_high) -> None:
    """Raises unless the given ones are half-widths, in (0, 1); traced values and None are trusted."""
    for name, value, bound, cure in (
        ("clip_low", clip_low, "r >= 1 - clip_low", "1 - b"),
        ("clip_high", clip_high, "r <= 1 + clip_high", "b - 1"),
    ):
        if isinstance(value, int | float) and not 0 < value < 1:
            raise ValueError(
                f"{name} is a half-width, {bound}, so 0 < {name} < 1, but it is {value}; for an "
                f"absolute bound b give {cure}"
            )


def widen(x) -> Array:
    """`x` in at least float32: integers and half precision are promoted, float64 stays."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def clean(x, mask) -> Array:
    """`x` in at least float32, with 0 where `mask` is False, so that NaN and inf there reach
    neither value nor gradient.
    """
    # A product with the mask would not do: 0 · NaN is NaN, in the value and in the gradient.
    return jnp.where(mask, widen(x), 0.0)


def constant(x, mask) -> Array:
    """`clean`, and no gradient flows through it."""
    return jax.lax.stop_gradient(clean(x, mask))


def rounding(x, axis=None) -> Array:
    """What numbers as large as the largest of `x` may differ by without meaning it: 4 units of
    rounding of its dtype.
    """
    x = widen(x)
    return 4 * jnp.finfo(x.dtype).eps * jnp.abs(x).max(axis, keepdims=axis is not None, initial=0.0)


def centered(values, mask) -> tuple[Array, Array]:
    """`x - mean x` and `mean x` over what is True in `mask`; exactly 0 where all are equal but for
    rounding.

    The smallest is taken off first: differences of nearly equal numbers are exact, those to their
    rounded mean are not.
    """
    values = clean(values, mask)
    # `initial` is for arrays without entries, which have no minimum.
    smallest = jnp.where(mask, values, jnp.inf).min(initial=jnp.finfo(values.dtype).max)
    above = clean(values - smallest, mask)
    # A spread that is rounding alone becomes 0; whitening would blow it up to a deviation of 1.
    above = jnp.where(above.max(initial=0.0) > rounding(values), above, 0.0)
    mean = above.sum() / jnp.maximum(mask.sum(), 1)
    return clean(above - mean, mask), jnp.where(mask.any(), smallest, 0.0) + mean


def pick(x, index) -> Array:
    """`take_along_axis` of the last axis; NaN, and of integers the least, for an index that is
    negative or too large.
    """
    return jnp.take_along_axis(
        x, jnp.where(index < 0, jnp.shape(x)[-1], index), axis=-1, mode="fill"
    )


def quantile(values, mask, share) -> Array:
    """The `share`-quantile along the last axis of what is True in `mask`, interpolated linearly.
    `[..., N]` -> `[..., 1]`.
    """
    # What is not in the mask goes to the end as infinity, and beyond `last`.
    ordered = jnp.sort(jnp.where(mask, values, jnp.inf), axis=-1)
    last = jnp.maximum(mask.sum(-1, keepdims=True) - 1, 0)
    place = share * last
    below = jnp.floor(place).astype(last.dtype)
    low, high = (
        jnp.take_along_axis(ordered, i, axis=-1) for i in (below, jnp.minimum(below + 1, last))
    )
    return low + (place - below) * (high - low)


def bounded_difference(x, y, mask) -> Array:
    """`x - y` within ±`MAX_LOG_RATIO` where `mask` is True, 0 elsewhere."""
    # Both sides are cleaned first: infinity minus infinity at padding would be NaN.
    return jnp.clip(clean(x, mask) - clean(y, mask), -MAX_LOG_RATIO, MAX_LOG_RATIO)
