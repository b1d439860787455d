"""Scores of a log-ratio, f'(π/ref), that take its place in DPO: another divergence keeps the policy
near the reference.

Given to the objectives of `preference` as `divergence=`.  Exponents end at 20 nats, and so do
gradients.
"""

import jax
import jax.numpy as jnp

from rlhf.losses._common import MAX_LOG_RATIO, Array, widen


def reverse_kl(log_ratio) -> Array:
    """`x`, the log-ratio itself, of `KL(π | ref)`: DPO as it was published  (f-DPO,
    arXiv:2309.16240, table 1).

    Args:
      log_ratio: `[...]` x = log π/ref of a completion, in nats; gradients flow through it.

    Returns: `[...]` score, in at least float32.

    >>> reverse_kl(jnp.array([0.5])).tolist()
    [0.5]
    """
    return widen(log_ratio)


def forward_kl(log_ratio) -> Array:
    """`1 - exp(-x)`, of `KL(ref | π)`  (f-DPO, arXiv:2309.16240, table 1).

    Args:
      log_ratio: `[...]` x = log π/ref of a completion, in nats; gradients flow through it.

    Returns: `[...]` score, in at least float32.

    >>> forward_kl(jnp.array([0.5])).tolist()
    [0.393]
    """
    # The exponent is bounded before it is raised: an overflow would be one of the gradient too.
    return 0.0 - jnp.expm1(jnp.minimum(-widen(log_ratio), MAX_LOG_RATIO))


def js(log_ratio) -> Array:
    """`log 2 + log σ(x)`, of the Jensen-Shannon divergence  (f-DPO, arXiv:2309.16240, table 1).

    Args:
      log_ratio: `[...]` x = log π/ref of a completion, in nats; gradients flow through it.

    Returns: `[...]` score, in at least float32.

    >>> js(jnp.array([0.0, 0.5])).tolist()
    [0.0, 0.219]
    """
    return jnp.log(2.0) + jax.nn.log_sigmoid(widen(log_ratio))


def alpha(log_ratio, *, alpha=0.5) -> Array:
    """`(exp((α - 1) x) - 1) / (α - 1)`, of the α-divergence; its limit at α = 1 is x  (f-DPO,
    arXiv:2309.16240, table 1).

    Args:
      log_ratio: `[...]` x = log π/ref of a completion, in nats; gradients flow through it.
      alpha: TRL's α, 1 minus the paper's: 1 is `reverse_kl`, 0 `forward_kl`.  Bind it by
        `functools.partial`.

    Returns: `[...]` score, in at least float32.

    >>> alpha(jnp.array([0.5])).tolist(), alpha(jnp.array([0.5]), alpha=1.0).tolist()
    ([0.442], [0.5])
    """
    x = widen(log_ratio)
    power = jnp.asarray(alpha, x.dtype) - 1.0
    # At α = 1 the division by 0 would reach the gradient, even where `jnp.where` drops its value.
    nonzero = jnp.where(power == 0, 1.0, power)
    return jnp.where(power == 0, x, jnp.expm1(jnp.minimum(nonzero * x, MAX_LOG_RATIO)) / nonzero)
