"""Advantages: what was better than expected.  None of these is differentiated."""

import jax
import jax.numpy as jnp

from rlhf.losses import segments
from rlhf.losses._common import (
    Array,
    centered,
    check_positive,
    check_shapes,
    clean,
    constant,
    widen,
)


def gae(
    rewards, values, mask, *, bootstrap, segment_ids=None, discount=1.0, lam=0.95
) -> tuple[Array, Array]:
    """`A_t = δ_t + γλ A_{t+1}`, `δ_t = r_t + γ V_{t+1} - V_t`, over trained tokens alone  (GAE,
    arXiv:1506.02438, eq. 16).

    Tokens outside the mask (tool output, observations, padding) are passed over: the recurrence
    carries through them, so that `t + 1` means the next trained token of the same sequence.

    Args:
      rewards: `[B, T]`.
      values: `[B, T]`, the value of the state in which `tokens[:, t]` was chosen.
      mask: `[B, T]` bool, True on sampled tokens.
      bootstrap: `[B]` value after a row's last token, for rows that were cut (0 where the sequence
        ended); for packed rows `[B * S]`, one per sequence, as `segments.segment_sum` orders them.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; sequences do not see each other.
      discount: γ, per trained token.
      lam: λ, 1 = Monte Carlo, 0 = one step; a number, or `[B, T]` from `length_adaptive_lam`.

    Returns: advantages and returns (advantages + values), both `[B, T]`, 0 where `mask` is False.
    No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> r, v, m = jnp.array([[0., 1.]]), jnp.array([[.5, .5]]), jnp.array([[True, True]])
    >>> [x.tolist() for x in gae(r, v, m, bootstrap=jnp.zeros(1), lam=1.0)]
    [[[0.5, 0.5]], [[1.0, 1.0]]]
    """
    check_shapes(rewards=rewards, values=values, mask=mask)
    ids = segments.ids_or_ones(mask, segment_ids)
    rewards = constant(rewards, mask)
    values = constant(values, mask)
    # A sequence without a trained token has no use for its bootstrap, which may be NaN.
    end = clean(
        segments.per_token(jax.lax.stop_gradient(widen(bootstrap)), ids),
        segments.count(mask, ids) > 0,
    )
    # True where the next column belongs to the same sequence. The last column has none.
    goes_on = jnp.pad(ids[:, 1:] == ids[:, :-1], ((0, 0), (0, 1)))
    trained = mask.astype(values.dtype)

    # V carried back over untrained tokens: the value of the next trained token, or the bootstrap.
    carried = _backward(
        (1 - trained) * goes_on, trained * values + (1 - trained) * jnp.where(goes_on, 0.0, end)
    )
    next_values = jnp.where(goes_on, jnp.pad(carried[:, 1:], ((0, 0), (0, 1))), end)
    delta = rewards + discount * next_values - values
    # At an untrained token the factor is 1 and the addend 0: the recurrence passes through it.
    advantages = _backward(goes_on * (trained * discount * lam + 1 - trained), trained * delta)
    return clean(advantages, mask), clean(advantages + values, mask)


def decoupled_gae(
    rewards,
    values,
    mask,
    *,
    bootstrap,
    segment_ids=None,
    discount=1.0,
    policy_lam=0.95,
    value_lam=1.0,
) -> tuple[Array, Array]:
    """Advantages by GAE with λ_policy, returns by GAE with λ_value  (VAPO, arXiv:2504.05118).

    Args:
      rewards: `[B, T]`.
      values: `[B, T]`, the value of the state in which `tokens[:, t]` was chosen.
      mask: `[B, T]` bool, True on sampled tokens.
      bootstrap: `[B]` value after a row's last token (0 where the sequence ended); for packed rows
        `[B * S]`.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.
      discount: γ, per trained token.
      policy_lam, value_lam: λ, numbers or `[B, T]` (VAPO: `policy_lam=length_adaptive_lam(mask)`).

    Returns: advantages and returns, both `[B, T]`, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> r, v, m = jnp.array([[0., 1.]]), jnp.array([[.5, .5]]), jnp.array([[True, True]])
    >>> [x.tolist() for x in decoupled_gae(r, v, m, bootstrap=jnp.zeros(1), policy_lam=0.0)]
    [[[0.0, 0.5]], [[1.0, 1.0]]]
    """
    both = [
        gae(
            rewards,
            values,
            mask,
            bootstrap=bootstrap,
            segment_ids=segment_ids,
            discount=discount,
            lam=lam,
        )
        for lam in (policy_lam, value_lam)
    ]
    return both[0][0], both[1][1]


