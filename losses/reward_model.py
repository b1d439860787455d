"""Reward-model objectives: per pair, per step and per row."""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_shapes, clean, widen
from rlhf.losses.logits import token_logprob


def bradley_terry(chosen, rejected, margin=None, *, center_coef=0.0) -> Array:
    """`-log σ(r_chosen - r_rejected - margin) + c (r_chosen + r_rejected)²`  (Bradley & Terry 1952;
    arXiv:2203.02155, eq. 1).

    Args:
      chosen, rejected: `[...]` rewards of the two completions; gradients flow through both.
      margin: `[...]` how much better chosen must be  (Llama 2, arXiv:2307.09288, eq. 2), or None for
        0; no gradient.
      center_coef: c, keeps rewards near 0 (arXiv:2312.09244, eq. 2; TRL suggests 0.01).

    Returns: `[...]` loss, in nats.

    Raises: ValueError on unequal shapes.

    >>> bradley_terry(jnp.array([0.]), jnp.array([0.])).tolist()
    [0.6931]
    """
    check_shapes(margin=margin, chosen=chosen, rejected=rejected)
    chosen = widen(chosen)
    rejected = widen(rejected)
    difference = (
        chosen - rejected
        if margin is None
        else chosen - rejected - jax.lax.stop_gradient(widen(margin))
    )
    return -jax.nn.log_sigmoid(difference) + center_coef * jnp.square(chosen + rejected)


def process_reward(logits, labels, mask) -> Array:
    """`-log softmax(logits)[label]` at the last token of every step  (process reward models,
    arXiv:2305.20050; TRL's PRM).

    Args:
      logits: `[..., T, C]` of a token classifier, C = 2 for wrong and right; gradients flow through
        them.
      labels: `[..., T]` int32, the class of the step that ends here; anything where `mask` is
        False.
      mask: `[..., T]` bool, True at the ends of steps.

    Returns: `[..., T]` nats, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> process_reward(jnp.zeros((1, 2, 2)), jnp.array([[0, 1]]), jnp.array([[False, True]])).tolist()
    [[0.0, 0.693]]
    """
    check_shapes(labels=labels, mask=mask)
    # Before the softmax: NaN logits of padding would reach the gradient through its sum.
    cleaned = clean(logits, jnp.broadcast_to(mask[..., None], jnp.shape(logits)))
    return clean(0.0 - token_logprob(cleaned, labels), mask)


def regression(rewards, targets) -> Array:
    """`(r - target)²`: a reward model on absolute scores.

    Args:
      rewards: `[...]` of the model; gradients flow through them.
      targets: `[...]` scores; no gradient.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes.

    >>> regression(jnp.array([1.0]), jnp.array([0.5])).tolist()
    [0.25]
    """
    check_shapes(targets=targets, rewards=rewards)
    return jnp.square(widen(rewards) - jax.lax.stop_gradient(widen(targets)))
