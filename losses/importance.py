"""Importance weights for tokens that another policy, engine or precision sampled: `ρ = π_old / μ`.

A weight multiplies the per-token loss.  The mean's divisor stays what it was before: weights of 0
leave tokens out of the sum and not out of `weights.token_mean(mask)`, so that rejection shrinks the
gradient and never inflates it.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf.losses import kl, segments
from rlhf.losses import weights as reduction
from rlhf.losses._common import MAX_LOG_RATIO, Array, check_positive, check_shapes, clean, constant
from rlhf.losses.ratios import token_log_ratio


def weights(
    old_logprobs, sampling_logprobs, mask, *, log_ratio: Callable = token_log_ratio
) -> Array:
    """`ρ = exp(log π_old - log μ)`, by the token or the sequence.

    Args:
      old_logprobs: `[..., T]` the sampled tokens under the trainer's policy at the start of the
        update, in nats.
      sampling_logprobs: `[..., T]` as the sampler reported them; NaN where it reported none counts
        as equal.
      mask: `[..., T]` bool, True on sampled tokens.
      log_ratio: `ratios.token_log_ratio`, `product_log_ratio` (the sequence's weight) or
        `sequence_log_ratio` (its geometric mean).

    Returns: `[..., T]`, within exp(±20); 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> weights(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), jnp.array([True])).tolist()
    [2.0]
    """
    check_shapes(old_logprobs=old_logprobs, sampling_logprobs=sampling_logprobs, mask=mask)
    old = constant(old_logprobs, mask)
    # A missing log-prob counts as the trainer's own: a weight of 1, no correction.
    sampled = jnp.where(jnp.isnan(sampling_logprobs), old, sampling_logprobs)
    return clean(jnp.exp(log_ratio(old, sampled, mask)), mask)


def truncated(weights, *, max_weight=2.0, min_weight=0.0) -> Array:
    """`clip(ρ, ρ_min, ρ_max)`: truncated importance sampling  (TIS; Ionides 2008; TRL's
    `token_truncate`, `sequence_truncate`).

    Args:
      weights: `[...]` from `weights`.
      max_weight, min_weight: absolute bounds.

    Returns: `[...]`.  No gradient.

    Raises: ValueError where max_weight is not above 0.

    >>> truncated(jnp.array([0.5, 3.0])).tolist()
    [0.5, 2.0]
    """
    check_positive(max_weight=max_weight)
    return jnp.clip(constant(weights, True), min_weight, max_weight)


def masked(weights, *, max_weight=2.0, min_weight=0.0) -> Array:
    """`ρ` where `ρ_min ≤ ρ ≤ ρ_max`, and 0 elsewhere: masked importance sampling  (MIS; TRL's
    `token_mask`, `sequence_mask`).

    Args:
      weights: `[...]` from `weights`.
      max_weight, min_weight: absolute bounds.

    Returns: `[...]`.  No gradient.

    Raises: ValueError where max_weight is not above 0.

    >>> masked(jnp.array([0.5, 3.0])).tolist()
    [0.5, 0.0]
    """
    check_positive(max_weight=max_weight)
    weights = constant(weights, True)
    return jnp.where((weights >= min_weight) & (weights <= max_weight), weights, 0.0)


def icepop(old_logprobs, sampling_logprobs, mask, *, max_weight=5.0, min_weight=0.5) -> Array:
    """`masked(ρ)` of each token, two-sided  (IcePop, arXiv:2510.18855).

    Args:
      old_logprobs: `[..., T]` the sampled tokens under the trainer's policy at the start of the
        update, in nats.
      sampling_logprobs: `[..., T]` as the sampler reported them; NaN where it reported none counts
        as equal.
      mask: `[..., T]` bool, True on sampled tokens.
      max_weight, min_weight: absolute bounds.

    Returns: `[..., T]` weights, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes or a max_weight not above 0, TypeError where `mask` is not
    bool.

    >>> icepop(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.05])), jnp.array([True])).tolist()
    [0.0]
    """
    return masked(
        weights(old_logprobs, sampling_logprobs, mask), max_weight=max_weight, min_weight=min_weight
    )


def batch_normalized(weights, mask) -> Array:
    """Couples rows: `ρ / mean ρ` over the mini-batch's trained tokens, so that their mean is 1
    (self-normalised weights).

    Args:
      weights: `[B, T]`.  mask: `[B, T]` bool.

    Returns: `[B, T]`, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> batch_normalized(jnp.array([[1., 3.]]), jnp.array([[True, True]])).tolist()
    [[0.5, 1.5]]
    """
    check_shapes(weights=weights, mask=mask)
    weights = constant(weights, mask)
    mean = weights.sum() / jnp.maximum(mask.sum(), 1)
    # Where all were rejected the mean is 0, and the zeros stay as they are.
    return weights / jnp.where(mean > 0, mean, 1.0)


def effective_sample_size(weights, mask) -> Array:
    """Couples rows: `(Σ ρ)² / (N Σ ρ²)`, the share of the batch that the weights leave  (Kish
    1965).

    Args:
      weights: `[B, T]`.
      mask: `[B, T]` bool.

    Returns: `[]` in [0, 1]; 0 where all weights are.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> effective_sample_size(jnp.array([[1., 0.]]), jnp.array([[True, True]])).item()
    0.5
    """
    # With weights of mean 1, (Σ ρ)² / (N Σ ρ²) is N / Σ ρ².
    squares = jnp.sum(batch_normalized(weights, mask) ** 2)
    return jnp.where(squares > 0, mask.sum() / squares, 0.0)


def mismatch(old_logprobs, sampling_logprobs, mask, *, segment_ids=None) -> dict[str, Array]:
    """Couples rows: how far trainer and sampler are apart, with `d = log π_old - log μ`  (verl's
    rollout-correction metrics).

    Args:
      old_logprobs, sampling_logprobs, mask: `[B, T]` as for `weights`.  segment_ids: `[B, T]` int32
        or None.

    Returns: scalars, no gradient: `kl` = mean -d and `k3` = mean (e^d - 1 - d), estimates of KL(μ ‖
    π_old) in nats a token; `perplexity_ratio`, the mean over sequences of exp(-mean d);
    `chi2_token` = mean e^2d - 1; `chi2_sequence`, the same of sequence weights; `max_difference` =
    max |d|.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> lp = jnp.array([[-1., -2.]])
    >>> [x.item() for x in mismatch(lp, lp, jnp.array([[True, True]])).values()]
    [0.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    """
    check_shapes(old_logprobs=old_logprobs, sampling_logprobs=sampling_logprobs, mask=mask)
    old = constant(old_logprobs, mask)
    sampled = constant(sampling_logprobs, mask)
    difference = token_log_ratio(old, sampled, mask)
    tokens = reduction.token_mean(mask)
    sequences = reduction.sequence_mean(mask, segment_ids)
    # The sum over a long sequence would overflow its exponential.
    summed = jnp.clip(segments.total(difference, mask, segment_ids), -MAX_LOG_RATIO, MAX_LOG_RATIO)
    # Without a trained token χ² is 0, not -1.
    something = mask.any()
    return {
        "kl": reduction.weighted_sum(-difference, tokens),
        "k3": reduction.weighted_sum(kl.k3(sampled, old, mask), tokens),
        "perplexity_ratio": reduction.weighted_sum(
            jnp.exp(-segments.mean(difference, mask, segment_ids)), sequences
        ),
        "chi2_token": reduction.weighted_sum(jnp.exp(2 * difference), tokens) - something,
        "chi2_sequence": reduction.weighted_sum(jnp.exp(2 * summed), sequences) - something,
        "max_difference": jnp.abs(difference).max(initial=0.0),
    }
