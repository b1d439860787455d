"""Sequences inside rows: a row holds one sequence, or several packed ones that `segment_ids` tell apart."""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_shapes, clean


def or_whole_rows(mask, segment_ids) -> Array:
    """`segment_ids`, or all ones: each row is one sequence.  `[B, T]` -> `[B, T]` int32."""
    check_shapes(segment_ids=segment_ids, mask=mask)
    return jnp.ones(jnp.shape(mask), jnp.int32) if segment_ids is None else segment_ids


def segment_sum(values, mask, segment_ids=None, *, max_segments: int = 1) -> Array:
    """The sum of each sequence's trained tokens, `s_n = Σ_{t in sequence n} m_t x_t`.

    Args:
      values: `[B, T]` per-token numbers, for example log-probs in nats.
      mask: `[B, T]` bool, True on tokens that count.
      segment_ids: `[B, T]` int32, 0 = padding, 1..max_segments = the sequences of a packed row; None: a row is one sequence.
      max_segments: the most sequences in a row; static, because it is a shape.  Sequences with higher ids are left out.

    Returns: `[B * max_segments]`; entry `b * max_segments + s` is sequence `s + 1` of row `b`, 0 where there is none.
    Gradients flow through `values`.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> segment_sum(jnp.array([[1., 2., 4.]]), jnp.array([[True, True, True]]), jnp.array([[1, 1, 2]]), max_segments=2)
    Array([3., 4.], dtype=float32)
    """
    check_shapes(values=values, mask=mask)
    ids = or_whole_rows(mask, segment_ids)
    member = (ids[:, None, :] == 1 + jnp.arange(max_segments)[None, :, None]) & mask[:, None, :]  # [B, S, T]
    return clean(jnp.broadcast_to(values[:, None, :], member.shape), member).sum(-1).reshape(-1)


def count(mask, segment_ids=None) -> Array:
    """How many trained tokens the sequence of each token has.  `[B, T]` bool -> `[B, T]` float32; no gradient."""
    ids = or_whole_rows(mask, segment_ids)
    longest = ids.shape[-1]
    totals = jax.vmap(lambda m, s: jax.ops.segment_sum(m.astype(float), s, num_segments=longest + 1))(mask, ids)
    return jnp.take_along_axis(totals, jnp.minimum(ids, longest), axis=-1)


def starts(segment_ids) -> Array:
    """True in the first column of every sequence.  `[B, T]` int32 -> `[B, T]` bool."""
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    return (segment_ids != before) & (segment_ids != 0)


def last_trained(mask, segment_ids=None) -> Array:
    """True on each sequence's last trained token, where a sequence's score is placed.

    Args:
      mask: `[B, T]` bool.  segment_ids: `[B, T]` int32 or None.

    Returns: `[B, T]` bool, at most one True per sequence; none where a sequence has no trained token.

    >>> last_trained(jnp.array([[False, True, True, False]]))
    Array([[False, False,  True, False]], dtype=bool)
    """
    check_shapes(segment_ids=segment_ids, mask=mask)
    ids = or_whole_rows(mask, segment_ids)
    longest = ids.shape[-1]
    column = jnp.broadcast_to(jnp.arange(longest), ids.shape)
    last = jax.vmap(lambda c, s: jax.ops.segment_max(c, s, num_segments=longest + 1))(jnp.where(mask, column, -1), ids)
    return mask & (column == jnp.take_along_axis(last, jnp.minimum(ids, longest), axis=-1))


def last_columns(segment_ids, *, max_segments: int = 1) -> Array:
    """The column of each sequence's last token.  `[B, T]` int32 -> `[B, max_segments]` int32, 0 where there is none."""
    member = segment_ids[:, None, :] == 1 + jnp.arange(max_segments)[None, :, None]
    return jnp.where(member, jnp.arange(segment_ids.shape[-1]), 0).max(-1)
