"""Running moments: mean and variance of all numbers so far, as a pair of pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.losses._common import Array, centered, check_shapes, constant, rounding


@documented
class MomentsState(NamedTuple):
    """The moments so far; all arrays, so that a change never retraces.

    Attributes:
      number: [] float32, how many numbers were counted.
      mean: [] float32, their mean, 0 before the first.
      variance: [] float32, with Bessel's correction, 1 before the second.
    """

    number: Array
    mean: Array
    variance: Array


@documented
class Moments(NamedTuple):
    """`init() -> state`, `update(state, values, mask) -> state`, and
    `scale(state, values) -> (x - mean) / √(var + eps)`.

    Attributes:
      init: () -> state.
      update: (state, values, mask) -> state.
      scale: (state, values) -> scaled values.
    """

    init: Callable[[], MomentsState]
    update: Callable[..., MomentsState]
    scale: Callable[..., Array]


def running() -> Moments:
    """Couples rows: mean and variance of all numbers so far, merged batch by batch  (Chan et al.
    1979; trlX, TRL's classic PPO).

    `update(state, values, mask=None)` takes numbers of any shape and counts those that are finite
    where `mask` is True.  Call it once per optimizer mini-batch.  `scale(state, values, eps=1e-8)`
    is exactly 0 where a number and the mean are equal but for rounding; NaN stays.  No gradient.

    >>> moments = running()
    >>> state = moments.update(moments.init(), jnp.array([1., 2., 3.]))
    >>> state.number.item(), state.mean.item(), state.variance.item()
    (3.0, 2.0, 1.0)
    """
    return Moments(_init, _update, _scale)


def _init() -> MomentsState:
    # A variance of 1 until there are two numbers: scaling then leaves their unit alone.
    return MomentsState(number=jnp.zeros(()), mean=jnp.zeros(()), variance=jnp.ones(()))


def _update(state: MomentsState, values, mask=None) -> MomentsState:
    mask = jnp.ones(jnp.shape(values), bool) if mask is None else mask
    check_shapes(values=values, mask=mask)
    finite = mask & jnp.isfinite(values)
    values = constant(values, finite)
    new = finite.sum()
    deviations, mean = centered(values, finite)
    shift = mean - state.mean
    number = state.number + new
    squares = jnp.sum(deviations**2) + state.variance * jnp.maximum(state.number - 1, 0)
    # What the two means differ by adds to the squares around the common mean.
    squares += shift**2 * state.number * new / jnp.maximum(number, 1)
    merged = MomentsState(
        number=number,
        mean=state.mean + shift * new / jnp.maximum(number, 1),
        variance=jnp.where(number > 1, squares / jnp.maximum(number - 1, 1), 1.0),
    )
    return jax.tree.map(
        lambda now, before: now.astype(jnp.result_type(before, values)), merged, state
    )


def _scale(state: MomentsState, values, *, eps=1e-8) -> Array:
    deviations = constant(values - state.mean, True)
    # The mean is rounded: a number that equals it up to that has no deviation.
    deviations = jnp.where(jnp.abs(deviations) <= rounding(state.mean), 0.0, deviations)
    return deviations * jax.lax.rsqrt(state.variance + eps)
