"""Supervised objectives, per token.

A token's own weight is a factor of the weights: `weighted_sum(cross_entropy(…), weights * mine)`.
Label smoothing and the z-loss need all logits: `logits.smoothed_cross_entropy`, through `chunked`.
"""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_shapes, clean


def cross_entropy(logprobs, mask) -> Array:
    """`-log p(token)`: the supervised loss from per-token log-probs.

    Args:
      logprobs: `[..., T]` log-probs of the target tokens, in nats; gradients flow through them.
      mask: `[..., T]` bool, True on tokens that are trained on.

    Returns: `[..., T]` nats, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> cross_entropy(jnp.array([-1.5, -3.0]), jnp.array([True, False])).tolist()
    [1.5, 0.0]
    """
    check_shapes(logprobs=logprobs, mask=mask)
    return 0.0 - clean(logprobs, mask)


def dft(logprobs, mask) -> Array:
    """`-sg(p(token)) log p(token)`: dynamic fine-tuning, which does not chase unlikely tokens
    (DFT, arXiv:2508.05629).

    Args:
      logprobs: `[..., T]` log-probs of the target tokens, in nats; gradients flow through them, but
        not through the weight p.
      mask: `[..., T]` bool, True on tokens that are trained on.

    Returns: `[..., T]`, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> dft(jnp.log(jnp.array([0.5, 0.25])), jnp.array([True, False])).tolist()
    [0.347, 0.0]
    """
    check_shapes(logprobs=logprobs, mask=mask)
    logprobs = clean(logprobs, mask)
    # Detached, p is a weight: unlikely tokens pull less, and no gradient flows through it.
    # A probability is at most 1: what is above is rounding, and must not overflow.
    return 0.0 - jax.lax.stop_gradient(jnp.exp(jnp.minimum(logprobs, 0.0))) * logprobs
