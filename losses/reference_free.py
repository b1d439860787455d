"""Preference objectives without a reference, per pair, from sequence log-probs (sums over a
completion's tokens, in nats).

Most add the negative log-likelihood of one completion: `losses.cross_entropy` of it, with weights
of its own:

>>> from rlhf import losses
>>> mask = jnp.array([[True, True]])
>>> logprobs, pair = jnp.array([[-1., -2.]]), (jnp.array([-3.]), jnp.array([-4.]))
>>> nll = losses.weighted_sum(losses.cross_entropy(logprobs, mask), losses.weights.token_mean(mask))
>>> (losses.weighted_sum(cpo(*pair), jnp.array([1.])) + nll).item()
2.144

Any objective of `preference` has its reference-free form, with zeros in the place of the reference:
`hinge` and `ipo` are TRL's other losses of CPO and TPO.
"""

import jax
import jax.numpy as jnp

from rlhf.losses import divergence
from rlhf.losses._common import MAX_LOG_RATIO, Array, check_positive, check_shapes, widen
from rlhf.losses.preference import averages, logistic


def cpo(chosen, rejected, *, beta=0.1, label_smoothing=0.0) -> Array:
    """`-log σ(β (log π_c - log π_r))`: DPO under a uniform reference  (CPO, arXiv:2401.08417, eq.
    3).

    The paper adds the chosen completion's negative log-likelihood.

    Args:
      chosen, rejected: `[...]` sequence log-probs; gradients flow through both.
      beta: strength, per nat.
      label_smoothing: ε of `preference.logistic`.

    Returns: `[...]` loss; ln 2 where both are as likely.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> cpo(jnp.array([-3.0]), jnp.array([-3.0])).tolist()
    [0.6931]
    """
    return _logistic_of_rewards(chosen, rejected, beta, 0.0, label_smoothing)


def simpo(
    chosen, rejected, chosen_length, rejected_length, *, beta=2.0, gamma=0.5, label_smoothing=0.0
) -> Array:
    """`-log σ(β (log π_c/|c| - log π_r/|r|) - γ)`  (SimPO, arXiv:2405.14734, eq. 6).

    Args:
      chosen, rejected: `[...]` sequence log-probs; gradients flow through both.
      chosen_length, rejected_length: `[...]` trained tokens of each completion (0 counts as 1).
      beta: strength, per nat a token.
      gamma: γ, the margin to reach, in units of `β log p`: in nats a token it is γ/β.
      label_smoothing: ε of `preference.logistic`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> n = jnp.array([4])
    >>> simpo(jnp.array([-3.0]), jnp.array([-4.0]), n, n).tolist()  # -log σ(2 · 0.25 - 0.5)
    [0.6931]
    """
    means = averages(chosen, rejected, chosen_length, rejected_length)
    return _logistic_of_rewards(*means, beta, gamma, label_smoothing)


def alphapo(
    chosen,
    rejected,
    chosen_length,
    rejected_length,
    *,
    alpha=0.25,
    beta=2.0,
    gamma=0.5,
    label_smoothing=0.0,
) -> Array:
    """`-log σ(β (r_c - r_r) - γ)`, `r = (1 - p̄^-α) / α`, p̄ the mean token's probability
    (AlphaPO, arXiv:2501.03884).

    Args:
      chosen, rejected: `[...]` sequence log-probs; gradients flow through both.
      chosen_length, rejected_length: `[...]` trained tokens of each completion (0 counts as 1).
      alpha: α, the reward's shape; 0 is SimPO, log p̄.  Its exponent ends at 20 nats.
      beta: strength, per nat a token.
      gamma: γ, the margin to reach, in units of `β log p`.
      label_smoothing: ε of `preference.logistic`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> n = jnp.array([4])
    >>> alphapo(jnp.array([-3.0]), jnp.array([-4.0]), n, n).tolist()  # -log σ(2 · 0.311 - 0.5)
    [0.634]
    """
    chosen, rejected = averages(chosen, rejected, chosen_length, rejected_length)
    chosen = power_reward(chosen, alpha=alpha)
    rejected = power_reward(rejected, alpha=alpha)
    return _logistic_of_rewards(chosen, rejected, beta, gamma, label_smoothing)


