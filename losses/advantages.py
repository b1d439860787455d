"""Advantages: what was better than expected.  None of these is differentiated."""

import jax
import jax.numpy as jnp

from rlhf.losses import segments
from rlhf.losses._common import Array, check_shapes, clean, constant, widen


def gae(rewards, values, mask, *, bootstrap, segment_ids=None, discount=1.0, lam=0.95) -> tuple[Array, Array]:
    """`A_t = δ_t + γλ A_{t+1}`, `δ_t = r_t + γ V_{t+1} - V_t`, over trained tokens alone  (GAE, arXiv:1506.02438, eq. 16).

    Tokens outside the mask (tool output, observations, padding) are passed over: the recurrence carries through them, so that
    `t + 1` means the next trained token of the same sequence.

    Args:
      rewards: `[B, T]`.
      values: `[B, T]`, the value of the state in which `tokens[:, t]` was chosen.
      mask: `[B, T]` bool, True on sampled tokens.
      bootstrap: `[B]` value after a row's last token, for rows that were cut (0 where the sequence ended); for packed rows
        `[B * S]`, one per sequence, as `segments.segment_sum` orders them.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; sequences do not see each other.
      discount: γ, per trained token.  lam: λ, 1 = Monte Carlo, 0 = one step.

    Returns: advantages and returns (advantages + values), both `[B, T]`, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> r, v, m = jnp.array([[0., 1.]]), jnp.array([[.5, .5]]), jnp.array([[True, True]])
    >>> [x.tolist() for x in gae(r, v, m, bootstrap=jnp.zeros(1), lam=1.0)]
    [[[0.5, 0.5]], [[1.0, 1.0]]]
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    ids = segments.or_whole_rows(mask, segment_ids)
    rewards, values = constant(rewards, mask), constant(values, mask)
    end = clean(_bootstrap_of(jax.lax.stop_gradient(widen(bootstrap)), ids), segments.count(mask, ids) > 0)
    goes_on = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (0, 1)))  # the next column belongs to the same sequence
    trained = mask.astype(values.dtype)

    # V carried back over untrained tokens: the value of the next trained token, or the bootstrap.
    carried = _backward((1 - trained) * goes_on, trained * values + (1 - trained) * jnp.where(goes_on, 0.0, end))
    next_values = jnp.where(goes_on, jnp.pad(carried[:, 1:], ((0, 0), (0, 1))), end)
    delta = rewards + discount * next_values - values
    advantages = _backward(goes_on * (trained * discount * lam + 1 - trained), trained * delta)
    return clean(advantages, mask), clean(advantages + values, mask)


def token_rewards(scores, penalties, mask, *, segment_ids=None) -> Array:
    """`r_t = -penalty_t + 1[t is the sequence's last trained token] · score`  (arXiv:2203.02155, §3.5).

    Args:
      scores: `[B]` a score per sequence; for packed rows `[B * S]`, as `segments.segment_sum` orders them.  NaN marks one
        that could not be scored: it gets none.
      penalties: `[B, T]` what every token pays, for example `kl_coef * losses.kl.k1(...)`.
      mask: `[B, T]` bool, True on sampled tokens.
      segment_ids: `[B, T]` int32 for packed rows.

    Returns: `[B, T]` rewards, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> token_rewards(jnp.array([2.]), jnp.array([[.5, .25, .1]]), jnp.array([[True, True, False]])).tolist()
    [[-0.5, 1.75, 0.0]]
    """
    check_shapes(penalties=penalties, mask=mask)
    ids = segments.or_whole_rows(mask, segment_ids)
    last = segments.last_trained(mask, segment_ids)
    return clean(_bootstrap_of(constant(scores, ~jnp.isnan(scores)), ids), last) - constant(penalties, mask)


def group_relative(rewards, *, eps=1e-4) -> Array:
    """`(r - mean) / (std + eps)` within each prompt's group of samples  (GRPO, arXiv:2402.03300, §4.1.2).

    Args:
      rewards: `[P, G]`, prompts × samples.  NaN marks a sample that could not be scored: it is left out, its advantage is 0.
      eps: added to the standard deviation, which has Bessel's correction (TRL: 1e-4).

    Returns: `[P, G]` advantages; 0 for a group of one, and for a group whose rewards are all equal.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`.

    >>> group_relative(jnp.array([[1., 0.], [1., 1.]])).tolist()
    [[0.707, -0.707], [0.0, 0.0]]
    """
    if jnp.ndim(rewards) != 2:
        raise ValueError(f"rewards must be [P, G], prompts × samples, but are {list(jnp.shape(rewards))}")
    scored = ~jnp.isnan(rewards)
    rewards = constant(rewards, scored)
    number = jnp.maximum(scored.sum(-1, keepdims=True), 1)
    centered = clean(rewards - rewards.sum(-1, keepdims=True) / number, scored)
    std = jnp.sqrt((centered**2).sum(-1, keepdims=True) / jnp.maximum(number - 1, 1))
    return centered / (std + eps)


def whiten(values, mask, *, eps=1e-8) -> Array:
    """Couples rows: `(x - mean) / √(var + eps)` over the mini-batch's trained tokens  (arXiv:2006.05990, C67).

    Computed once per optimizer mini-batch, before it is split.

    Args:
      values: `[...]`, usually advantages `[B, T]`.
      mask: `[...]` bool, True on tokens that count.
      eps: added to the variance, which has Bessel's correction.

    Returns: `[...]`, 0 where `mask` is False; all 0 where a single token counts.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> whiten(jnp.array([1., 3., 9.]), jnp.array([True, True, False])).tolist()
    [-0.707, 0.707, 0.0]
    """
    check_shapes(values=values, mask=mask)
    values = constant(values, mask)
    number = mask.sum()
    centered = clean(values - values.sum() / jnp.maximum(number, 1), mask)
    variance = (centered**2).sum() / jnp.maximum(number - 1, 1)
    return centered * jax.lax.rsqrt(variance + eps)


def _backward(a, b) -> Array:
    """`x_t = a_t x_{t+1} + b_t` with `x_T = 0` beyond the end, along the last axis, in O(log T) steps."""
    combine = lambda later, earlier: (earlier[0] * later[0], earlier[0] * later[1] + earlier[1])
    return jax.lax.associative_scan(combine, (a.astype(b.dtype), b), reverse=True, axis=b.ndim - 1)[1]


def _bootstrap_of(per_sequence, ids) -> Array:
    """Spreads one number per sequence, `[B * S]`, over its tokens, `[B, T]`."""
    rows = ids.shape[0]
    if per_sequence.ndim != 1 or per_sequence.shape[0] % max(rows, 1):
        raise ValueError(
            f"one number per sequence must be [B] or [B * max_segments] with B = {rows}, but is {list(per_sequence.shape)}"
        )
    table = per_sequence.reshape(rows, -1)
    return jnp.take_along_axis(table, jnp.clip(ids - 1, 0, table.shape[1] - 1), axis=1)
