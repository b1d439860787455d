"""Learning from logged data: implicit Q-learning for language, selection of samples, optimal
values.
"""

import jax
import jax.numpy as jnp

from rlhf.losses._common import (
    MAX_LOG_RATIO,
    Array,
    check_positive,
    check_shapes,
    clean,
    constant,
    quantile,
    widen,
)
from rlhf.losses.advantages import gae
from rlhf.losses.logits import token_logprob


def td_targets(rewards, values, mask, *, discount=0.99, segment_ids=None) -> Array:
    """`y_t = r_t + γ V_{t+1}`, 0 beyond the last trained token  (ILQL, arXiv:2206.11871).

    Args:
      rewards: `[B, T]`.
      values: `[B, T]`, the value of the state in which `tokens[:, t]` was chosen.
      mask: `[B, T]` bool, True on actions.
      discount: γ.  segment_ids: `[B, T]` int32 for packed rows.

    Returns: `[B, T]`, 0 where `mask` is False.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> td_targets(jnp.array([[0., 1.]]), jnp.array([[.5, .5]]), jnp.array([[True, True]]), discount=1.0).tolist()
    [[0.5, 1.0]]
    """
    # A bootstrap of 0 for every sequence; a packed row of T columns has at most T.
    slots = 1 if segment_ids is None else jnp.shape(mask)[1]
    nothing = jnp.zeros(jnp.shape(mask)[0] * slots)
    # With λ = 0 the returns of GAE are r + γ V, the one-step targets.
    return gae(
        rewards,
        values,
        mask,
        bootstrap=nothing,
        segment_ids=segment_ids,
        discount=discount,
        lam=0.0,
    )[1]


def q_loss(q_values, targets, mask) -> Array:
    """`(Q - y)²`, of each Q head  (ILQL, arXiv:2206.11871).

    Args:
      q_values: `[..., T]` Q of the chosen tokens; the only argument gradients flow through.
      targets: `[..., T]` y, from `td_targets`.  mask: `[..., T]` bool, True on actions.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> q_loss(jnp.array([1.0]), jnp.array([0.5]), jnp.array([True])).tolist()
    [0.25]
    """
    check_shapes(q_values=q_values, targets=targets, mask=mask)
    return jnp.square(clean(q_values, mask) - constant(targets, mask))


def expectile_value_loss(values, targets, mask, *, tau=0.7) -> Array:
    """`|τ - 1[u < 0]| u²`, `u = target - V`: V becomes the τ-expectile of Q  (IQL,
    arXiv:2110.06169, eq. 5).

    Args:
      values: `[..., T]` V; the only argument gradients flow through.
      targets: `[..., T]` the smaller of the target networks' Q.  mask: `[..., T]` bool, True on
        actions.
      tau: τ in (0, 1); ½ is the mean, towards 1 the maximum.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes or τ outside (0, 1), TypeError where `mask` is not bool.

    >>> expectile_value_loss(jnp.array([0.0, 2.0]), jnp.array([1.0, 1.0]), jnp.array([True, True])).tolist()
    [0.7, 0.3]
    """
    check_shapes(values=values, targets=targets, mask=mask)
    if isinstance(tau, int | float) and not 0 < tau < 1:
        raise ValueError(f"tau is an expectile, in (0, 1), but is {tau}")
    error = constant(targets, mask) - clean(values, mask)
    return jnp.where(error < 0, 1.0 - tau, tau) * error**2


def cql(logits, tokens) -> Array:
    """`log Σ_v exp(Q_v) - Q_token`: tokens that nobody chose are not overvalued  (CQL,
    arXiv:2006.04779; ILQL's form).

    Args:
      logits: `[..., V]` Q of every token; gradients flow through them.
      tokens: `[...]` int32, the chosen ones.

    Returns: `[...]` loss, at least 0; a function for `chunked`.

    Raises: ValueError where the leading shapes differ.

    >>> cql(jnp.zeros((1, 4)), jnp.array([2])).tolist()
    [1.386]
    """
    return 0.0 - token_logprob(logits, tokens)


def awac(logprobs, q_values, values, mask, *, beta=1.0) -> Array:
    """`-sg(exp(β (Q - V))) log π`: cross-entropy that leans to better actions  (AWAC,
    arXiv:2006.09359; ILQL).

    Args:
      logprobs: `[..., T]` log π of the chosen tokens, in nats; the only argument gradients flow
        through.
      q_values, values: `[..., T]` Q and V.  mask: `[..., T]` bool, True on actions.
      beta: β, per unit of reward; 0 is plain cross-entropy.  The exponent ends at ±20.

    Returns: `[..., T]` loss, exactly 0 (value and gradient) where `mask` is False.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> awac(jnp.array([-1.0]), jnp.array([1.0]), jnp.array([1.0]), jnp.array([True])).tolist()
    [1.0]
    """
    check_shapes(logprobs=logprobs, q_values=q_values, values=values, mask=mask)
    # Q - V is how much better the chosen token is than what the policy does on average.
    advantages = constant(q_values, mask) - constant(values, mask)
    return 0.0 - jnp.exp(jnp.clip(beta * advantages, -MAX_LOG_RATIO, MAX_LOG_RATIO)) * clean(
        logprobs, mask
    )


