"""Mixtures of experts: what keeps a router from sending everything to a few of them."""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_shapes, widen


def balance(probs, choices, tokens) -> Array:
    """Couples rows: `E f_e P_e`; summed over the experts, the load-balancing loss
    (arXiv:2101.03961, eq. 4; transformers).

    f_e is how often an expert was chosen, P_e the router's mean probability for it, each over all
    tokens and sparse layers of the batch.  The sum is k, the experts a token, where all are used
    alike, and more elsewhere.

    Args:
      probs: `[B, E]` the router's probabilities, summed over each row's tokens and layers:
        `aux["routing"].probs` of a model.
      choices: `[B, E]` how many of them went to each expert: `aux["routing"].choices`.
      tokens: `[B]` how many there were: `aux["routing"].tokens`.

    Returns: `[E]`; zeros where there are no tokens.  Gradients flow through `probs`.

    Raises: ValueError on unequal shapes.

    >>> balance(jnp.array([[1.5, 0.5]]), jnp.array([[2., 0.]]), jnp.array([2.])).tolist()
    [1.5, 0.0]
    """
    check_shapes(probs=probs, choices=choices)
    if jnp.shape(tokens) != jnp.shape(probs)[:-1]:
        raise ValueError(
            f"tokens {list(jnp.shape(tokens))} but probs [B, E] = {list(jnp.shape(probs))}"
        )
    # How often an expert was chosen has no gradient: the pull is on its probability alone.
    choices, tokens = jax.lax.stop_gradient((widen(choices), widen(tokens)))
    number = jnp.maximum(tokens.sum(), 1)
    return probs.shape[-1] * (choices.sum(0) / number) * (widen(probs).sum(0) / number)
