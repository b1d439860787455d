"""Preference objectives on single completions, each with a label: desirable or not.

From sequence log-probs (sums over a completion's tokens, in nats); per row.
"""

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, check_positive, check_shapes, constant, widen


def kto(
    logprobs, ref_logprobs, desirable, kl, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
) -> Array:
    """`λ_D (1 - σ(β (x - KL)))` where desirable, `λ_U (1 - σ(β (KL - x)))` elsewhere, x = log π -
    log ref  (KTO, arXiv:2402.01306, eq. 7).

    Args:
      logprobs: `[...]` sequence log-probs under the policy; the only argument gradients flow
        through.
      ref_logprobs: `[...]` the same under the reference.
      desirable: `[...]` bool, the label.
      kl: `[]` nats, how far the policy is from the reference, from `kto_kl`.
      beta: strength of the pull towards the reference, per nat.
      desirable_weight, undesirable_weight: λ; with n rows of each label, `λ_D n_D / (λ_U n_U)` is
        best in [1, 4/3].

    Returns: `[...]` loss, in (0, λ); λ/2 where policy and reference agree.

    Raises: ValueError on unequal shapes, a `kl` that is not a scalar, or an option not above 0;
    TypeError where `desirable` is not bool.

    >>> lp, labels = jnp.array([-7.0, -7.0]), jnp.array([True, False])
    >>> kto(lp, lp, labels, jnp.array(0.0), undesirable_weight=1.2).tolist()
    [0.5, 0.6]
    """
    check_positive(desirable_weight=desirable_weight, undesirable_weight=undesirable_weight)
    above = _rewards(logprobs, ref_logprobs, desirable, beta) - beta * _scalar("kl", kl)
    # Both branches are one sigmoid: 1 - σ(z) is σ(-z).
    return jnp.where(desirable, desirable_weight, undesirable_weight) * jax.nn.sigmoid(
        jnp.where(desirable, -above, above)
    )


def kto_kl(logprobs, ref_logprobs, mask=None) -> Array:
    """Couples rows: `max(0, mean(log π(y'|x) - log ref(y'|x)))`, y' another row's completion  (KTO,
    arXiv:2402.01306).

    Give it the whole mini-batch: it comes before the split into micro-batches, or inside
    `rlhf.coupled_train_step`.

    Args:
      logprobs: `[...]` sequence log-probs under the policy of completions of other
        prompts, such as the next row's.
      ref_logprobs: `[...]` the same under the reference.
      mask: `[...]` bool, True on rows that count, or None for all.

    Returns: `[]` nats, 0 where no row counts.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> kto_kl(jnp.array([-7.0, -5.0]), jnp.array([-8.0, -8.0])).item()
    2.0
    """
    mask = jnp.ones(jnp.shape(logprobs), bool) if mask is None else mask
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    total = jnp.sum(constant(logprobs, mask) - constant(ref_logprobs, mask))
    # A KL is at least 0; its estimate from mismatched pairs may be below.
    return jnp.maximum(total / jnp.maximum(mask.sum(), 1), 0.0)


def apo_zero(
    logprobs, ref_logprobs, desirable, *, beta=0.1, desirable_weight=1.0, undesirable_weight=1.0
) -> Array:
    """`λ_D (1 - σ(β x))` where desirable, `λ_U σ(β x)` elsewhere, x = log π - log ref  (APO-zero,
    unpaired, arXiv:2408.06266).

    It is `kto` with a KL of 0.

    Args:
      logprobs: `[...]` sequence log-probs under the policy; the only argument gradients flow
        through.
      ref_logprobs: `[...]` the same under the reference.
      desirable: `[...]` bool, the label.
      beta: strength of the pull towards the reference, per nat.
      desirable_weight, undesirable_weight: λ of each label.

    Returns: `[...]` loss, in (0, λ); λ/2 where policy and reference agree.

    Raises: ValueError on unequal shapes, or an option not above 0; TypeError where `desirable` is
    not bool.

    >>> lp, labels = jnp.array([-7.0, -7.0]), jnp.array([True, False])
    >>> apo_zero(lp, lp, labels).tolist()
    [0.5, 0.5]
    """
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    # APO-zero is KTO whose reference point is 0.
    return kto(logprobs, ref_logprobs, desirable, jnp.zeros(()), beta=beta, **weights)


