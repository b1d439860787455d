"""Per-position functions of logits: what `chunked` applies piece by piece."""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, pick, widen


def token_logprob(logits, tokens) -> Array:
    """`log softmax(logits)[token]`.

    Args:
      logits: `[..., V]`; gradients flow through them.
      tokens: `[...]` int32.

    Returns: `[...]` nats, in at least float32; NaN for a token below 0 or beyond V.

    Raises: ValueError where the leading shapes differ.

    >>> token_logprob(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [-1.386]
    """
    _check(logits, tokens)
    shifted = _shifted(logits)
    # One logit is picked before it is normalised: log_softmax would be a second [..., V].
    return pick(shifted, tokens[..., None])[..., 0] - jnp.log(jnp.exp(shifted).sum(-1))


def _shifted(logits) -> Array:
    """Logits whose largest is 0: small numbers, of which a difference rounds less."""
    logits = widen(logits)
    return logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True))


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
    # 0 · log 0 is 0 in an entropy, and NaN in floats.
    return -jnp.sum(jnp.exp(logprobs) * jnp.where(possible, logprobs, 0.0), axis=-1)


def token_logprob_and_entropy(logits, tokens) -> tuple[Array, Array]:
    """`token_logprob` and `entropy`, with one normaliser for both.

    Args:
      logits: `[..., V]`; gradients flow through them.  Minus infinity is a probability of 0.
      tokens: `[...]` int32.

    Returns: two of `[...]` nats, in at least float32; the log-prob is NaN for a token below 0 or
    beyond V.

    Raises: ValueError where the leading shapes differ.

    >>> [x.tolist() for x in token_logprob_and_entropy(jnp.zeros((1, 4)), jnp.array([2]))]
    [[-1.386], [1.386]]
    """
    _check(logits, tokens)
    # Sums of exponentials that XLA makes on the way, and no array of log-probs beside the logits.
    shifted = _shifted(logits)
    unnormalised = jnp.exp(shifted)
    total = unnormalised.sum(-1)
    logprob = pick(shifted, tokens[..., None])[..., 0] - jnp.log(total)
    # 0 · log 0 is 0 in an entropy, and NaN in floats.
    possible = jnp.where(unnormalised > 0, shifted, 0.0)
    return logprob, jnp.log(total) - jnp.sum(unnormalised * possible, -1) / total


def log_sum_squared_probs(logits) -> Array:
    """`log Σ_v p_v²`: how concentrated softmax(logits) is, for WPO's weights and the optimal token
    baseline.

    Args:
      logits: `[..., V]`; gradients flow through them.  Minus infinity is a probability of 0.

    Returns: `[...]` nats, at most 0, in at least float32.

    >>> log_sum_squared_probs(jnp.zeros((1, 4))).tolist()
    [-1.386]
    """
    return jax.nn.logsumexp(2.0 * jax.nn.log_softmax(widen(logits), axis=-1), axis=-1)


def smoothed_cross_entropy(logits, tokens, *, label_smoothing=0.0, z_loss=0.0) -> Array:
    """`-(1 - ε) log p(token) - ε mean_v log p_v + c (log Σ_v exp(logits))²`
    (arXiv:1512.00567, §7; z-loss: PaLM, arXiv:2204.02311).

    Args:
      logits: `[..., V]`, finite where ε is above 0; gradients flow through them.
      tokens: `[...]` int32.
      label_smoothing: ε, the share that all tokens have in the target.
      z_loss: c, which holds the normaliser near 1 (PaLM: 1e-4).

    Returns: `[...]` nats, in at least float32.

    Raises: ValueError where the leading shapes differ, or ε is not in [0, 1).

    >>> smoothed_cross_entropy(jnp.zeros((1, 4)), jnp.array([2]), label_smoothing=0.1).tolist()
    [1.386]
    """
    _check(logits, tokens)
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 1:
        raise ValueError(
            f"label_smoothing is a share of the target, in [0, 1), but is {label_smoothing}"
        )
    normaliser = jax.nn.logsumexp(widen(logits), axis=-1)
    mean = jnp.mean(widen(logits), axis=-1) - normaliser
    # The plain loss plus a correction: without smoothing it is the plain loss to the last bit.
    smoothing = label_smoothing * (token_logprob(logits, tokens) - mean)
    return smoothing - token_logprob(logits, tokens) + z_loss * normaliser**2


def is_top1(logits, tokens) -> Array:
    """`1[argmax_v logits = token]`: token accuracy; of equal logits the first counts.

    Args:
      logits: `[..., V]`.  tokens: `[...]` int32.

    Returns: `[...]` bool.

    Raises: ValueError where the leading shapes differ.

    >>> is_top1(jnp.array([[0., 2., 1.]]), jnp.array([1])).tolist()
    [True]
    """
    _check(logits, tokens)
    return jnp.argmax(logits, axis=-1) == tokens


def _check(logits, tokens) -> None:
    if jnp.shape(logits)[:-1] != jnp.shape(tokens):
        raise ValueError(
            f"logits {list(jnp.shape(logits))} but tokens {list(jnp.shape(tokens))}: they differ "
            "before V"
        )