def length_adaptive_lam(mask, segment_ids=None, *, alpha=0.05) -> Array:
    """`λ = clip(1 - 1/(α n), 0, 1)` for a sequence of n trained tokens  (VAPO, arXiv:2504.05118).

    Args:
      mask: `[B, T]` bool, True on sampled tokens.  segment_ids: `[B, T]` int32 or None.
      alpha: α; the sum of GAE's coefficients, about 1/(1-λ), is α n.

    Returns: `[B, T]`, 0 where `mask` is False; for `gae` and `decoupled_gae`.  No gradient.

    Raises: ValueError where alpha is not above 0, TypeError where `mask` is not bool.

    >>> length_adaptive_lam(jnp.ones((1, 40), bool))[0, 0].item()
    0.5
    """
    check_positive(alpha=alpha)
    # At least 1, so that padding does not divide by 0.
    number = jnp.maximum(segments.count(mask, segment_ids), 1.0)
    return clean(jnp.clip(1 - 1 / (alpha * number), 0.0, 1.0), mask)


def returns(rewards, mask, *, bootstrap=None, segment_ids=None, discount=1.0) -> Array:
    """`R_t = r_t + γ R_{t+1}` over trained tokens alone: the discounted reward-to-go  (REINFORCE++,
    arXiv:2501.03262).

    Tokens outside the mask are passed over, as in `gae`.

    Args:
      rewards: `[B, T]`.  mask: `[B, T]` bool, True on sampled tokens.
      bootstrap: `[B]` (or `[B * S]`) value after a sequence's last token, or None for 0.
      segment_ids: `[B, T]` int32 for packed rows.  discount: γ, per trained token.

    Returns: `[B, T]`, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> returns(jnp.array([[0., 9., 1.]]), jnp.array([[True, False, True]]), discount=0.5).tolist()
    [[0.5, 0.0, 1.0]]
    """
    zeros = jnp.zeros(jnp.shape(mask))
    # A row of T columns has at most T segments: zeros for all of them fit any packing.
    bootstrap = zeros.reshape(-1) if bootstrap is None else bootstrap
    # With values of 0 and λ = 1, the returns of GAE are the discounted rewards-to-go.
    return gae(
        rewards,
        zeros,
        mask,
        bootstrap=bootstrap,
        segment_ids=segment_ids,
        discount=discount,
        lam=1.0,
    )[1]


def remax(rewards, greedy_scores, mask, *, segment_ids=None) -> Array:
    """`A_t = Σ_{u ≥ t} r_u - score of the greedy completion`  (ReMax, arXiv:2310.10505).

    Args:
      rewards: `[B, T]`.
      greedy_scores: `[B]` score of the greedy completion of the same prompt; for packed rows
        `[B * S]`.
      mask: `[B, T]` bool, True on sampled tokens.  segment_ids: `[B, T]` int32 for packed rows.

    Returns: `[B, T]`, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> remax(jnp.array([[0., 1.]]), jnp.array([0.25]), jnp.array([[True, True]])).tolist()
    [[0.75, 0.75]]
    """
    baseline = jax.lax.stop_gradient(segments.spread(widen(greedy_scores), mask, segment_ids))
    return returns(rewards, mask, segment_ids=segment_ids) - baseline