def polyak(target, online, *, rate=0.001):
    """`θ_target ← (1 - α) θ_target + α θ_online`: target networks follow slowly  (trlX: α 0.001,
    every 5 steps).

    Args:
      target, online: pytrees of arrays of the same structure.
      rate: α in [0, 1].

    Returns: the new target, in the target's dtypes.  No gradient.

    Raises: ValueError where α is not in [0, 1] or a leaf's shapes differ.

    >>> polyak({"w": jnp.array([0.0])}, {"w": jnp.array([1.0])}, rate=0.25)["w"].tolist()
    [0.25]
    """
    if isinstance(rate, int | float) and not 0 <= rate <= 1:
        raise ValueError(f"rate is a share of the online parameters, in [0, 1], but is {rate}")

    def follow(target, online):
        check_shapes(target=target, online=online)
        # In float32: a step of a thousandth is less than bfloat16 can tell apart.
        old, new = jax.lax.stop_gradient((widen(target), widen(online)))
        return (old + rate * (new - old)).astype(jnp.result_type(target))

    return jax.tree.map(follow, target, online)


def rft(rewards, *, percentile=0.7) -> Array:
    """`1[r ≥ the prompt's percentile]`: which samples supervised fine-tuning keeps  (RFT,
    arXiv:2308.01825; trlX).

    Args:
      rewards: `[P, G]`, prompts × samples; NaN where a sample could not be scored, which is never
        kept.
      percentile: in [0, 1], interpolated linearly; trlX raises it from 0.7 to 0.95.

    Returns: `[P, G]` bool.

    Raises: ValueError where `rewards` is not `[P, G]` or the percentile is outside [0, 1].

    >>> rft(jnp.array([[1., 2., 3., 4.]])).tolist()
    [[False, False, False, True]]
    """
    _check_grouped(rewards)
    if isinstance(percentile, int | float) and not 0 <= percentile <= 1:
        raise ValueError(f"percentile must be in [0, 1], but is {percentile}")
    scored = ~jnp.isnan(rewards)
    return scored & (rewards >= quantile(widen(rewards), scored, percentile))


def best_of_n(rewards) -> Array:
    """`argmax_g r`: each prompt's best sample, the first of equals.  `[P, G]` -> `[P]` int32; NaN
    comes last.

    >>> best_of_n(jnp.array([[1., 3., 2.], [jnp.nan, 0., 0.]])).tolist()
    [1, 1]
    """
    _check_grouped(rewards)
    return jnp.argmax(jnp.where(jnp.isnan(rewards), -jnp.inf, rewards), axis=-1)


def optimal_value(rewards, *, beta=0.5) -> Array:
    """`V* = β log mean_g exp(r_g / β)`, from samples of the reference  (A*-PO, arXiv:2505.20686).

    Args:
      rewards: `[P, G]`, NaN where a sample could not be scored.
      beta: β, in units of reward; towards 0 the maximum, towards infinity the mean.

    Returns: `[P]`, 0 where no sample is scored.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]` or beta is not above 0.

    >>> optimal_value(jnp.array([[0., 1.]])).tolist()
    [0.717]
    """
    _check_grouped(rewards)
    check_positive(beta=beta)
    scored = ~jnp.isnan(rewards)
    number = jnp.maximum(scored.sum(-1), 1)
    # exp(-inf) is 0: an unscored sample adds nothing to the sum, nor to `number`.
    exponents = jnp.where(scored, constant(rewards, scored) / beta, -jnp.inf)
    return clean(beta * (jax.nn.logsumexp(exponents, axis=-1) - jnp.log(number)), scored.any(-1))


def a_star(logprobs, ref_logprobs, rewards, values, *, beta=1e-3) -> Array:
    """`(β (log π - log ref) - (r - V*))²`, of one sample a prompt  (A*-PO, arXiv:2505.20686).

    Args:
      logprobs: `[...]` sequence log-probs under the policy, in nats; the only argument gradients
        flow through.
      ref_logprobs: `[...]` the same under the reference.
      rewards: `[...]`.  values: `[...]` V* of the prompt, from `optimal_value`.
      beta: β, in units of reward per nat.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> a_star(jnp.array([-1.0]), jnp.array([-1.0]), jnp.array([1.0]), jnp.array([0.5])).tolist()
    [0.25]
    """
    check_shapes(ref_logprobs=ref_logprobs, rewards=rewards, values=values, logprobs=logprobs)
    check_positive(beta=beta)
    ref_logprobs, rewards, values = (constant(x, True) for x in (ref_logprobs, rewards, values))
    return jnp.square(beta * (widen(logprobs) - ref_logprobs) - (rewards - values))


def _check_grouped(rewards) -> None:
    if jnp.ndim(rewards) != 2:
        raise ValueError(
            f"rewards must be [P, G], prompts × samples, but are {list(jnp.shape(rewards))}: use "
            "groups.split"
        )
