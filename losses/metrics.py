"""What people read while a run goes on, as weighted sums: micro-batches add up to the mini-batch's
numbers.  No gradient.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf.losses._common import Array, check_clip, check_shapes, clean, constant, widen
from rlhf.losses.ratios import token_log_ratio
from rlhf.losses.weights import weighted_sum


def clipped_low(
    logprobs, old_logprobs, advantages, mask, *, clip_low=0.2, log_ratio: Callable = token_log_ratio
) -> Array:
    """`1[r < 1 - ε_low and A < 0]`: where the lower clip stops the gradient.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_low: ε_low, the half-width below 1, in (0, 1).
      log_ratio: what makes `log r` of `(logprobs, old_logprobs, mask)`, one of `ratios`.

    Returns: `[..., T]` float32, 0 where `mask` is False.

    Raises: ValueError on unequal shapes or an ε outside (0, 1), TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.1])), jnp.array([True])
    >>> clipped_low(lp, jnp.log(jnp.array([0.5])), jnp.array([-1.]), mask).tolist()
    [1.0]
    """
    check_clip(clip_low, None)
    ratio = _ratio(logprobs, old_logprobs, advantages, mask, log_ratio)
    return ((ratio < 1.0 - clip_low) & (jnp.asarray(advantages) < 0)).astype(float)


def clipped_high(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    clip_high=0.2,
    log_ratio: Callable = token_log_ratio,
) -> Array:
    """`1[r > 1 + ε_high and A > 0]`: where the upper clip stops the gradient.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_high: ε_high, the half-width above 1, in (0, 1).
      log_ratio: what makes `log r` of `(logprobs, old_logprobs, mask)`, one of `ratios`.

    Returns: `[..., T]` float32, 0 where `mask` is False.

    Raises: ValueError on unequal shapes or an ε outside (0, 1), TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.5])), jnp.array([True])
    >>> clipped_high(lp, jnp.log(jnp.array([0.1])), jnp.array([1.]), mask).tolist()
    [1.0]
    """
    check_clip(None, clip_high)
    ratio = _ratio(logprobs, old_logprobs, advantages, mask, log_ratio)
    return ((ratio > 1.0 + clip_high) & (jnp.asarray(advantages) > 0)).astype(float)


def of_policy(
    logprobs, old_logprobs, advantages, mask, *, weights, clip_low=0.2, clip_high=0.2, entropy=None
) -> dict[str, Array]:
    """What PPO and its relatives log, each `Σ w x`: clipped shares, `approx_kl` = log π_old - log
    π, ratio, entropy.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the ratio, in (0, 1).
      weights: `[..., T]` of the loss.
      entropy: `[..., T]` nats, or None.

    Returns: scalars by name: `clip_low`, `clip_high`, `approx_kl` (nats a token), `ratio` and,
    where given, `entropy`.

    Raises: ValueError on unequal shapes or an ε outside (0, 1), TypeError where `mask` is not bool.

    >>> lp, w, mask = jnp.array([-1., -1.]), jnp.array([0.5, 0.5]), jnp.array([True, True])
    >>> {name: x.item() for name, x in of_policy(lp, lp, w, mask, weights=w).items()}
    {'clip_low': 0.0, 'clip_high': 0.0, 'approx_kl': 0.0, 'ratio': 1.0}
    """
    arrays = (logprobs, old_logprobs, advantages, mask)
    check_shapes(
        logprobs=logprobs,
        old_logprobs=old_logprobs,
        advantages=advantages,
        entropy=entropy,
        weights=weights,
        mask=mask,
    )
    # Metrics are values alone: without this a gradient would be traced through them.
    change = token_log_ratio(constant(logprobs, mask), old_logprobs, mask)
    per_token = {
        "clip_low": clipped_low(*arrays, clip_low=clip_low),
        "clip_high": clipped_high(*arrays, clip_high=clip_high),
        "approx_kl": 0.0 - change,
        "ratio": jnp.exp(change),
    }
    if entropy is not None:
        per_token["entropy"] = constant(entropy, mask)
    # The weights may come from a wider mask than the loss has.
    return {name: weighted_sum(x, clean(weights, mask)) for name, x in per_token.items()}


def of_pairs(chosen_rewards, rejected_rewards, *, weights) -> dict[str, Array]:
    """What preference training logs, each `Σ w x`: the mean rewards, their margin, and how often
    chosen is above rejected.

    Args:
      chosen_rewards, rejected_rewards: `[N]`, of a reward model, or DPO's implicit ones, β times
        `preference.log_ratios`.
      weights: `[N]` of the loss.

    Returns: scalars by name: `chosen`, `rejected`, `margin`, `accuracy` (a tie counts as wrong).

    Raises: ValueError on unequal shapes.

    >>> of_pairs(jnp.array([1.]), jnp.array([0.5]), weights=jnp.array([1.]))["margin"].item()
    0.5
    """
    check_shapes(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards, weights=weights)
    chosen = constant(chosen_rewards, True)
    rejected = constant(rejected_rewards, True)
    per_pair = {
        "chosen": chosen,
        "rejected": rejected,
        "margin": chosen - rejected,
        "accuracy": widen(chosen > rejected),
    }
    return {name: weighted_sum(x, weights) for name, x in per_pair.items()}


def _ratio(logprobs, old_logprobs, advantages, mask, log_ratio) -> Array:
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    return jnp.exp(log_ratio(logprobs, old_logprobs, mask))
