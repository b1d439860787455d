"""What goes into a rollout and what comes out."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Prompts(NamedTuple):
    """Token prompts, padded anywhere."""

    tokens: Array  # [P, L] int32
    mask: Array  # [P, L] bool, True on real tokens
    inputs: dict | None = None  # arrays [P, ...] that the tokens are conditioned on


class Rollout(NamedTuple):
    """Prompts with their completions, a prompt's samples contiguous.  Prompts are padded on the left, completions on the right."""

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, sampled by the policy
    positions: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32, 0 = padding
    logprobs: Array  # [B, T] float32, of softmax(logits / temperature): equals token_logprobs at that temperature
    sampling_logprobs: Array  # [B, T] float32, of the distribution after all filters, for importance correction
    finished: Array  # [B] bool, ended by an end token (False: cut at the length limit)
    temperature: Array  # [] float32
    inputs: dict | None = None


class Batch(NamedTuple):
    """What an on-policy objective reads.  Fields that it does not use stay None."""

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, True on trained tokens
    positions: Array  # [B, T] int32
    segment_ids: Array  # [B, T] int32, 0 = padding
    temperature: Any = 1.0  # [] float32
    logprobs: Array | None = None  # [B, T] float32, of the policy that sampled
    ref_logprobs: Array | None = None  # [B, T] float32, of the reference
    values: Array | None = None  # [B, T] float32, when the batch was sampled
    advantages: Array | None = None  # [B, T] float32
    returns: Array | None = None  # [B, T] float32, targets of the values
    weights: Array | None = None  # [B, T] float32, of the whole optimizer mini-batch
    inputs: dict | None = None


def batch_of(rollout: Rollout, **fields) -> Batch:
    """A `Batch` of a rollout's arrays and the fields given."""
    common = {name: getattr(rollout, name) for name in Batch._fields if name in Rollout._fields}
    return Batch(**{**common, **fields})


def whole(tokens, mask=None, **fields) -> Batch:
    """A `Batch` of rows that hold one sequence each, padded on the right.

    Args:
      tokens: `[B, T]` int32.
      mask: `[B, T]` bool, True on tokens that are not padding; None: all.
      fields: of `Batch`; `mask` (of training) defaults to every real token.

    >>> whole(jnp.array([[5, 6, 0]]), jnp.array([[True, True, False]])).segment_ids.tolist()
    [[1, 1, 0]]
    """
    real = jnp.ones(tokens.shape, bool) if mask is None else mask
    positions = jnp.maximum(jnp.cumsum(real, axis=1) - 1, 0)
    return Batch(tokens, fields.pop("trained", real), positions, real.astype(jnp.int32), **fields)
