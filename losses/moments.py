"""Running moments: mean and variance over everything seen, as a pair of pure functions."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_shapes, constant


class MomentsState(NamedTuple):
    """What has been seen so far; all arrays, so that a change never retraces."""

    count: Array  # [] float32, numbers seen
    mean: Array  # [] float32, their mean, 0 before the first
    variance: Array  # [] float32, with Bessel's correction, 1 before the second


class Moments(NamedTuple):
    """`init() -> state` and `update(state, values, mask) -> state`."""

    init: Callable[[], MomentsState]
    update: Callable[..., MomentsState]


def running() -> Moments:
    """Couples rows: mean and variance of all numbers seen, merged batch by batch  (Chan et al. 1979; trlX, TRL's classic PPO).

    `update(state, values, mask=None)` takes numbers of any shape and counts those that are finite where `mask` is True.
    Call it once per optimizer mini-batch.  No gradient.

    >>> moments = running()
    >>> state = moments.update(moments.init(), jnp.array([1., 2., 3.]))
    >>> state.count.item(), state.mean.item(), state.variance.item()
    (3.0, 2.0, 1.0)
    """
    return Moments(_init, _update)


def _init() -> MomentsState:
    return MomentsState(count=jnp.zeros(()), mean=jnp.zeros(()), variance=jnp.ones(()))


def _update(state: MomentsState, values, mask=None) -> MomentsState:
    mask = jnp.ones(jnp.shape(values), bool) if mask is None else mask
    check_shapes(values=values, mask=mask)
    seen = mask & jnp.isfinite(values)
    values = constant(values, seen)
    number = seen.sum()
    mean = values.sum() / jnp.maximum(number, 1)
    shift = mean - state.mean
    count = state.count + number
    squares = jnp.sum(jnp.where(seen, values - mean, 0.0) ** 2) + state.variance * jnp.maximum(state.count - 1, 0)
    squares += shift**2 * state.count * number / jnp.maximum(count, 1)
    merged = MomentsState(
        count=count,
        mean=state.mean + shift * number / jnp.maximum(count, 1),
        variance=jnp.where(count > 1, squares / jnp.maximum(count - 1, 1), 1.0),
    )
    return jax.tree.map(lambda new, old: new.astype(jnp.result_type(old, values)), merged, state)
