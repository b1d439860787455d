"""Policy-gradient surrogates, per token.

Most of them look at the policy through a ratio `r = exp(log_ratio(logprobs, old_logprobs, mask))`,
and take the function that makes it as an argument: one of `rlhf.losses.ratios`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf.losses import kl, masks, segments
from rlhf.losses._common import (
    MAX_LOG_RATIO,
    Array,
    check_clip,
    check_positive,
    check_shapes,
    clean,
    constant,
)
from rlhf.losses.ratios import (
    product_log_ratio,
    sequence_log_ratio,
    sequence_token_log_ratio,
    token_log_ratio,
)

MIN_LOG_WEIGHT = -18.420680743952367  # log 1e-8, the least log-weight of a sequence in VESPO


def reinforce(logprobs, advantages, mask) -> Array:
    """`-A log π`  (REINFORCE, Williams 1992; with `groups.gpg` advantages GPG, arXiv:2504.02546).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> reinforce(jnp.array([-1., -2.]), jnp.array([2., 1.]), jnp.array([True, False])).tolist()
    [2.0, 0.0]
    """
    check_shapes(logprobs=logprobs, advantages=advantages, mask=mask)
    # 0.0 - x and not -x, which is -0.0 at masked tokens.
    return 0.0 - constant(advantages, mask) * clean(logprobs, mask)


def clipped_surrogate(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    clip_low=0.2,
    clip_high=0.2,
    log_ratio: Callable = token_log_ratio,
) -> Array:
    """PPO's loss, `-min(r A, clip(r, 1 - ε_low, 1 + ε_high) A)` with `r = π / π_old`
    (arXiv:1707.06347, eq. 7).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on r (PPO: 0.2 and 0.2; DAPO: 0.2 and
        0.28).
      log_ratio: what makes `log r`, see the module.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or an ε outside (0, 1), TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.5, 0.5])), jnp.array([True, True])
    >>> clipped_surrogate(lp, jnp.log(jnp.array([0.25, 0.5])), jnp.array([1., 1.]), mask).tolist()
    [-1.2, -1.0]
    """
    check_clip(clip_low, clip_high)
    ratio, advantages = _ratio_and_advantages(logprobs, old_logprobs, advantages, mask, log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    # The minimum lets the clip only take gain away: a step back towards π_old keeps its gradient.
    return 0.0 - jnp.minimum(ratio * advantages, clipped * advantages)


def dual_clipped_surrogate(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    clip_low=0.2,
    clip_high=0.2,
    dual_clip=3.0,
    log_ratio: Callable = token_log_ratio,
) -> Array:
    """PPO's loss that ends at `-c A` where `A < 0`, `min(L, -c A)`  (dual-clip PPO,
    arXiv:1912.09729; verl).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the ratio, in (0, 1).
      dual_clip: c, an absolute bound on r where the advantage is negative, above 1.
      log_ratio: what makes `log r` of `(logprobs, old_logprobs, mask)`, one of `ratios`.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, an ε outside (0, 1), or a bound that is not above 1;
    TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.8])), jnp.array([True])
    >>> dual_clipped_surrogate(lp, jnp.log(jnp.array([0.1])), jnp.array([-1.]), mask).tolist()
    [3.0]
    """
    _check_bound(dual_clip=dual_clip)
    loss = clipped_surrogate(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        log_ratio=log_ratio,
    )
    advantages = constant(advantages, mask)
    # Where A < 0, PPO's loss grows with r without a bound: here it ends, and with it the gradient.
    return jnp.where(advantages < 0, jnp.minimum(loss, -dual_clip * advantages), loss)


def two_sided_surrogate(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    clip_low=0.2,
    clip_high=0.2,
    max_ratio=4.0,
    log_ratio: Callable = token_log_ratio,
) -> Array:
    """PPO's loss with a cap on the unclipped branch,
    `-min(min(r, δ) A, clip(r, 1 - ε_low, 1 + ε_high) A)`  (INTELLECT-2, arXiv:2505.07291).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the ratio, in (0, 1).
      max_ratio: δ, an absolute bound on r, above `1 + clip_high` (TRL's `delta`).
      log_ratio: what makes `log r` of `(logprobs, old_logprobs, mask)`, one of `ratios`.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, an ε outside (0, 1), or a bound that is not above 1;
    TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.8])), jnp.array([True])
    >>> two_sided_surrogate(lp, jnp.log(jnp.array([0.1])), jnp.array([-1.]), mask).tolist()
    [4.0]
    """
    check_clip(clip_low, clip_high)
    _check_bound(max_ratio=max_ratio)
    ratio, advantages = _ratio_and_advantages(logprobs, old_logprobs, advantages, mask, log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high)
    # Where A < 0 the minimum takes the unclipped branch, on which nothing bounds r but δ.
    return 0.0 - jnp.minimum(jnp.minimum(ratio, max_ratio) * advantages, clipped * advantages)


def gspo(
    logprobs, old_logprobs, advantages, mask, *, clip_low=3e-4, clip_high=4e-4, segment_ids=None
) -> Array:
    """`clipped_surrogate` of the sequence's ratio, `s = exp(mean log π/π_old)`, at each of its
    tokens  (GSPO, arXiv:2507.18071, eq. 5).

    Gradients flow from each token of a sequence to all of them: reduce by `weights.sequence_mean`.

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      advantages: `[B, T]`.
      mask: `[B, T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the ratio, in (0, 1).
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or an ε outside (0, 1), TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([[0.8, 0.2]])), jnp.array([[True, True]])
    >>> gspo(lp, jnp.log(jnp.array([[0.4, 0.4]])), jnp.array([[1., 1.]]), mask).tolist()
    [[-1.0, -1.0]]
    """
    level = functools.partial(sequence_log_ratio, segment_ids=segment_ids)
    return clipped_surrogate(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        log_ratio=level,
    )


def gspo_token(
    logprobs, old_logprobs, advantages, mask, *, clip_low=3e-4, clip_high=4e-4, segment_ids=None
) -> Array:
    """`clipped_surrogate` of the sequence's ratio with each token's own gradient: advantages may
    differ by token  (GSPO, eq. 13).

    A token's gradient is its own.

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      advantages: `[B, T]`.
      mask: `[B, T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the ratio, in (0, 1).
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or an ε outside (0, 1), TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([[0.8, 0.2]])), jnp.array([[True, True]])
    >>> gspo_token(lp, jnp.log(jnp.array([[0.4, 0.4]])), jnp.array([[1., 1.]]), mask).tolist()
    [[-1.0, -1.0]]
    """
    level = functools.partial(sequence_token_log_ratio, segment_ids=segment_ids)
    return clipped_surrogate(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        log_ratio=level,
    )


def luspo(
    logprobs, old_logprobs, advantages, mask, *, clip_low=3e-4, clip_high=4e-4, segment_ids=None
) -> Array:
    """`n · gspo` for a sequence of n tokens: its length no longer shrinks its gradient  (LUSPO,
    arXiv:2602.05261).

    Reduce by `weights.sequence_mean`.

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      advantages: `[B, T]`.
      mask: `[B, T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the ratio, in (0, 1).
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or an ε outside (0, 1), TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([[0.8, 0.2]])), jnp.array([[True, True]])
    >>> luspo(lp, jnp.log(jnp.array([[0.4, 0.4]])), jnp.array([[1., 1.]]), mask).tolist()
    [[-2.0, -2.0]]
    """
    loss = gspo(
        logprobs,
        old_logprobs,
        advantages,
        mask,
        clip_low=clip_low,
        clip_high=clip_high,
        segment_ids=segment_ids,
    )
    return segments.count(mask, segment_ids) * loss


def gmpo(
    logprobs, old_logprobs, advantages, mask, *, clip_low=0.4, clip_high=0.4, segment_ids=None
) -> Array:
    """`-Ā exp(mean x)`, x = log r bounded by `ε_high` where `A > 0` and by `-ε_low` where `A < 0`
    (GMPO, arXiv:2507.20673).

    Ā is the mean of the sequence's advantages.  Gradients flow from each token of a sequence to all
    of them.

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      advantages: `[B, T]`.
      mask: `[B, T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the log-ratio, in nats.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or a half-width not above 0, TypeError where `mask` is not
    bool.

    >>> lp, mask = jnp.log(jnp.array([[0.8, 0.2]])), jnp.array([[True, True]])
    >>> gmpo(lp, jnp.log(jnp.array([[0.4, 0.4]])), jnp.array([[1., 1.]]), mask).tolist()
    [[-0.864, -0.864]]
    """
    check_shapes(advantages=advantages, mask=mask)
    check_positive(clip_low=clip_low, clip_high=clip_high)
    advantages = constant(advantages, mask)
    x = token_log_ratio(logprobs, old_logprobs, mask)
    # One-sided bounds: a token is bounded only where it moves the way its advantage wants.
    bounded = jnp.where(
        advantages > 0,
        jnp.minimum(x, clip_high),
        jnp.where(advantages < 0, jnp.maximum(x, -clip_low), 0.0),
    )
    ratio = jnp.exp(segments.mean(bounded, mask, segment_ids))
    return 0.0 - segments.mean(advantages, mask, segment_ids) * ratio


def cispo(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    max_ratio=5.0,
    min_ratio=0.0,
    log_ratio: Callable = token_log_ratio,
) -> Array:
    """`-sg(clip(r, r_min, r_max)) A log π`: every token keeps its gradient, its weight is bounded
    (CISPO, arXiv:2506.13585, eq. 4).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      log_ratio: what makes `log r` of `(logprobs, old_logprobs, mask)`, one of `ratios`.
      max_ratio, min_ratio: absolute bounds on r, not half-widths (TRL's `epsilon_high` is
        `max_ratio`; verl's is `max_ratio - 1`).

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.  Gradients flow
    through `logprobs`, not r.

    Raises: ValueError where `max_ratio` is a half-width (at most 1) or `min_ratio` not in [0, 1),
    and on unequal shapes; TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.5])), jnp.array([True])
    >>> cispo(lp, lp - 3.0, jnp.array([1.]), mask).tolist()  # 5 · log 2
    [3.466]
    """
    _check_bound(max_ratio=max_ratio)
    if isinstance(min_ratio, int | float) and not 0 <= min_ratio < 1:
        raise ValueError(
            f"min_ratio is an absolute bound on r in [0, 1), but is {min_ratio}; for a half-width "
            "ε give 1 - ε"
        )
    ratio, advantages = _ratio_and_advantages(logprobs, old_logprobs, advantages, mask, log_ratio)
    # Bounded and detached: where PPO's clip drops a token, here it keeps a smaller gradient.
    weight = jax.lax.stop_gradient(jnp.clip(ratio, min_ratio, max_ratio))
    return 0.0 - weight * advantages * clean(logprobs, mask)


def sapo(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    tau_pos=1.0,
    tau_neg=1.05,
    log_ratio: Callable = token_log_ratio,
) -> Array:
    """`-(4/τ) σ(τ (r - 1)) A`: a soft gate in place of the clip  (SAPO, arXiv:2511.20347).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      log_ratio: what makes `log r` of `(logprobs, old_logprobs, mask)`, one of `ratios`.
      tau_pos, tau_neg: τ where the advantage is positive, and elsewhere; a higher one closes the
        gate faster.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False; at r = 1 its
    gradient is REINFORCE's.  Gradients flow through `logprobs`.

    Raises: ValueError on unequal shapes or a τ not above 0, TypeError where `mask` is not bool.

    >>> lp = jnp.log(jnp.array([0.5]))
    >>> sapo(lp, lp, jnp.array([1.]), jnp.array([True])).tolist()
    [-2.0]
    """
    check_positive(tau_pos=tau_pos, tau_neg=tau_neg)
    ratio, advantages = _ratio_and_advantages(logprobs, old_logprobs, advantages, mask, log_ratio)
    tau = jnp.where(advantages > 0, tau_pos, tau_neg)
    # The slope of σ at 0 is ¼: times 4/τ · τ, the gate has REINFORCE's gradient at r = 1.
    return 0.0 - 4.0 / tau * jax.nn.sigmoid(tau * (ratio - 1.0)) * advantages


def vespo(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    k_pos=2.0,
    lam_pos=3.0,
    k_neg=3.0,
    lam_neg=2.0,
    log_importance=None,
    segment_ids=None,
) -> Array:
    """`-sg(φ) A log π` with `φ = W^k exp(λ (1 - W))`, W the weight of the whole sequence  (VESPO,
    arXiv:2602.10693).

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      advantages: `[B, T]`.
      mask: `[B, T]` bool, True on sampled tokens.
      k_pos, lam_pos, k_neg, lam_neg: k and λ where the advantage is not negative, and where it is.
      log_importance: `[B, T]` log π_old/μ of the sampler's mismatch, which joins W; None for 0.
      segment_ids: `[B, T]` int32 for packed rows.

    Returns: `[B, T]` loss, exactly 0 (value and gradient) where `mask` is False.  Gradients flow
    through `logprobs`, not W.

    Raises: ValueError on unequal shapes or a k or λ not above 0, TypeError where `mask` is not
    bool.

    >>> lp = jnp.log(jnp.array([[0.5]]))
    >>> vespo(lp, lp, jnp.array([[1.]]), jnp.array([[True]])).tolist()  # W = 1, φ = 1
    [[0.693]]
    """
    check_shapes(log_importance=log_importance, advantages=advantages, mask=mask)
    check_positive(k_pos=k_pos, lam_pos=lam_pos, k_neg=k_neg, lam_neg=lam_neg)
    advantages = constant(advantages, mask)
    log_weight = token_log_ratio(logprobs, old_logprobs, mask)
    if log_importance is not None:
        log_weight += jnp.clip(clean(log_importance, mask), MIN_LOG_WEIGHT, MAX_LOG_RATIO)
    # A sum over a long sequence would overflow its exponential.
    log_weight = jnp.clip(
        segments.total(log_weight, mask, segment_ids), MIN_LOG_WEIGHT, MAX_LOG_RATIO
    )
    k = jnp.where(advantages < 0, k_neg, k_pos)
    lam = jnp.where(advantages < 0, lam_neg, lam_pos)
    # W^k exp(λ (1 - W)), with W^k as exp(k log W).
    phi = jnp.exp(k * log_weight + lam * (1.0 - jnp.exp(log_weight)))
    return 0.0 - jax.lax.stop_gradient(phi) * advantages * clean(logprobs, mask)


def dppo(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    *,
    threshold_low=0.2,
    threshold_high=0.2,
    divergence: Callable = kl.binary_tv,
) -> Array:
    """`-r A`, dropped where the token has moved with its advantage and `D > δ`: a trust region on
    probabilities, not ratios  (DPPO, arXiv:2602.04879).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      threshold_low, threshold_high: δ for a probability that fell (A < 0), and one that rose (A >
        0).
      divergence: D, `kl.binary_tv` or `kl.binary_kl`.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False or the token is
    dropped.  Gradients flow through `logprobs`.

    Raises: ValueError on unequal shapes or a δ not above 0, TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([0.75, 0.75])), jnp.array([True, True])
    >>> dppo(lp, jnp.log(jnp.array([0.25, 0.6])), jnp.array([1., 1.]), mask).tolist()
    [0.0, -1.25]
    """
    check_positive(threshold_low=threshold_low, threshold_high=threshold_high)
    ratio, advantages = _ratio_and_advantages(
        logprobs, old_logprobs, advantages, mask, token_log_ratio
    )
    moved = divergence(logprobs, old_logprobs, mask)
    # A token that moves back towards π_old is never dropped, however far it is.
    dropped = (advantages > 0) & (ratio > 1) & (moved > threshold_high)
    dropped |= (advantages < 0) & (ratio < 1) & (moved > threshold_low)
    return clean(-ratio * advantages, mask & ~dropped)


def topr(logprobs, old_logprobs, advantages, mask, *, segment_ids=None) -> Array:
    """`-A log π` where `A ≥ 0`, `-sg(min(W, 1)) A log π` where `A < 0`, W the weight of the whole
    sequence  (TOPR, arXiv:2503.14286).

    No gradient flows through W.

    Args:
      logprobs: `[B, T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[B, T]` the same tokens under the policy that sampled them.
      advantages: `[B, T]`.
      mask: `[B, T]` bool, True on sampled tokens.
      segment_ids: `[B, T]` int32 for packed rows, 0 = padding; None: a row is one sequence.

    Returns: `[B, T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> lp, mask = jnp.log(jnp.array([[0.5]])), jnp.array([[True]])
    >>> topr(lp, jnp.log(jnp.array([[0.1]])), jnp.array([[-1.]]), mask).tolist()
    [[-0.693]]
    """
    # The weight of a sequence is the product of its tokens' ratios.
    level = functools.partial(product_log_ratio, segment_ids=segment_ids)
    weight, advantages = _ratio_and_advantages(logprobs, old_logprobs, advantages, mask, level)
    # Good samples keep a weight of 1, however unlikely they have become; bad ones taper off.
    tapered = jnp.where(advantages < 0, jax.lax.stop_gradient(jnp.minimum(weight, 1.0)), 1.0)
    return 0.0 - tapered * advantages * clean(logprobs, mask)


def m2po(logprobs, old_logprobs, advantages, mask, *, threshold=0.04) -> Array:
    """Couples rows: `-r A` on tokens of `masks.second_moment`, which bounds the batch's mean of
    `(log r)²`  (M2PO, arXiv:2510.01161).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      threshold: the most that the mean squared log-ratio may be.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or a threshold not above 0, TypeError where `mask` is not
    bool.

    >>> lp, mask = jnp.log(jnp.array([0.5, 0.5])), jnp.array([True, True])
    >>> m2po(lp, jnp.log(jnp.array([0.05, 0.5])), jnp.array([1., 1.]), mask).tolist()
    [0.0, -1.0]
    """
    ratio, advantages = _ratio_and_advantages(
        logprobs, old_logprobs, advantages, mask, token_log_ratio
    )
    return clean(
        -ratio * advantages, masks.second_moment(logprobs, old_logprobs, mask, threshold=threshold)
    )


def decoupled_surrogate(
    logprobs, proximal_logprobs, advantages, mask, *, importance, clip_low=0.2, clip_high=0.2
) -> Array:
    """`ρ · clipped_surrogate(π / π_prox)` with `ρ = π_prox / μ`: a trust region around π_prox, data
    from μ
    (decoupled PPO, arXiv:2110.00641).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats; the only argument gradients flow
        through.
      advantages: `[..., T]`.
      mask: `[..., T]` bool, True on sampled tokens.
      clip_low, clip_high: ε, half-widths of the trust region on the ratio, in (0, 1).
      proximal_logprobs: `[..., T]` the sampled tokens under the policy at the start of the update.
      importance: `[..., T]` ρ, from
        `importance.weights(proximal_logprobs, sampling_logprobs, mask)`, truncated or not.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.  Gradients flow
    through `logprobs`, not `importance`.

    Raises: ValueError on unequal shapes or an ε outside (0, 1), TypeError where `mask` is not bool.

    >>> lp = jnp.log(jnp.array([0.5]))
    >>> decoupled_surrogate(lp, lp, jnp.array([1.]), jnp.array([True]), importance=jnp.array([0.5])).tolist()
    [-0.5]
    """
    check_shapes(
        logprobs=logprobs,
        proximal_logprobs=proximal_logprobs,
        advantages=advantages,
        importance=importance,
        mask=mask,
    )
    loss = clipped_surrogate(
        logprobs, proximal_logprobs, advantages, mask, clip_low=clip_low, clip_high=clip_high
    )
    return constant(importance, mask) * loss


def _check_bound(**values) -> None:
    """Raises where an absolute bound on a ratio is given as a half-width; traced values are
    trusted.
    """
    for name, value in values.items():
        if isinstance(value, int | float) and not value > 1:
            raise ValueError(
                f"{name} is an absolute bound on r, above 1, but is {value}; for a half-width ε "
                "give 1 + ε"
            )


def _ratio_and_advantages(
    logprobs, old_logprobs, advantages, mask, log_ratio
) -> tuple[Array, Array]:
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, mask=mask)
    log_r = log_ratio(logprobs, old_logprobs, mask)
    # One number a sequence, from a function of the user's, would broadcast without a word.
    check_shapes(log_ratio=log_r, mask=mask)
    return jnp.exp(log_r), constant(advantages, mask)
