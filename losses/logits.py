"""Per-position functions of logits: what `chunked` applies piece by piece."""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, widen


def token_logprob(logits, tokens) -> Array:
    """`log softmax(logits)[token]`.

    Args:
      logits: `[..., V]`; gradients flow through them.
      tokens: `[...]` int32.

    Returns: `[...]` nats, in at least float32.

    Raises: ValueError where the leading shapes differ.

    >>> token_logprob(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [-1.386]
    """
    _check(logits, tokens)
    logits = widen(logits)
    picked = jnp.take_along_axis(logits, tokens[..., None], axis=-1)[..., 0]
    return picked - jax.nn.logsumexp(logits, axis=-1)


def entropy(logits) -> Array:
    """`-Σ_v p_v log p_v`, the entropy of softmax(logits).

    Args:
      logits: `[..., V]`; gradients flow through them.  Minus infinity is a probability of 0.

    Returns: `[...]` nats, in at least float32.

    >>> entropy(jnp.zeros((1, 4))).tolist()
    [1.386]
    """
    logprobs = jax.nn.log_softmax(widen(logits), axis=-1)
    possible = logprobs > -jnp.inf
    return -jnp.sum(jnp.exp(logprobs) * jnp.where(possible, logprobs, 0.0), axis=-1)


def _check(logits, tokens) -> None:
    if jnp.shape(logits)[:-1] != jnp.shape(tokens):
        raise ValueError(f"logits {list(jnp.shape(logits))} but tokens {list(jnp.shape(tokens))}: they differ before V")