def bco(logprobs, ref_logprobs, desirable, shift, *, beta=0.1) -> Array:
    """`-log σ(β x - δ)` where desirable, `-log σ(-(β x - δ))` elsewhere, x = log π - log ref  (BCO,
    arXiv:2404.04656).

    Where undesirable rows have other prompts than desirable ones, multiply by `density_ratio`.

    Args:
      logprobs: `[...]` sequence log-probs under the policy; the only argument gradients flow
        through.
      ref_logprobs: `[...]` the same under the reference.
      desirable: `[...]` bool, the label.
      beta: strength of the pull towards the reference, per nat.
      shift: `[]` δ, the mean of the rewards `β x` so far: `update` a `moments.running()` with this
        mini-batch's first.

    Returns: `[...]` loss; ln 2 where the reward is δ.  Gradients flow through `logprobs`.

    Raises: ValueError on unequal shapes, a `shift` that is not a scalar, or a beta not above 0;
    TypeError where `desirable` is not bool.

    >>> lp, labels = jnp.array([-7.0, -7.0]), jnp.array([True, False])
    >>> bco(lp, lp, labels, jnp.array(0.0)).tolist()
    [0.693, 0.693]
    """
    above = _rewards(logprobs, ref_logprobs, desirable, beta) - _scalar("shift", shift)
    return -jax.nn.log_sigmoid(jnp.where(desirable, above, -above))


def density_ratio(probability, desirable, *, min_ratio=0.5, max_ratio=10.0) -> Array:
    """`clip(p / (1 - p), min, max)` where undesirable, 1 elsewhere: undesirable rows weighted to
    the desirable ones' prompts  (BCO, arXiv:2404.04656).

    Args:
      probability: `[...]` p, a classifier's probability that the prompt is one of a desirable row.
      desirable: `[...]` bool, the label.
      min_ratio, max_ratio: absolute bounds of the ratio.

    Returns: `[...]` weights.  No gradient.

    Raises: ValueError on unequal shapes or bounds that are not `0 < min_ratio <= max_ratio`;
    TypeError where `desirable` is not bool.

    >>> density_ratio(jnp.array([0.75, 0.75, 1.0]), jnp.array([True, False, False])).tolist()
    [1.0, 3.0, 10.0]
    """
    check_positive(min_ratio=min_ratio, max_ratio=max_ratio)
    if (
        all(isinstance(bound, int | float) for bound in (min_ratio, max_ratio))
        and min_ratio > max_ratio
    ):
        raise ValueError(f"min_ratio {min_ratio} is above max_ratio {max_ratio}: swap them")
    check_shapes(desirable=desirable, probability=probability)
    _check_label(desirable)
    probability = jax.lax.stop_gradient(widen(probability))
    # The small number keeps p = 1 finite; the clip then bounds it.
    ratio = probability / (1.0 - probability + 1e-8)
    return jnp.where(desirable, 1.0, jnp.clip(ratio, min_ratio, max_ratio))


def _rewards(logprobs, ref_logprobs, desirable, beta) -> Array:
    """`β (log π - log ref)`."""
    check_positive(beta=beta)
    check_shapes(ref_logprobs=ref_logprobs, desirable=desirable, logprobs=logprobs)
    _check_label(desirable)
    return beta * (widen(logprobs) - jax.lax.stop_gradient(widen(ref_logprobs)))


def _check_label(desirable) -> None:
    if jnp.result_type(desirable) != jnp.bool_:
        raise TypeError(
            f"desirable must be bool, True on desirable rows, but is {jnp.result_type(desirable)}"
        )


def _scalar(name, x) -> Array:
    """`x` without a gradient; raises where it is not one number."""
    if jnp.shape(x) != ():
        raise ValueError(
            f"{name} must be one number for the batch, [], but is {list(jnp.shape(x))}"
        )
    return jax.lax.stop_gradient(widen(x))
