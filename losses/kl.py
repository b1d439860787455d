"""Per-token estimates of KL(π ‖ π_ref) from the log-probs of sampled tokens  (Schulman, "Approximating KL divergence", 2020).

An estimator whose *value* is right need not have the right *gradient*: inside a loss, `k1` has expected gradient 0 on policy,
`k2` has that of the reverse KL, `k3` that of another divergence.  In a reward none of them is differentiated.
"""

import jax.numpy as jnp

from rlhf.losses._common import Array, bounded_difference, check_shapes


def k1(logprobs, ref_logprobs, mask) -> Array:
    """The log-ratio, `log π - log π_ref`: unbiased, high variance, may be negative.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      ref_logprobs: `[..., T]` the same tokens under the reference.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]` nats, within ±20; exactly 0 (value and gradient) where `mask` is False.
    Gradients flow through both log-probs.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> k1(jnp.array([-1., -2.]), jnp.array([-2., -2.]), jnp.array([True, True])).tolist()
    [1.0, 0.0]
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    return bounded_difference(logprobs, ref_logprobs, mask)


def k2(logprobs, ref_logprobs, mask) -> Array:
    """Half the squared log-ratio, `(log π - log π_ref)² / 2`: biased, and on policy its gradient is the reverse KL's.

    Args, gradients and errors as `k1`.

    Returns: `[..., T]` nats, at least 0.

    >>> k2(jnp.array([-1., -2.]), jnp.array([-2., -2.]), jnp.array([True, True])).tolist()
    [0.5, 0.0]
    """
    return k1(logprobs, ref_logprobs, mask) ** 2 / 2


def k3(logprobs, ref_logprobs, mask) -> Array:
    """`π_ref/π - 1 - log(π_ref/π)`: unbiased, at least 0, low variance  (GRPO, arXiv:2402.03300, eq. 4).

    Args, gradients and errors as `k1`.

    Returns: `[..., T]` nats, at least 0.

    >>> k3(jnp.array([-1., -2.]), jnp.array([-1., -2.]), jnp.array([True, True])).tolist()
    [0.0, 0.0]
    """
    difference = -k1(logprobs, ref_logprobs, mask)
    return jnp.expm1(difference) - difference