def token_rewards(scores, penalties, mask, *, segment_ids=None) -> Array:
    """`r_t = -penalty_t + 1[t is the sequence's last trained token] · score`  (arXiv:2203.02155,
    §3.5).

    Args:
      scores: `[B]` a score per sequence; for packed rows `[B * S]`, as `segments.segment_sum`
        orders them.  NaN marks one that could not be scored: it gets none.
      penalties: `[B, T]` what every token pays, for example `kl_coef * losses.kl.k1(...)`.
      mask: `[B, T]` bool, True on sampled tokens.
      segment_ids: `[B, T]` int32 for packed rows.

    Returns: `[B, T]` rewards, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> token_rewards(jnp.array([2.]), jnp.array([[.5, .25, .1]]), jnp.array([[True, True, False]])).tolist()
    [[-0.5, 1.75, 0.0]]
    """
    check_shapes(penalties=penalties, mask=mask)
    ids = segments.ids_or_ones(mask, segment_ids)
    last = segments.last_trained(mask, segment_ids)
    # A NaN score becomes 0 here; whether its row is trained is the mask's to say.
    return clean(segments.per_token(constant(scores, ~jnp.isnan(scores)), ids), last) - constant(
        penalties, mask
    )


def whiten(values, mask, *, eps=1e-8) -> Array:
    """Couples rows: `(x - mean) / √(var + eps)` over the mini-batch's trained tokens
    (arXiv:2006.05990, C67).

    Computed once per optimizer mini-batch, before it is split.

    Args:
      values: `[...]`, usually advantages `[B, T]`.
      mask: `[...]` bool, True on tokens that count.
      eps: added to the variance, which has Bessel's correction.

    Returns: `[...]`, 0 where `mask` is False; all 0 where a single token counts, or all are equal
    but for rounding.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> whiten(jnp.array([1., 3., 9.]), jnp.array([True, True, False])).tolist()
    [-0.707, 0.707, 0.0]
    """
    check_shapes(values=values, mask=mask)
    return _whitened(values, mask, eps)[0]


def whiten_rewards(rewards, mask, *, eps=1e-8) -> Array:
    """Couples rows: `(x - mean) / √(var + eps) + mean`: rewards on a common scale whose mean stays
    (arXiv:1909.08593, TRL's PPO).

    Args:
      rewards: `[...]`.
      mask: `[...]` bool, True on tokens that count.
      eps: added to the variance, which has Bessel's correction.

    Returns: `[...]`, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> whiten_rewards(jnp.array([1., 3., 9.]), jnp.array([True, True, False])).tolist()
    [1.293, 2.707, 0.0]
    """
    check_shapes(rewards=rewards, mask=mask)
    whitened, mean = _whitened(rewards, mask, eps)
    return clean(whitened + mean, mask)


def _whitened(values, mask, eps) -> tuple[Array, Array]:
    deviations, mean = centered(constant(values, mask), mask)
    # n - 1 is Bessel's correction, as TRL and verl have it; at least 1 for a single token.
    variance = (deviations**2).sum() / jnp.maximum(mask.sum() - 1, 1)
    return deviations * jax.lax.rsqrt(variance + eps), mean


def _backward(a, b) -> Array:
    """`x_t = a_t x_{t+1} + b_t` with `x_T = 0` beyond the end, along the last axis, in O(log T)
    steps.
    """
    # An associative scan takes O(log T) steps where `lax.scan` takes T. Each pair (a, b) is the map
    # x -> a x + b, and reversed, the first argument is the later stretch of columns.
    combine = lambda later, earlier: (earlier[0] * later[0], earlier[0] * later[1] + earlier[1])
    return jax.lax.associative_scan(combine, (a.astype(b.dtype), b), reverse=True, axis=b.ndim - 1)[
        1
    ]
