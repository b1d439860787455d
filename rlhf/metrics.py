"""Metrics as sums and maxima: they add up over micro-batches, and ratios are made once a step."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented


@documented
class Ratio(NamedTuple):
    """`total / count`, both summed first.

    Attributes:
      total: [] float32.
      count: [] float32.
    """

    total: Any
    count: Any


@documented
class Max(NamedTuple):
    """The largest of all values.

    Attributes:
      value: [] float32.
    """

    value: Any


def _is_metric(x) -> bool:
    return isinstance(x, Ratio | Max)


def reduce(stacked: Any) -> Any:
    """One set of metrics from a stack of them along axis 0: sums, and the maximum of a `Max`."""

    # A `Ratio` is summed on both sides: divided first, micro-batches of few tokens would count too
    # much.
    def one(m):
        if isinstance(m, Max):
            return Max(m.value.max(0))
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), m)

    return jax.tree.map(one, stacked, is_leaf=_is_metric)


def result(metrics: Any) -> Any:
    """Plain numbers: a `Ratio` is divided (0 where it counted nothing), a `Max` opened.

    >>> result({"kl": Ratio(jnp.float32(6), jnp.float32(3)), "loss": jnp.float32(1)})["kl"].item()
    2.0
    """

    def one(m):
        if isinstance(m, Max):
            return m.value
        if isinstance(m, Ratio):
            # The divisor is guarded as well: `where` computes both branches, and 0 / 0 would be NaN
            # in a gradient and trip JAX's NaN checks.
            return jnp.where(m.count == 0, 0.0, m.total / jnp.where(m.count == 0, 1.0, m.count))
        return m

    return jax.tree.map(one, metrics, is_leaf=_is_metric)
