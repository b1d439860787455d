"""Sequences inside rows: a row holds one sequence, or several packed ones that `segment_ids` tell
apart.
"""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_shapes, clean, pick, widen


def ids_or_ones(mask, segment_ids) -> Array:
    """`segment_ids`, or all ones: each row is one sequence.  `[B, T]` -> `[B, T]` int32.

    >>> ids_or_ones(jnp.array([[True, False]]), None).tolist()
    [[1, 1]]
    """
    check_shapes(segment_ids=segment_ids, mask=mask)
    return jnp.ones(jnp.shape(mask), jnp.int32) if segment_ids is None else segment_ids


def segment_sum(values, mask, segment_ids=None, *, max_segments: int = 1) -> Array:
    """The sum of each sequence's trained tokens, `s_n = Σ_{t in sequence n} m_t x_t`.

    Args:
      values: `[B, T]` per-token numbers, for example log-probs in nats.
      mask: `[B, T]` bool, True on tokens that count.
      segment_ids: `[B, T]` int32, 0 = padding, 1..max_segments = the sequences of a packed row;
        None: a row is one sequence.
      max_segments: the most sequences in a row; static, because it is a shape.  Sequences with
        higher ids are left out.

    Returns: `[B * max_segments]`; entry `b * max_segments + s` is sequence `s + 1` of row `b`, 0
    where there is none.  Gradients flow through `values`.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> segment_sum(jnp.array([[1., 2., 4.]]), jnp.array([[True, True, True]]), jnp.array([[1, 1, 2]]), max_segments=2)
    Array([3., 4.], dtype=float32)
    """
    check_shapes(values=values, mask=mask)
    ids = ids_or_ones(mask, segment_ids)
    # [B, S, T]: whether token t of a row belongs to sequence s + 1, and counts.
    member = (ids[:, None, :] == 1 + jnp.arange(max_segments)[None, :, None]) & mask[
        :, None, :
    ]  # [B, S, T]
    return clean(jnp.broadcast_to(values[:, None, :], member.shape), member).sum(-1).reshape(-1)


def spread(per_sequence, mask, segment_ids=None) -> Array:
    """One number per sequence, at each of its trained tokens: the way back from `segment_sum`.

    Args:
      per_sequence: `[B]`, or `[B * S]` for packed rows as `segment_sum` orders them.
      mask: `[B, T]` bool.  segment_ids: `[B, T]` int32 or None.

    Returns: `[B, T]`, 0 where `mask` is False.  Gradients flow through `per_sequence`.

    Raises: ValueError where `per_sequence` has no whole number of entries per row, TypeError where
    `mask` is not bool.

    >>> spread(jnp.array([3.]), jnp.array([[False, True, True]])).tolist()
    [[0.0, 3.0, 3.0]]
    """
    return clean(per_token(per_sequence, ids_or_ones(mask, segment_ids)), mask)


def per_token(per_sequence, segment_ids) -> Array:
    """One number per sequence, at every token of it, trained or not.  `[B]` or `[B * S]`, `[B, T]`
    int32 -> `[B, T]`.

    >>> per_token(jnp.array([3., 5.]), jnp.array([[1, 1, 2]])).tolist()
    [[3.0, 3.0, 5.0]]
    """
    rows = segment_ids.shape[0]
    if jnp.ndim(per_sequence) != 1 or per_sequence.shape[0] % max(rows, 1):
        raise ValueError(
            f"one number per sequence must be [B] or [B * max_segments] with B = {rows}, but is "
            f"{list(jnp.shape(per_sequence))}"
        )
    table = per_sequence.reshape(rows, -1)
    # Padding reads the first entry, which the caller masks; -1 would be NaN.
    return pick(table, jnp.where(segment_ids == 0, 0, segment_ids - 1))


def total(values, mask, segment_ids=None) -> Array:
    """The sum over a token's own sequence, at each of its trained tokens,
    `s_t = Σ_{u in sequence of t} m_u x_u`.

    Gradients flow through `values`.

    Args:
      values: `[B, T]` per-token numbers.
      mask: `[B, T]` bool, True on tokens that count.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]`, 0 where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> total(jnp.array([[1., 2., 4.]]), jnp.array([[True, True, False]])).tolist()
    [[3.0, 3.0, 0.0]]
    """
    check_shapes(values=values, segment_ids=segment_ids, mask=mask)
    return clean(_pooled(jnp.sum, jax.ops.segment_sum, clean(values, mask), segment_ids), mask)


