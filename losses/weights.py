"""Reduction: weights are made once per optimizer mini-batch, and a loss is a weighted sum.

Splitting the batch splits the sum, so micro-batches, meshes, padding and packing leave a gradient
as it is. Weights are float32, and float64 where JAX is set to 64 bits: a float32 weight would leave
a float64 loss with 8 digits.
"""

import jax
import jax.numpy as jnp

from rlhf.losses import segments
from rlhf.losses._common import Array, check_positive, check_shapes, pick, widen


def weighted_sum(values, weights) -> Array:
    """`Σ w x`, with 0 wherever the weight is 0, whatever the value is there (NaN and inf included).

    Args:
      values: any shape, for example per-token losses `[B, T]`.
      weights: the same shape, from `token_mean` and its kin.

    Returns: a scalar, in at least float32.  Gradients flow through `values` alone.

    Raises: ValueError on unequal shapes.

    >>> weighted_sum(jnp.array([1., 3., jnp.nan]), jnp.array([0.5, 0.5, 0.]))
    Array(2., dtype=float32)
    """
    check_shapes(values=values, weights=weights)
    weights = jax.lax.stop_gradient(widen(weights))
    # Values are chosen before they are multiplied: 0 · NaN is NaN.
    return jnp.sum(jnp.where(weights != 0, widen(values), 0.0) * weights)


def token_mean(mask, segment_ids=None) -> Array:
    """Every trained token of the mini-batch counts the same: `w = m / Σm`  (DAPO, arXiv:2503.14476,
    eq. 8; TRL's `dapo`).

    Args:
      mask: `[B, T]` bool, True on trained tokens, of the whole optimizer mini-batch.
      segment_ids: accepted for a common signature; a token's weight does not depend on its
        sequence.

    Returns: `[B, T]` float32 that sums to 1, or all 0 where nothing is trained.  No gradient.

    Raises: TypeError where `mask` is not bool.

    >>> token_mean(jnp.array([[True, False], [True, True]])).tolist()[0]
    [0.3333, 0.0]
    """
    check_shapes(segment_ids=segment_ids, mask=mask)
    # A mini-batch without trained tokens has weights of 0, not NaN.
    return mask / jnp.maximum(mask.sum(), 1)


def sequence_mean(mask, segment_ids=None) -> Array:
    """The mean over sequences of the mean over their tokens: `w = m / (N · Σ_sequence m)`  (GRPO,
    arXiv:2402.03300, eq. 3).

    Args:
      mask: `[B, T]` bool, of the whole optimizer mini-batch.
      segment_ids: `[B, T]` int32 for packed rows; each segment is a sequence.

    Returns: `[B, T]` float32 that sums to 1; `N` counts the sequences with at least one trained
    token.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> sequence_mean(jnp.array([[True, False], [True, True]])).tolist()
    [[0.5, 0.0], [0.25, 0.25]]
    """
    return token_share(mask, segment_ids) / number_of_sequences(mask, segment_ids)


def sequence_sum(mask, segment_ids=None) -> Array:
    """The mean over sequences of the sum over their tokens: `w = m / N`  (verl's
    `seq-mean-token-sum`).

    Args:
      mask: `[B, T]` bool, of the whole optimizer mini-batch.
      segment_ids: `[B, T]` int32 for packed rows; each segment is a sequence.

    Returns: `[B, T]` float32.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> sequence_sum(jnp.array([[True, False], [True, True]])).tolist()
    [[0.5, 0.0], [0.5, 0.5]]
    """
    check_shapes(segment_ids=segment_ids, mask=mask)
    return mask / number_of_sequences(mask, segment_ids)


def constant(mask, segment_ids=None, *, length: float) -> Array:
    """A fixed length divides every sequence: `w = m / (N · length)`  (Dr. GRPO, arXiv:2503.20783,
    §3.2).

    Args:
      mask: `[B, T]` bool, of the whole optimizer mini-batch.
      segment_ids: `[B, T]` int32 for packed rows; each segment is a sequence.
      length: tokens, usually the longest completion that sampling allows.

    Returns: `[B, T]` float32.  No gradient.

    Raises: ValueError on unequal shapes or a length not above 0, TypeError where `mask` is not bool.

    >>> constant(jnp.array([[True, False], [True, True]]), length=2).tolist()
    [[0.25, 0.0], [0.25, 0.25]]
    """
    check_positive(length=length)
    return sequence_sum(mask, segment_ids) / length


def prompt_mean(mask, segment_ids=None, *, prompt_ids) -> Array:
    """The mean over prompts of the mean over all tokens of their samples:
    `w = m / (P · Σ_prompt m)`  (SkyRL's `prompt-mean`).

    Args:
      mask: `[B, T]` bool, of the whole optimizer mini-batch.
      segment_ids: `[B, T]` int32 for packed rows; each segment is a sequence.
      prompt_ids: `[B]` int32 in [0, B): the prompt of each row; for packed rows `[B * S]`
        in [0, B * S), as `segments.segment_sum` orders sequences.

    Returns: `[B, T]` float32 that sums to 1; `P` counts the prompts with at least one trained
    token; NaN for a prompt id that is out of range.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> mask = jnp.array([[True, False], [True, True], [True, False]])
    >>> prompt_mean(mask, prompt_ids=jnp.array([0, 0, 1])).tolist()
    [[0.167, 0.0], [0.167, 0.167], [0.5, 0.0]]
    """
    prompts = segments.per_token(prompt_ids, segments.ids_or_ones(mask, segment_ids))
    # The number of segments must be known to compile: at most one prompt a sequence.
    totals = jax.ops.segment_sum(
        mask.astype(float).reshape(-1), prompts.reshape(-1), num_segments=jnp.size(prompt_ids)
    )
    of_prompt = pick(totals, prompts.reshape(-1)).reshape(prompts.shape)
    return jnp.where(
        mask, 1.0 / (jnp.maximum(of_prompt, 1.0) * jnp.maximum((totals > 0).sum(), 1)), 0.0
    )


def token_share(mask, segment_ids=None) -> Array:
    """A token's share of its sequence, `m / Σ_sequence m`: per-sequence means of per-token values.

    Args:
      mask: `[B, T]` bool, of the whole optimizer mini-batch.
      segment_ids: `[B, T]` int32 for packed rows; each segment is a sequence.

    Returns: `[B, T]` float32 that sums to 1 over every sequence with a trained token.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> token_share(jnp.array([[True, False], [True, True]])).tolist()
    [[1.0, 0.0], [0.5, 0.5]]
    """
    check_shapes(segment_ids=segment_ids, mask=mask)
    return mask / jnp.maximum(segments.count(mask, segment_ids), 1.0)


def number_of_sequences(mask, segment_ids=None) -> Array:
    """How many sequences have a trained token, at least 1.  `[B, T]` bool -> `[]` float32.

    >>> number_of_sequences(jnp.array([[True, True], [False, False]])).item()
    1.0
    """
    # A sequence with a trained token has exactly one last one.
    return jnp.maximum(segments.last_trained(mask, segment_ids).sum(), 1).astype(float)
