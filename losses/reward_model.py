"""Reward-model objectives, per pair."""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_shapes, widen


def bradley_terry(chosen, rejected, margin=None, *, center_coef=0.0) -> Array:
    """`-log σ(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)²`  (Bradley & Terry 1952; arXiv:2203.02155, eq. 1).

    Args:
      chosen, rejected: `[...]` rewards of the two completions; gradients flow through both.
      margin: `[...]` how much better chosen must be (Llama 2, arXiv:2307.09288, eq. 2), or None for 0; no gradient.
      center_coef: c, keeps rewards near 0 (arXiv:2312.09244, eq. 2; TRL suggests 0.01).

    Returns: `[...]` loss, in nats.

    Raises: ValueError on unequal shapes.

    >>> bradley_terry(jnp.array([0.]), jnp.array([0.])).tolist()
    [0.6931]
    """
    check_shapes(margin=margin, chosen=chosen, rejected=rejected)
    chosen, rejected = widen(chosen), widen(rejected)
    difference = chosen - rejected if margin is None else chosen - rejected - jax.lax.stop_gradient(widen(margin))
    return -jax.nn.log_sigmoid(difference) + center_coef * jnp.square(chosen + rejected)
