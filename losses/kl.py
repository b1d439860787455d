"""Per-token estimates of KL(π ‖ π_ref) from the log-probs of sampled tokens  (Schulman,
"Approximating KL divergence", 2020).

An estimator whose *value* is right need not have the right *gradient*: inside a loss and on policy,
`k1` has expected gradient 0, `k2` has that of the reverse KL, `k3` that of the forward KL.
`straight_through` and `score_function` give any estimator the reverse KL's gradient, and
`bias_corrected` gives value and gradient off policy.  In a reward none of them is differentiated.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array, bounded_difference, check_shapes, constant, widen
from rlhf.losses.ratios import token_log_ratio


def k1(logprobs, ref_logprobs, mask) -> Array:
    """The log-ratio, `log π - log π_ref`: unbiased, high variance, may be negative.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      ref_logprobs: `[..., T]` the same tokens under the reference.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]` nats, within ±20; exactly 0 (value and gradient) where `mask` is False.
    Gradients flow through both log-probs.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> k1(jnp.array([-1., -2.]), jnp.array([-2., -2.]), jnp.array([True, True])).tolist()
    [1.0, 0.0]
    """
    check_shapes(logprobs=logprobs, ref_logprobs=ref_logprobs, mask=mask)
    return bounded_difference(logprobs, ref_logprobs, mask)


def k2(logprobs, ref_logprobs, mask) -> Array:
    """Half the squared log-ratio, `(log π - log π_ref)² / 2`: biased, and on policy its gradient is
    the reverse KL's.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      ref_logprobs: `[..., T]` the same tokens under the reference.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]` nats, at least 0.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> k2(jnp.array([-1., -2.]), jnp.array([-2., -2.]), jnp.array([True, True])).tolist()
    [0.5, 0.0]
    """
    return k1(logprobs, ref_logprobs, mask) ** 2 / 2


def k3(logprobs, ref_logprobs, mask) -> Array:
    """`π_ref/π - 1 - log(π_ref/π)`: unbiased, at least 0, low variance  (GRPO, arXiv:2402.03300,
    eq. 4).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      ref_logprobs: `[..., T]` the same tokens under the reference.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]` nats, at least 0.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> k3(jnp.array([-1., -2.]), jnp.array([-1., -2.]), jnp.array([True, True])).tolist()
    [0.0, 0.0]
    """
    difference = -k1(logprobs, ref_logprobs, mask)
    return jnp.expm1(difference) - difference


def absolute(logprobs, ref_logprobs, mask) -> Array:
    """`|log π - log π_ref|`, a distance and no estimate of the KL  (trlX and TRL's classic PPO,
    `abs`).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      ref_logprobs: `[..., T]` the same tokens under the reference.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]` nats, at least 0.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> absolute(jnp.array([-3., -2.]), jnp.array([-2., -2.]), jnp.array([True, True])).tolist()
    [1.0, 0.0]
    """
    difference = k1(logprobs, ref_logprobs, mask)
    # Not `jnp.abs`, whose gradient is 1 at 0: on policy nothing may pull.
    return difference * jnp.sign(difference)


def full(logits, ref_logits) -> Array:
    """`Σ_v π_v (log π_v - log π_ref,v)`: the KL itself, over the vocabulary; a function for
    `chunked`.

    Args:
      logits: `[..., V]` of the policy; minus infinity is a probability of 0.
      ref_logits: `[..., V]` of the reference, which must allow what the policy allows.

    Returns: `[...]` nats, at least 0.  Gradients flow through both.

    Raises: ValueError on unequal shapes.

    >>> full(jnp.zeros((1, 2)), jnp.log(jnp.array([[0.25, 0.75]]))).tolist()
    [0.144]
    """
    check_shapes(ref_logits=ref_logits, logits=logits)
    logprobs, ref_logprobs = (jax.nn.log_softmax(widen(x), axis=-1) for x in (logits, ref_logits))
    possible = logprobs > -jnp.inf
    # A token of probability 0 adds nothing; 0 · (-inf) would be NaN.
    difference = jnp.where(possible, logprobs, 0.0) - jnp.where(possible, ref_logprobs, 0.0)
    return jnp.sum(jnp.exp(logprobs) * difference, axis=-1)


def straight_through(logprobs, ref_logprobs, mask, *, estimator: Callable = k3) -> Array:
    """The estimator's value with `k2`'s gradient, `k2 + sg(estimator - k2)`: on policy, the reverse
    KL's
    (verl's `k1+`, `k3+`).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      ref_logprobs: `[..., T]` the same tokens under the reference.
      mask: `[..., T]` bool, True on sampled tokens.
      estimator: `k1`, `k2`, `k3`, `absolute` or any of their signature.

    Returns: `[..., T]` nats, exactly 0 (value and gradient) where `mask` is False.  Gradients flow
    through both log-probs.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> straight_through(jnp.array([-1.]), jnp.array([-2.]), jnp.array([True])).tolist()
    [0.368]
    """
    # The value is the estimator's, since `path` cancels; the gradient is that of `path` alone.
    path = k2(logprobs, ref_logprobs, mask)
    return path + jax.lax.stop_gradient(estimator(logprobs, ref_logprobs, mask) - path)


def score_function(logprobs, ref_logprobs, mask, *, estimator: Callable = k3) -> Array:
    """`exp(log π - sg(log π)) · estimator`: its gradient gains the score-function term
    `estimator · ∇log π`
    (arXiv:2506.09477; NeMo RL).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      ref_logprobs: `[..., T]` the same tokens under the reference.
      mask: `[..., T]` bool, True on sampled tokens.
      estimator: `k1`, `k2`, `k3`, `absolute` or any of their signature.

    Returns: `[..., T]` nats, exactly 0 (value and gradient) where `mask` is False.  Gradients flow
    through both log-probs; on policy the expected one is the exact one of the reverse KL.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> score_function(jnp.array([-1.]), jnp.array([-2.]), jnp.array([True])).tolist()
    [0.368]
    """
    # The old side of a ratio is constant: its value is 1 here, its gradient that of log π.
    return bias_corrected(logprobs, ref_logprobs, logprobs, mask, estimator=estimator)


def bias_corrected(
    logprobs,
    ref_logprobs,
    old_logprobs,
    mask,
    *,
    estimator: Callable = k3,
    log_ratio: Callable = token_log_ratio,
) -> Array:
    """`(π / π_old) · estimator`, for tokens that an older policy sampled  (DeepSeek-V3.2; TRL's
    `use_bias_correction_kl`).

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      ref_logprobs: `[..., T]` the same tokens under the reference.
      mask: `[..., T]` bool, True on sampled tokens.
      estimator: `k1`, `k2`, `k3`, `absolute` or any of their signature.
      old_logprobs: `[..., T]` the sampled tokens under the policy that sampled them.
      log_ratio: what makes `log π/π_old`, as in `policy.clipped_surrogate`.

    Returns: `[..., T]` nats, exactly 0 (value and gradient) where `mask` is False.  Gradients flow
    through `logprobs`, by the ratio too, and through `ref_logprobs`.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> bias_corrected(jnp.array([-1.]), jnp.array([-2.]), jnp.array([-1.7]), jnp.array([True])).tolist()
    [0.741]
    """
    return jnp.exp(log_ratio(logprobs, old_logprobs, mask)) * estimator(
        logprobs, ref_logprobs, mask
    )


def binary_tv(logprobs, old_logprobs, mask) -> Array:
    """`|π - π_old|` of the sampled token: the total variation between "this token" and "another".

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]` in [0, 1], 0 where `mask` is False.  Gradients flow through neither.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> binary_tv(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), jnp.array([True])).tolist()
    [0.25]
    """
    new, old = _probabilities(logprobs, old_logprobs, mask)
    return jnp.abs(new - old)


def binary_kl(logprobs, old_logprobs, mask) -> Array:
    """`KL(π_old ‖ π)` in nats between "this token" and "another", of the sampled token.

    Args:
      logprobs: `[..., T]` log π of the sampled tokens, in nats.
      old_logprobs: `[..., T]` the same tokens under the policy that sampled them.
      mask: `[..., T]` bool, True on sampled tokens.

    Returns: `[..., T]`, at least 0, and 0 where `mask` is False.  Gradients flow through neither.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> binary_kl(jnp.log(jnp.array([0.5])), jnp.log(jnp.array([0.25])), jnp.array([True])).tolist()
    [0.131]
    """
    new, old = _probabilities(logprobs, old_logprobs, mask)
    this = old * -jax.lax.stop_gradient(token_log_ratio(logprobs, old_logprobs, mask))
    # A confident policy has a float32 probability of exactly 1, where log(1 - p) ends.
    other = (1 - old) * (
        jnp.log1p(-jnp.minimum(old, 1 - 1e-7)) - jnp.log1p(-jnp.minimum(new, 1 - 1e-7))
    )
    # Rounding alone could take a divergence below 0.
    return jnp.maximum(this + other, 0.0)


def _probabilities(logprobs, old_logprobs, mask) -> tuple[Array, Array]:
    check_shapes(logprobs=logprobs, old_logprobs=old_logprobs, mask=mask)
    return jnp.exp(constant(logprobs, mask)), jnp.exp(constant(old_logprobs, mask))
