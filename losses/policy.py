"""Policy-gradient surrogates, per token."""

import jax.numpy as jnp

from rlhf.losses._common import Array, bounded_difference, check_clip, check_shapes, constant


def log_ratio(logprobs, old_logprobs, mask) -> Array:
    """`log π - log π_old`, in nats, within ±20.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens; the only argument gradients flow through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]`, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> log_ratio(jnp.array([-1., -50.]), jnp.array([-2., -1.]), jnp.array([True, True])).tolist()
    [1.0, -20.0]
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    return bounded_difference(logprobs, constant(old_logprobs, mask), mask)


def clipped_surrogate(logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, clip_high=0.2) -> Array:
    """PPO's loss, `-min(r A, clip(r, 1 - ε_low, 1 + ε_high) A)` with `r = π / π_old`  (arXiv:1707.06347, eq. 7).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on r (PPO: 0.2 and 0.2; DAPO: 0.2 and 0.28).

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or an ε outside (0, 1) below and (0, ∞) above, TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.5, 0.5])), jnp.array([True, True])
    >>> clipped_surrogate(lp, jnp.log(jnp.array([0.25, 0.5])), jnp.array([1., 1.]), mask).tolist()
    [-1.2, -1.0]
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    check_clip(clip_low, clip_high)
    advantages = constant(advantages, mask)
    ratio = jnp.exp(log_ratio(logprobs, old_logprobs, mask))
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    return jnp.where(mask, -jnp.minimum(ratio * advantages, clipped * advantages), 0.0)
