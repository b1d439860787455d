"""Preference objectives on completions that are sampled as training goes.

Online DPO is an objective of `preference` on the pairs that `pairs_by_score` chooses.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf.losses import preference, segments
from rlhf.losses._common import Array, check_positive, check_shapes, clean, constant, widen
from rlhf.losses.ratios import token_log_ratio


def pairs_by_score(scores) -> tuple[Array, Array, Array]:
    """`(argmax_g s, argmin_g s, max_g s - min_g s)`: the best and the worst completion of each
    prompt
    (online DPO, arXiv:2402.04792).

    Args:
      scores: `[P, G]` of G completions a prompt, at least 2; NaN where one could not be scored.

    Returns: chosen and rejected, `[P]` int32 in [0, G): of equal scores the first is chosen and the
    last rejected.  And the margin, `[P]`, 0 where there is nothing to prefer: in ties, and where
    fewer than two are scored, whose pair means nothing.  No gradient.

    Raises: ValueError where G is below 2.

    >>> chosen, rejected, margin = pairs_by_score(jnp.array([[1.0, 3.0, 2.0], [0.5, 0.5, 0.5]]))
    >>> chosen.tolist(), rejected.tolist(), margin.tolist()
    ([1, 0], [0, 2], [2.0, 0.0])
    >>> jnp.take_along_axis(jnp.array([[-7., -8., -9.], [-1., -2., -3.]]), chosen[:, None], axis=1)[:, 0].tolist()
    [-8.0, -1.0]
    """
    if jnp.ndim(scores) != 2 or scores.shape[1] < 2:
        raise ValueError(
            "scores must be [P, G] with G of at least 2, to choose a pair from, but are "
            f"{list(jnp.shape(scores))}"
        )
    scored = ~jnp.isnan(scores)
    scores = constant(scores, scored)
    chosen = jnp.argmax(jnp.where(scored, scores, -jnp.inf), axis=1)
    # The last of the smallest, by the reversed scores: in a tie, a pair of two completions.
    rejected = scores.shape[1] - 1 - jnp.argmin(jnp.where(scored, scores, jnp.inf)[:, ::-1], axis=1)
    picked = [
        jnp.take_along_axis(scores, index[:, None], axis=1)[:, 0] for index in (chosen, rejected)
    ]
    return chosen, rejected, picked[0] - picked[1]


def xpo(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    *,
    from_reference,
    alpha=1e-5,
    loss: Callable = preference.sigmoid,
) -> Array:
    """`L(c, r) + α log π(y_ref)`: DPO that is optimistic about what the reference would not say
    (XPO, arXiv:2405.21046, algorithm 1).

    Each pair is one completion of the policy and one of the reference, the better one chosen.

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      from_reference: `[...]` the policy's log-prob of that completion of the pair which the
        reference sampled: `chosen` or `rejected` again; gradients flow through it.
      alpha: α, the weight of optimism.
      loss: L, an objective of `preference`, with its options bound by `functools.partial`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes, or where L refuses its options.

    >>> lp = jnp.array([-7.0])
    >>> xpo(lp, lp, lp, lp, from_reference=lp, alpha=0.1).tolist()  # log 2 - 0.7
    [-0.0069]
    """
    check_shapes(from_reference=from_reference, chosen=chosen)
    pairs = loss(chosen, rejected, ref_chosen, ref_rejected)
    # A loss that is reduced already would be added to every pair.
    check_shapes(loss=pairs, chosen=chosen)
    return pairs + alpha * widen(from_reference)


def nash_md(logprobs, ref_logprobs, mask, *, preferred, beta=0.1, segment_ids=None) -> Array:
    """`(β sg(log π - log ref) - (P - ½)) log π`  (Nash-MD, arXiv:2312.00886).

    The gradient of a regularised preference game, completion against opponent; the opponent samples
    from the geometric mixture of policy and reference.  Reduce by `weights.sequence_sum`.

    Args:
      logprobs: `[B, T]` log π of the policy's tokens, in nats; the only argument gradients flow
        through.
      ref_logprobs: `[B, T]` the same tokens under the reference.
      mask: `[B, T]` bool, True on sampled tokens.
      preferred: `[B]` P, the probability that a completion is preferred to its opponent's, such as
        `jax.nn.sigmoid(score - opponent_score)`; for packed rows `[B * S]`, as
        `segments.segment_sum` orders them.
      beta: strength of the pull towards the reference.
      segment_ids: `[B, T]` int32 for packed rows.

    Returns: `[B, T]` loss, exactly 0 (value and gradient) where `mask` is False; its value means
    nothing, its gradient does.

    Raises: ValueError on unequal shapes or a beta not above 0, TypeError where `mask` is not bool.

    >>> lp, mask = jnp.array([[-1.0, -2.0]]), jnp.array([[True, True]])
    >>> nash_md(lp, lp, mask, preferred=jnp.array([0.75])).tolist()
    [[0.25, 0.5]]
    """
    check_positive(beta=beta)
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    pull = beta * token_log_ratio(constant(logprobs, mask), ref_logprobs, mask)
    advantages = segments.spread(jax.lax.stop_gradient(widen(preferred)) - 0.5, mask, segment_ids)
    return (pull - advantages) * clean(logprobs, mask)
