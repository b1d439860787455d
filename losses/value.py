"""Value-function losses, per token."""

import jax.numpy as jnp

from rlhf.losses._common import Array, check_positive, check_shapes, clean, constant


def clipped_value_loss(values, old_values, returns, mask, *, clip=0.2) -> Array:
    """`½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)`  (PPO's value loss as TRL, verl and baselines compute it).

    Args:
      values: `[..., T]` new values; the only argument gradients flow through.
      old_values: `[..., T]` values when the batch was sampled.
      returns: `[..., T]` targets.
      mask: `[..., T]` bool, True on sampled tokens.
      clip: ε, half-width, in units of reward.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or a clip not above 0, TypeError where `mask` is not bool.

    >>> one, mask = jnp.ones(1), jnp.array([True])
    >>> clipped_value_loss(one, 0 * one, one, mask).tolist()  # clipped to 0.2: ½ 0.8²
    [0.32]
    """
    check_shapes(values=values, old_values=old_values, returns=returns, mask=mask)
    check_positive(clip=clip)
    values, old_values, returns = clean(values, mask), constant(old_values, mask), constant(returns, mask)
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)
