"""Which tokens count: masks that narrow a loss.  All are bool, and none is differentiated.

Give a narrowed mask to the objective, and the *whole* mask to the weights: what is left out then
shrinks the gradient, and never makes the rest count more.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf.losses import kl, segments
from rlhf.losses._common import Array, check_positive, check_shapes, quantile, widen


def finished_only(mask, finished, segment_ids=None) -> Array:
    """Drops sequences that were cut at the length limit: `m_t · 1[sequence ended]`
    (DAPO's overlong filtering, arXiv:2503.14476).

    Args:
      mask: `[B, T]` bool, True on sampled tokens.
      finished: `[B]` bool, or `[B * S]` for packed rows as `segments.segment_sum` orders them.
      segment_ids: `[B, T]` int32 or None.

    Returns: `[B, T]` bool.  The group's baseline still counts the sequence.

    Raises: ValueError where `finished` has no whole number of entries per row, TypeError where
    `mask` is not bool.

    >>> finished_only(jnp.array([[True, True], [True, True]]), jnp.array([True, False])).tolist()
    [[True, True], [False, False]]
    """
    check_shapes(segment_ids=segment_ids, mask=mask)
    # `spread` turns flags into numbers, hence the comparison.
    return mask & (segments.spread(finished, mask, segment_ids) > 0)


def on_policy_enough(
    logprobs, sampling_logprobs, advantages, mask, *, threshold, segment_ids=None
) -> Array:
    """Keeps a token where `A ≥ 0`, or where its sequence's mean `log μ - log π ≤ δ`
    (DeepSeek-V3.2's off-policy sequence mask).

    Args:
      logprobs: `[B, T]` log π of the sampled tokens.
      sampling_logprobs: `[B, T]` the same under the policy that sampled them.
      advantages: `[B, T]`.  mask: `[B, T]` bool.
      threshold: δ, nats a token.  segment_ids: `[B, T]` int32 or None.

    Returns: `[B, T]` bool, False where `mask` is.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> lp, mask = jnp.array([[-2.], [-2.]]), jnp.array([[True], [True]])
    >>> on_policy_enough(lp, lp + 1.0, jnp.array([[1.], [-1.]]), mask, threshold=0.5).tolist()
    [[True], [False]]
    """
    check_shapes(
        logprobs=logprobs, sampling_logprobs=sampling_logprobs, advantages=advantages, mask=mask
    )
    # k1 with its arguments swapped: log μ - log π.
    drift = segments.mean(kl.k1(sampling_logprobs, logprobs, mask), mask, segment_ids)
    return mask & ((advantages >= 0) | (drift <= threshold))


def top_entropy(entropy, mask, *, share=0.2) -> Array:
    """Couples rows: keeps tokens whose entropy is at least the batch's `1 - share` quantile
    (arXiv:2506.01939).

    Args:
      entropy: `[...]` nats, of the policy where each token was chosen.
      mask: `[...]` bool, True on sampled tokens.
      share: of the trained tokens, in (0, 1].  The quantile is interpolated linearly.

    Returns: `[...]` bool, False where `mask` is.

    Raises: ValueError on unequal shapes or a share outside (0, 1], TypeError where `mask` is not
    bool.

    >>> top_entropy(jnp.array([0.1, 2.0, 1.0, 9.0]), jnp.array([True, True, True, False]), share=0.4).tolist()
    [False, True, False, False]
    """
    check_shapes(entropy=entropy, mask=mask)
    if isinstance(share, int | float) and not 0 < share <= 1:
        raise ValueError(f"share of the tokens must be in (0, 1], but is {share}")
    entropy = widen(entropy)
    return mask & (entropy >= quantile(entropy.reshape(-1), mask.reshape(-1), 1 - share)[0])


def second_moment(logprobs, old_logprobs, mask, *, threshold=0.04) -> Array:
    """Couples rows: drops the tokens of largest `(log π/π_old)²` until the mean of the rest is at
    most τ  (M2PO, arXiv:2510.01161).

    Args:
      logprobs: `[...]` log π of the sampled tokens.
      old_logprobs: `[...]` the same under the policy that sampled them.
      mask: `[...]` bool, True on sampled tokens.
      threshold: τ, squared nats.

    Returns: `[...]` bool, False where `mask` is.

    Raises: ValueError on unequal shapes or a threshold not above 0, TypeError where `mask` is not
    bool.

    >>> second_moment(jnp.array([-1., -1.]), jnp.array([-1.1, -3.]), jnp.array([True, True])).tolist()
    [True, False]
    """
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    check_positive(threshold=threshold)
    moment = jnp.where(mask, kl.k1(logprobs, old_logprobs, mask) ** 2, jnp.inf)
    ordered = jnp.sort(moment.reshape(-1))
    # The mean of the n smallest, for every n.
    means = jnp.cumsum(jnp.where(jnp.isinf(ordered), 0.0, ordered)) / (1 + jnp.arange(ordered.size))
    # These means only grow with n, so that those below τ are the first ones.
    remaining = jnp.sum((means <= threshold) & jnp.isfinite(ordered))
    return mask & (
        jnp.argsort(jnp.argsort(moment.reshape(-1))).reshape(jnp.shape(mask)) < remaining
    )


def within(
    values, mask, *, low=-jnp.inf, high=jnp.inf, pool: Callable | None = None, segment_ids=None
) -> Array:
    """Keeps a token where `low ≤ statistic ≤ high`, its own or its sequence's: a rejection window.

    Args:
      values: `[B, T]`, for example `kl.k1(old_logprobs, sampling_logprobs, mask)` with bounds
        `log 0.5` and `log 2`, or `importance.weights(…)` with bounds of the ratio itself.
      mask: `[B, T]` bool.
      low, high: the window, its ends included.
      pool: `segments.total`, `segments.mean` or `segments.largest` for a sequence's; None for the
        token's own.
      segment_ids: `[B, T]` int32 or None.

    Returns: `[B, T]` bool, False where `mask` is.  Several windows are joined by `&`.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> within(jnp.array([[0.5, 3.0]]), jnp.array([[True, True]]), high=2.0).tolist()
    [[True, False]]
    """
    check_shapes(values=values, segment_ids=segment_ids, mask=mask)
    statistic = values if pool is None else pool(values, mask, segment_ids)
    return mask & (statistic >= low) & (statistic <= high)


def top(values, mask, *, number) -> Array:
    """Couples rows: the `number` largest values where `mask` is True; ties go to the first.

    Args:
      values: `[...]`.  mask: `[...]` bool.
      number: `[]`, how many; it may be traced.

    Returns: `[...]` bool, False where `mask` is.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> top(jnp.array([1., 3., 2., 9.]), jnp.array([True, True, True, False]), number=2).tolist()
    [False, True, True, False]
    """
    check_shapes(values=values, mask=mask)
    # Ranks by two sorts, since `top_k` needs a number that is known when it is compiled. Sorts are
    # stable: of equal values the first wins.
    ranked = jnp.where(mask, -widen(values), jnp.inf).reshape(-1)
    return mask & (jnp.argsort(jnp.argsort(ranked)).reshape(jnp.shape(mask)) < number)