def power_reward(logprobs, *, alpha=0.25) -> Array:
    """`(1 - π^-α) / α`, which is log π at α = 0: AlphaPO's reward  (arXiv:2501.03884).

    Args:
      logprobs: `[...]` log-probs of sequences, or their means over tokens, in nats; gradients flow
        through them.
      alpha: α; above 0, unlikely sequences count more.

    Returns: `[...]`, in at least float32; the exponent ends at 20 nats.

    >>> power_reward(jnp.array([-1.0])).tolist(), power_reward(jnp.array([-1.0]), alpha=0.0).tolist()
    ([-1.136], [-1.0])
    """
    # With α' = 1 - α, (exp((α' - 1) x) - 1) / (α' - 1) is (1 - π^-α) / α.
    return divergence.alpha(logprobs, alpha=1.0 - alpha)


def orpo(chosen, rejected, chosen_length, rejected_length, *, beta=0.1) -> Array:
    """`-β log σ(log odds_c - log odds_r)`, `log odds = log p̄ - log(1 - p̄)`, p̄ the mean token's
    probability  (ORPO, arXiv:2403.07691, eq. 7).

    The paper adds the chosen completion's negative log-likelihood (TRL: of prompt and completion).

    Args:
      chosen, rejected: `[...]` sequence log-probs; gradients flow through both.
      chosen_length, rejected_length: `[...]` trained tokens of each completion (0 counts as 1).
      beta: the paper's λ, the weight beside the negative log-likelihood.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes, or a beta not above 0.

    >>> n = jnp.array([4])
    >>> orpo(jnp.array([-3.0]), jnp.array([-3.0]), n, n).tolist()
    [0.0693]
    """
    check_positive(beta=beta)
    chosen, rejected = averages(chosen, rejected, chosen_length, rejected_length)
    return 0.0 - beta * jax.nn.log_sigmoid(log_odds(chosen) - log_odds(rejected))


def log_odds(logprobs) -> Array:
    """`log p - log(1 - p)` of a log-probability  (ORPO, arXiv:2403.07691, eq. 4, where it is the
    mean over tokens).

    Args:
      logprobs: `[...]` log p, at most 0, in nats; gradients flow through them.

    Returns: `[...]` nats, at most 20: there, where p is 1, the gradient ends.

    >>> log_odds(jnp.log(jnp.array([0.5, 0.9, 1.0]))).tolist()
    [0.0, 2.197, 20.0]
    """
    # At p = 1 the odds are infinite; exp(-20) below it they end at 20 nats.
    below_one = jnp.minimum(widen(logprobs), -jnp.exp(-MAX_LOG_RATIO))
    # log1mexp(x) is log(1 - exp(-x)) without its cancellation.
    return below_one - jax.nn.log1mexp(-below_one)


def tpo(chosen, rejected, *, beta=0.01, label_smoothing=0.0) -> Array:
    """`-log σ(β (log π_c - log π_r))`, beside the negative log-likelihood of a third, gold
    completion  (TPO, arXiv:2405.16681).

    The gold completion's term is added as the module says, of its own tokens.

    Args:
      chosen, rejected: `[...]` sequence log-probs; gradients flow through both.
      beta: strength, per nat.
      label_smoothing: ε of `preference.logistic`.

    Returns: `[...]` loss; ln 2 where both are as likely.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> tpo(jnp.array([-3.0]), jnp.array([-3.0])).tolist()
    [0.6931]
    """
    return cpo(chosen, rejected, beta=beta, label_smoothing=label_smoothing)


def tpo_l(
    chosen, rejected, chosen_length, rejected_length, *, beta=0.01, gamma=0.5, label_smoothing=0.0
) -> Array:
    """`-log σ(β (log π_c/|c| - log π_r/|r|) - γ)`, beside the gold completion's negative
    log-likelihood  (TPO-L, arXiv:2405.16681).

    The gold completion's term is added as the module says.

    Args:
      chosen, rejected: `[...]` sequence log-probs; gradients flow through both.
      chosen_length, rejected_length: `[...]` trained tokens of each completion (0 counts as 1).
      beta: strength, per nat a token.
      gamma: γ, the margin to reach, in units of `β log p`.
      label_smoothing: ε of `preference.logistic`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> n = jnp.array([4])
    >>> tpo_l(jnp.array([-3.0]), jnp.array([-3.0]), n, n).tolist()  # -log σ(-0.5)
    [0.974]
    """
    return simpo(
        chosen,
        rejected,
        chosen_length,
        rejected_length,
        beta=beta,
        gamma=gamma,
        label_smoothing=label_smoothing,
    )


def _logistic_of_rewards(chosen, rejected, beta, gamma, label_smoothing) -> Array:
    check_positive(beta=beta)
    check_shapes(rejected=rejected, chosen=chosen)
    return logistic(
        beta * (widen(chosen) - widen(rejected)) - gamma, label_smoothing=label_smoothing
    )
