"""Log-ratios of the trained policy to the one that sampled: by the token, or one for a whole
sequence at each of its tokens.

For packed rows, bind the segments: `functools.partial(sequence_log_ratio, segment_ids=ids)`.
"""

import jax
import jax.numpy as jnp

from rlhf.losses import segments
from rlhf.losses._common import MAX_LOG_RATIO, Array, bounded_difference, check_shapes, constant


def token_log_ratio(logprobs, old_logprobs, mask) -> Array:
    """`log π - log π_old`, in nats, within ±20.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens; the only argument gradients flow through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]`, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> token_log_ratio(jnp.array([-1., -50.]), jnp.array([-2., -1.]), jnp.array([True, True])).tolist()
    [1.0, -20.0]
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    return bounded_difference(logprobs, constant(old_logprobs, mask), mask)


def sequence_log_ratio(logprobs, old_logprobs, mask, segment_ids=None) -> Array:
    """The mean over the sequence of `log π - log π_old`, at each of its tokens  (GSPO,
    arXiv:2507.18071, eq. 7).

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      mask: `[B, T]` bool, True on sampled tokens.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]` nats, within ±20.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> sequence_log_ratio(jnp.array([[-1., -3.]]), jnp.array([[-2., -2.]]), jnp.array([[True, True]])).tolist()
    [[0.0, 0.0]]
    """
    return segments.mean(token_log_ratio(logprobs, old_logprobs, mask), mask, segment_ids)


def sequence_token_log_ratio(logprobs, old_logprobs, mask, segment_ids=None) -> Array:
    """The value of `sequence_log_ratio` with each token's own gradient, `sg(s) + log π - sg(log π)`
    (GSPO-token, eq. 14).

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      mask: `[B, T]` bool, True on sampled tokens.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]` nats, within ±20, 0 where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> sequence_token_log_ratio(jnp.array([[-1., -3.]]), jnp.array([[-2., -2.]]), jnp.array([[True, True]])).tolist()
    [[0.0, 0.0]]
    """
    level = jax.lax.stop_gradient(sequence_log_ratio(logprobs, old_logprobs, mask, segment_ids))
    # The second term is 0 with the gradient of log π, since the old side of a ratio is constant.
    return level + token_log_ratio(logprobs, logprobs, mask)


def product_log_ratio(logprobs, old_logprobs, mask, segment_ids=None) -> Array:
    """The sum over the sequence of `log π - log π_old`, at each of its tokens: the log-weight of
    the whole sequence.

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      mask: `[B, T]` bool, True on sampled tokens.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]` nats, within ±20.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> product_log_ratio(jnp.array([[-1., -1.]]), jnp.array([[-2., -3.]]), jnp.array([[True, True]])).tolist()
    [[3.0, 3.0]]
    """
    summed = segments.total(token_log_ratio(logprobs, old_logprobs, mask), mask, segment_ids)
    # Each token is within ±20 already, their sum is not.
    return jnp.clip(summed, -MAX_LOG_RATIO, MAX_LOG_RATIO)
