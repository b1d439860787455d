"""Supervised objectives, per token."""

from rlhf.losses._common import Array, check_shapes, clean


def cross_entropy(logprobs, mask) -> Array:
    """`-log p(token)`: the supervised loss from per-token log-probs.

    Args:
      logprobs: `[..., T]` log-probs of the target tokens, in nats; gradients flow through them.
      mask: `[..., T]` bool, True on tokens that are trained on.

    Returns: `[..., T]` nats, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> import jax.numpy as jnp
    >>> cross_entropy(jnp.array([-1.5, -3.0]), jnp.array([True, False])).tolist()
    [1.5, 0.0]
    """
    check_shapes(logprobs=logprobs, mask=mask)
    return 0.0 - clean(logprobs, mask)
