"""Value-function losses, per token."""

import jax.numpy as jnp

from rlhf.losses._common import Array, centered, check_positive, check_shapes, clean, constant


def clipped_value_loss(values, old_values, returns, mask, *, clip=0.2) -> Array:
    """`½ max((V - R)², (clip(V, V_old - ε, V_old + ε) - R)²)`  (PPO's value loss as TRL, verl and
    baselines compute it).

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
    values = clean(values, mask)
    old_values = constant(old_values, mask)
    returns = constant(returns, mask)
    clipped = jnp.clip(values, old_values - clip, old_values + clip)
    # The larger of the two: the clip may hold a value back, never hide its error.
    return 0.5 * jnp.maximum((values - returns) ** 2, (clipped - returns) ** 2)


def huber_value_loss(values, returns, mask, *, delta=10.0) -> Array:
    """`½ (V - R)²` within δ, `δ (|V - R| - ½ δ)` beyond: large errors pull with a constant force
    (Huber 1964; AReaL).

    Args:
      values: `[..., T]`; the only argument gradients flow through.
      returns: `[..., T]` targets.  mask: `[..., T]` bool, True on sampled tokens.
      delta: δ, in units of reward.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or a delta not above 0, TypeError where `mask` is not bool.

    >>> huber_value_loss(jnp.array([1., 20.]), jnp.zeros(2), jnp.array([True, True])).tolist()
    [0.5, 150.0]
    """
    check_shapes(values=values, returns=returns, mask=mask)
    check_positive(delta=delta)
    error = jnp.abs(clean(values, mask) - constant(returns, mask))
    return jnp.where(error <= delta, 0.5 * error**2, delta * (error - 0.5 * delta))


def explained_variance(values, returns, mask) -> Array:
    """Couples rows: `1 - Var(R - V) / Var(R)` over the mini-batch's trained tokens: 1 is perfect, 0
    a constant's worth.

    Args:
      values: `[..., T]`.
      returns: `[..., T]` targets.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[]`, 0 where the returns do not vary, or by rounding alone.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> explained_variance(jnp.array([1., 2.]), jnp.array([1., 3.]), jnp.array([True, True])).item()
    0.75
    """
    check_shapes(values=values, returns=returns, mask=mask)
    values = constant(values, mask)
    returns = constant(returns, mask)
    # `centered` gives exactly 0 for returns that differ by rounding alone.
    squares = lambda x: jnp.sum(centered(x, mask)[0] ** 2)
    varies = squares(returns) > 0
    return jnp.where(varies, 1.0 - squares(returns - values) / squares(returns), 0.0)