def mean(values, mask, segment_ids=None) -> Array:
    """The mean over a token's own sequence, at each of its trained tokens, `total / count`.

    Gradients flow through `values`.

    Args:
      values: `[B, T]` per-token numbers.
      mask: `[B, T]` bool, True on tokens that count.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]`, 0 where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> mean(jnp.array([[1., 2., 4.]]), jnp.array([[True, True, False]])).tolist()
    [[1.5, 1.5, 0.0]]
    """
    return total(values, mask, segment_ids) / jnp.maximum(count(mask, segment_ids), 1.0)


def largest(values, mask, segment_ids=None) -> Array:
    """The maximum over a token's own sequence, at each of its trained tokens.  No gradient.

    Args:
      values: `[B, T]` per-token numbers.
      mask: `[B, T]` bool, True on tokens that count.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]`, 0 where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> largest(jnp.array([[1., 2., 4.]]), jnp.array([[True, True, False]])).tolist()
    [[2.0, 2.0, 0.0]]
    """
    check_shapes(values=values, segment_ids=segment_ids, mask=mask)
    # Minus infinity never is the largest; a sequence without trained tokens is cleaned below.
    trained = jax.lax.stop_gradient(jnp.where(mask, widen(values), -jnp.inf))
    return clean(_pooled(jnp.max, jax.ops.segment_max, trained, segment_ids), mask)


def count(mask, segment_ids=None) -> Array:
    """How many trained tokens the sequence of each token has.  `[B, T]` bool -> `[B, T]` float32;
    no gradient.

    >>> count(jnp.array([[True, False, True]])).tolist()
    [[2.0, 2.0, 2.0]]
    """
    check_shapes(segment_ids=segment_ids, mask=mask)
    return _pooled(jnp.sum, jax.ops.segment_sum, mask.astype(float), segment_ids)


def starts(segment_ids) -> Array:
    """True in the first column of every sequence.  `[B, T]` int32 -> `[B, T]` bool.

    >>> starts(jnp.array([[1, 1, 2, 0]])).tolist()
    [[True, False, True, False]]
    """
    # A column of padding on the left: the first token of a row starts a sequence.
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1]
    return (segment_ids != before) & (segment_ids != 0)


def last_trained(mask, segment_ids=None) -> Array:
    """True on each sequence's last trained token, where a sequence's score is placed.

    Args:
      mask: `[B, T]` bool.  segment_ids: `[B, T]` int32 or None.

    Returns: `[B, T]` bool, at most one True per sequence; none where a sequence has no trained
    token.

    >>> last_trained(jnp.array([[False, True, True, False]]))
    Array([[False, False,  True, False]], dtype=bool)
    """
    check_shapes(segment_ids=segment_ids, mask=mask)
    # The last trained column is the largest, since those that do not count are -1.
    column = jnp.broadcast_to(jnp.arange(jnp.shape(mask)[-1]), jnp.shape(mask))
    return mask & (
        column == _pooled(jnp.max, jax.ops.segment_max, jnp.where(mask, column, -1), segment_ids)
    )


def last_columns(segment_ids, *, max_segments: int = 1) -> Array:
    """The column of each sequence's last token.  `[B, T]` int32 -> `[B, max_segments]` int32, 0
    where there is none.

    >>> last_columns(jnp.array([[1, 1, 2, 0]]), max_segments=2).tolist()
    [[1, 2]]
    """
    member = segment_ids[:, None, :] == 1 + jnp.arange(max_segments)[None, :, None]
    return jnp.where(member, jnp.arange(segment_ids.shape[-1]), 0).max(-1)


def _pooled(by_row, by_segment, values, segment_ids) -> Array:
    """`by_row` of each row, or `by_segment` of each sequence, at every token of it."""
    if segment_ids is None:
        return jnp.broadcast_to(by_row(values, axis=-1, keepdims=True), values.shape)
    # The number of segments is a shape, and so must be known: T tokens have at most T, and 0 is
    # padding.
    columns = values.shape[-1]
    table = jax.vmap(lambda x, ids: by_segment(x, ids, num_segments=columns + 1))(
        values, segment_ids
    )
    return pick(table, segment_ids)
