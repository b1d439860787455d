"""Surrogates that hold the entropy up by treating the few tokens of large covariance apart, per
token  (arXiv:2505.22617).
"""

import jax
import jax.numpy as jnp

from rlhf.losses import kl, masks
from rlhf.losses._common import Array, check_shapes, clean, constant
from rlhf.losses.policy import clipped_surrogate
from rlhf.losses.ratios import token_log_ratio


def covariance(logprobs, advantages, mask) -> Array:
    """Couples rows: `(A - mean A) (log π - mean log π)` over the mini-batch's trained tokens: what
    lowers entropy
    (arXiv:2505.22617).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]`, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> covariance(jnp.array([-1., -3.]), jnp.array([1., -1.]), jnp.array([True, True])).tolist()
    [1.0, 1.0]
    """
    check_shapes(logprobs=logprobs, advantages=advantages, mask=mask)
    number = jnp.maximum(mask.sum(), 1)
    centered = lambda x: clean(constant(x, mask) - constant(x, mask).sum() / number, mask)
    return centered(advantages) * centered(logprobs)


def clip_cov(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    key,
    share=2e-4,
    cov_low=1.0,
    cov_high=5.0,
    clip_low=0.2,
    clip_high=0.2,
) -> Array:
    """Couples rows: `policy.clipped_surrogate` without a few random tokens of high covariance
    (Clip-Cov, arXiv:2505.22617).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the ratio, in (0, 1).
      key: consumed; it chooses the tokens.
      share: how many are dropped, of all trained tokens, rounded down, and at least one.
      cov_low, cov_high: only tokens of a `covariance` between these, which PPO has not clipped, are
        dropped.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.  Gradients flow
    through `logprobs`.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.9, 0.01])), jnp.array([True, True])
    >>> clip_cov(lp, lp, jnp.array([1., -1.]), mask, key=jax.random.key(0)).tolist()  # one of the two is dropped
    [-1.0, 0.0]
    """
    loss = clipped_surrogate(
        logprobs, old_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high
    )
    # PPO's loss is above -r A exactly where its clip is active.
    clipped = loss > 0.0 - jnp.exp(token_log_ratio(logprobs, old_logprobs, mask)) * advantages
    cov = covariance(logprobs, advantages, mask)
    band = mask & ~clipped & (cov > cov_low) & (cov < cov_high)
    # A random number a token and the largest ones of the band: a choice without replacement whose
    # size may be traced, which `random.choice` does not allow.
    order = jax.random.uniform(key, jnp.shape(mask), jnp.float32)
    return clean(loss, mask & ~masks.top(order, band, number=_number(share, mask)))


def kl_cov(logprobs, old_logprobs, advantages, mask, *, share=2e-4, kl_coef=1.0) -> Array:
    """Couples rows: `-r A + β |log r|`, the penalty on the tokens of largest covariance alone
    (KL-Cov, arXiv:2505.22617).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      share: how many tokens pay, of all trained tokens, rounded down, and at least one.
      kl_coef: β.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.  Gradients flow
    through `logprobs`.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.5, 0.5])), jnp.array([True, True])
    >>> kl_cov(lp, lp - 1.0, jnp.array([1., -1.]), mask).tolist()
    [-1.718, 2.718]
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    ratio = jnp.exp(token_log_ratio(logprobs, old_logprobs, mask))
    advantages = constant(advantages, mask)
    pays = masks.top(covariance(logprobs, advantages, mask), mask, number=_number(share, mask))
    # The old side is constant: the penalty pulls on the policy alone.
    penalty = kl.absolute(logprobs, constant(old_logprobs, mask), mask)
    return kl_coef * clean(penalty, pays) - ratio * advantages


def _number(share, mask) -> Array:
    # Rounded down and at least 1, as verl counts them.
    return jnp.maximum(jnp.floor(share * mask.sum()), 1)
