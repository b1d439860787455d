"""Preference objectives, per pair, from sequence log-probs (sums over a completion's tokens, in
nats).

A mixture is a sum.  Here MPO's, with the chosen completion's negative log-likelihood (`sigmoid` and
it alone make RPO):

>>> from rlhf import losses
>>> mask = jnp.array([[True, True]])
>>> logprobs, pair = jnp.array([[-1., -2.]]), (jnp.array([-3.]), jnp.array([-4.]), jnp.array([-3.]), jnp.array([-4.]))
>>> nll = losses.weighted_sum(losses.cross_entropy(logprobs, mask), losses.weights.token_mean(mask))
>>> (losses.weighted_sum(0.8 * sigmoid(*pair) + 0.2 * bco_pair(*pair), jnp.array([1.])) + nll).item()
2.332
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf.losses import segments
from rlhf.losses._common import (
    MAX_LOG_RATIO,
    Array,
    check_positive,
    check_shapes,
    clean,
    constant,
    widen,
)
from rlhf.losses.divergence import reverse_kl


def sigmoid(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    *,
    beta=0.1,
    label_smoothing=0.0,
    divergence: Callable = reverse_kl,
) -> Array:
    """DPO, `-log σ(β [(log π_c - log ref_c) - (log π_r - log ref_r)])`  (arXiv:2305.18290, eq. 7).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.
      label_smoothing: ε, the share of pairs thought to be labelled the wrong way round (cDPO):
        `logistic`'s.
      divergence: what makes a score of a log-ratio, one of `rlhf.losses.divergence` (f-DPO).

    Returns: `[...]` loss; ln 2 where policy and reference agree.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> lp = jnp.array([-7.0])
    >>> sigmoid(lp, lp, lp, lp).tolist()
    [0.6931]
    """
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, divergence)
    return logistic(margin, label_smoothing=label_smoothing)


def sigmoid_norm(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    *,
    chosen_length,
    rejected_length,
    beta=0.1,
    label_smoothing=0.0,
    divergence: Callable = reverse_kl,
) -> Array:
    """DPO by the token, `-log σ(β (s_c/|c| - s_r/|r|))`, s the scores of the log-ratios  (Tülu 3,
    arXiv:2411.15124).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      chosen_length, rejected_length: `[...]` trained tokens of each completion (0 counts as 1).
      beta: larger than a sum's by about a completion's length (Tülu 3: 5).
      label_smoothing: ε, the share of pairs thought to be labelled the wrong way round.
      divergence: what makes a score of a log-ratio, one of `rlhf.losses.divergence`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> lp, n = jnp.array([-7.0]), jnp.array([4])
    >>> sigmoid_norm(lp + 4.0, lp, lp, lp, chosen_length=n, rejected_length=n, beta=5.0).tolist()  # -log σ(5)
    [0.0067]
    """
    lengths = chosen_length, rejected_length
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, divergence, lengths)
    return logistic(margin, label_smoothing=label_smoothing)


def hinge(
    chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, divergence: Callable = reverse_kl
) -> Array:
    """`max(0, 1 - β (s_c - s_r))`, s the scores of the log-ratios  (RSO, arXiv:2309.06657; SLiC,
    arXiv:2305.10425).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.
      divergence: what makes a score of a log-ratio, one of `rlhf.losses.divergence`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0])
    >>> hinge(lp + 4.0, lp, lp, lp).tolist()
    [0.6]
    """
    return jax.nn.relu(1.0 - _margin(chosen, rejected, ref_chosen, ref_rejected, beta, divergence))


def ipo(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    *,
    chosen_length,
    rejected_length,
    beta=0.1,
    divergence: Callable = reverse_kl,
) -> Array:
    """`(s_c/|c| - s_r/|r| - 1/(2β))²`, s the scores of the log-ratios  (IPO, arXiv:2310.12036, eq.
    17).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      chosen_length, rejected_length: `[...]` trained tokens of each completion (0 counts as 1): the
        authors meant means over tokens.  Ones for sums (OpenRLHF; TRL's online DPO).
      beta: the paper's τ; 1/(2β) is the margin to reach, in nats a token.
      divergence: what makes a score of a log-ratio, one of `rlhf.losses.divergence`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp, n = jnp.array([-7.0]), jnp.array([4])
    >>> ipo(lp + 4.0, lp, lp, lp, chosen_length=n, rejected_length=n).tolist()  # (1 - 5)²
    [16.0]
    """
    check_positive(beta=beta)
    lengths = chosen_length, rejected_length
    return jnp.square(
        _difference(chosen, rejected, ref_chosen, ref_rejected, divergence, lengths) - 0.5 / beta
    )


def exo(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    *,
    beta=0.1,
    label_smoothing=1e-3,
    divergence: Callable = reverse_kl,
) -> Array:
    """`q_c (log q_c - log(1 - ε)) + q_r (log q_r - log ε)`, `q_c = σ(β (s_c - s_r)) = 1 - q_r`
    (EXO for pairs, arXiv:2402.00856, eq. 16).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.
      label_smoothing: ε, above 0: it is the probability that the rejected completion has in the
        target.
      divergence: what makes a score of a log-ratio, one of `rlhf.losses.divergence`.

    Returns: `[...]` loss, the reverse KL from the labels to the policy's preference; 0 where they
    agree.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> lp = jnp.array([-7.0])
    >>> exo(lp, lp, lp, lp).tolist()  # -log 2 - (log 0.999 + log 0.001) / 2
    [2.761]
    """
    if isinstance(label_smoothing, int | float) and not label_smoothing > 0:
        raise ValueError(
            "label_smoothing must be above 0, as 1e-3: EXO takes its logarithm, but it is "
            f"{label_smoothing}"
        )
    _check_label_smoothing(label_smoothing)
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, divergence)
    towards_chosen = jax.nn.log_sigmoid(margin) - jnp.log1p(
        -jnp.asarray(label_smoothing, margin.dtype)
    )
    towards_rejected = jax.nn.log_sigmoid(-margin) - jnp.log(
        jnp.asarray(label_smoothing, margin.dtype)
    )
    return jax.nn.sigmoid(margin) * towards_chosen + jax.nn.sigmoid(-margin) * towards_rejected


def robust(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    *,
    beta=0.1,
    label_smoothing=0.1,
    divergence: Callable = reverse_kl,
) -> Array:
    """`(-(1 - ε) log σ(z) + ε log σ(-z)) / (1 - 2ε)`, `z = β (s_c - s_r)`: `sigmoid`'s mean over
    clean labels, from noisy ones
    (robust DPO, arXiv:2403.00409).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.
      label_smoothing: ε, the share of pairs thought to be labelled the wrong way round.
      divergence: what makes a score of a log-ratio, one of `rlhf.losses.divergence`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> lp = jnp.array([-7.0])
    >>> robust(lp, lp, lp, lp).tolist()
    [0.6931]
    """
    _check_label_smoothing(label_smoothing)
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, divergence)
    as_labelled = -jax.nn.log_sigmoid(margin)
    flipped = -jax.nn.log_sigmoid(-margin)
    # With labels flipped at a rate of ε, this has the mean that clean labels would give.
    return ((1.0 - label_smoothing) * as_labelled - label_smoothing * flipped) / (
        1.0 - 2.0 * label_smoothing
    )


def discopop(
    chosen,
    rejected,
    ref_chosen,
    ref_rejected,
    *,
    beta=0.1,
    tau=0.05,
    divergence: Callable = reverse_kl,
) -> Array:
    """`(1 - m) (-log σ(z)) + m exp(-z)`, `m = σ(z/τ)`, `z = β (s_c - s_r)`  (DiscoPOP,
    arXiv:2406.08414, eq. 5).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.
      tau: τ, how sharply m goes from the logistic loss (z < 0) to the exponential one (z > 0).
      divergence: what makes a score of a log-ratio, one of `rlhf.losses.divergence`.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0])
    >>> discopop(lp, lp, lp, lp).tolist()  # (log 2 + 1) / 2
    [0.847]
    """
    check_positive(tau=tau)
    margin = _margin(chosen, rejected, ref_chosen, ref_rejected, beta, divergence)
    # The exponent is bounded: pairs that are far the wrong way round would overflow.
    exponential = jnp.exp(jnp.minimum(-margin, MAX_LOG_RATIO))
    return (
        # 1 - σ(z) is σ(-z), which does not round to 0 for large z.
        jax.nn.sigmoid(-margin / tau) * -jax.nn.log_sigmoid(margin)
        + jax.nn.sigmoid(margin / tau) * exponential
    )


def nca(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1) -> Array:
    """`-log σ(β x_c) - ½ log σ(-β x_c) - ½ log σ(-β x_r)`, x the log-ratios  (NCA for pairs,
    arXiv:2402.05369).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0])
    >>> nca(lp, lp, lp, lp).tolist()  # 2 log 2
    [1.386]
    """
    chosen, rejected = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return (
        -jax.nn.log_sigmoid(chosen)
        - 0.5 * jax.nn.log_sigmoid(-chosen)
        - 0.5 * jax.nn.log_sigmoid(-rejected)
    )


def bco_pair(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1) -> Array:
    """`-log σ(β x_c) - log σ(-β x_r)`, x the log-ratios: both completions classified, without a
    shift  (BCO, arXiv:2404.04656; with its shift `unpaired.bco`).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0])
    >>> bco_pair(lp, lp, lp, lp).tolist()  # 2 log 2
    [1.386]
    """
    chosen, rejected = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


def sppo(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1) -> Array:
    """`(x_c - 1/(2β))² + (x_r + 1/(2β))²`, x the log-ratios  (SPPO with certain preferences,
    arXiv:2405.00675, eq. 4.7).

    The paper's η is 1/β.

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0])
    >>> sppo(lp + 4.0, lp, lp, lp).tolist()  # (4 - 5)² + (0 + 5)²
    [26.0]
    """
    check_positive(beta=beta)
    chosen, rejected = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return jnp.square(chosen - 0.5 / beta) + jnp.square(rejected + 0.5 / beta)


def apo_zero(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1) -> Array:
    """`1 - σ(β x_c) + σ(β x_r)`, x the log-ratios: for chosen completions better than what the
    model says  (APO-zero, arXiv:2408.06266, eq. 7).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0])
    >>> apo_zero(lp, lp, lp, lp).tolist()
    [1.0]
    """
    chosen, rejected = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    # 1 - σ(x) is σ(-x).
    return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def apo_down(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1) -> Array:
    """`σ(β x_c) + 1 - σ(β (x_c - x_r))`, x the log-ratios: for chosen completions worse than what
    the model says  (APO-down, arXiv:2408.06266, eq. 8).

    Args:
      chosen, rejected: `[...]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[...]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.

    Returns: `[...]` loss.

    Raises: ValueError on unequal shapes or a beta not above 0.

    >>> lp = jnp.array([-7.0])
    >>> apo_down(lp, lp, lp, lp).tolist()
    [1.0]
    """
    chosen, rejected = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return jax.nn.sigmoid(chosen) + jax.nn.sigmoid(rejected - chosen)


def aot(chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0) -> Array:
    """Couples rows: `-log σ(β d)`, `d = sort(log π_c - log π_r) - sort(log ref_c - log ref_r)`
    (AOT, arXiv:2406.05882).

    The whole mini-batch must be given at once: use `rlhf.coupled_train_step`.

    Args:
      chosen, rejected: `[N]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[N]` the same under the reference; no gradient.
      beta: strength, per nat.
      label_smoothing: ε of `logistic`.

    Returns: `[N]` loss, in sorted order.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> lp = jnp.array([-7.0, -3.0])
    >>> aot(lp, lp, lp, lp).tolist()
    [0.6931, 0.6931]
    """
    check_positive(beta=beta)
    check_shapes(rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, chosen=chosen)
    # Sorted, both sides become quantiles: AOT compares distributions, not single pairs.
    policy = widen(chosen) - widen(rejected)
    reference = jax.lax.stop_gradient(widen(ref_chosen) - widen(ref_rejected))
    return logistic(
        beta * (jnp.sort(policy) - jnp.sort(reference)), label_smoothing=label_smoothing
    )


def aot_unpaired(
    chosen, rejected, ref_chosen, ref_rejected, *, beta=0.1, label_smoothing=0.0
) -> Array:
    """Couples rows: `-log σ(β d)`, `d = sort(x_c) - sort(x_r)`, x the log-ratios  (AOT, unpaired,
    arXiv:2406.05882).

    Chosen and rejected completions need not be of the same prompts.  The whole mini-batch must be
    given at once: use `rlhf.coupled_train_step`.

    Args:
      chosen, rejected: `[N]` sequence log-probs under the policy; gradients flow through both.
      ref_chosen, ref_rejected: `[N]` the same under the reference; no gradient.
      beta: strength of the pull towards the reference, per nat.
      label_smoothing: ε, the share of pairs thought to be labelled the wrong way round.

    Returns: `[N]` loss, in sorted order.

    Raises: ValueError on unequal shapes, a beta not above 0, or an ε outside [0, 0.5).

    >>> lp = jnp.array([-7.0, -3.0])
    >>> aot_unpaired(lp, lp, lp, lp).tolist()
    [0.6931, 0.6931]
    """
    chosen, rejected = _rewards(chosen, rejected, ref_chosen, ref_rejected, beta)
    return logistic(jnp.sort(chosen) - jnp.sort(rejected), label_smoothing=label_smoothing)


def logistic(margin, *, label_smoothing=0.0) -> Array:
    """`-(1 - ε) log σ(z) - ε log σ(-z)`, what most objectives on pairs make of a margin  (cDPO,
    Mitchell 2023).

    Args:
      margin: `[...]` z, how far chosen is above rejected; gradients flow through it.
      label_smoothing: ε, the share of pairs thought to be labelled the wrong way round.

    Returns: `[...]` loss; ln 2 where the margin is 0.

    Raises: ValueError where ε is not in [0, 0.5).

    >>> logistic(jnp.array([0.0, 3.0]), label_smoothing=0.1).tolist()
    [0.693, 0.349]
    """
    _check_label_smoothing(label_smoothing)
    margin = widen(margin)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(
        margin
    ) - label_smoothing * jax.nn.log_sigmoid(-margin)


def log_ratios(chosen, rejected, ref_chosen, ref_rejected) -> tuple[Array, Array]:
    """`(log π_c - log ref_c, log π_r - log ref_r)`, each `[...]` nats; β times these are DPO's
    implicit rewards.

    >>> lp = jnp.array([-7.0])
    >>> [x.item() for x in log_ratios(lp + 1.0, lp, lp, lp)]
    [1.0, 0.0]
    """
    check_shapes(rejected=rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, chosen=chosen)
    ref_chosen, ref_rejected = jax.lax.stop_gradient((widen(ref_chosen), widen(ref_rejected)))
    return widen(chosen) - ref_chosen, widen(rejected) - ref_rejected


def averages(chosen, rejected, chosen_length, rejected_length) -> tuple[Array, Array]:
    """`(s_c/|c|, s_r/|r|)`: sums over the tokens of each completion as means.

    Args:
      chosen, rejected: `[...]` sums, for example sequence log-probs in nats; gradients flow through
        both.
      chosen_length, rejected_length: `[...]` trained tokens of each completion; 0 counts as 1.

    Returns: the means, both `[...]` in at least float32.

    Raises: ValueError on unequal shapes.

    >>> [x.item() for x in averages(jnp.array([-6.0]), jnp.array([-4.0]), jnp.array([4]), jnp.array([2]))]
    [-1.5, -2.0]
    """
    check_shapes(
        rejected=rejected,
        chosen_length=chosen_length,
        rejected_length=rejected_length,
        chosen=chosen,
    )
    over = lambda total, length: widen(total) / jnp.maximum(widen(length), 1.0)
    return over(chosen, chosen_length), over(rejected, rejected_length)


def ld_weights(chosen_mask, rejected_mask, *, alpha=0.5) -> tuple[Array, Array]:
    """`1[n ≤ min(|c|, |r|)] + α 1[n > min(|c|, |r|)]` for a completion's n-th token: the longer
    one's excess counts less  (LD-DPO, arXiv:2409.06411).

    Multiply per-token log-probs, of policy and reference, by these before `segments.segment_sum`.

    Args:
      chosen_mask, rejected_mask: `[N, T]` bool, True on trained tokens; one sequence a row, pairs
        in the same row of both.
      alpha: α in [0, 1], the weight of tokens beyond the shared length; 1 is plain DPO.

    Returns: `[N, T]` weights of chosen and of rejected tokens, 0 where their mask is False.  No
    gradient.

    Raises: ValueError on unequal shapes or an α outside [0, 1], TypeError where a mask is not bool.

    >>> ld_weights(jnp.array([[True, True]]), jnp.array([[True, False]]))[0].tolist()
    [[1.0, 0.5]]
    """
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha is a weight in [0, 1], 1 for plain DPO, but is {alpha}")
    check_shapes(chosen_mask=chosen_mask, rejected_mask=rejected_mask)
    # The length that both completions of a pair have.
    shared = jnp.minimum(segments.count(chosen_mask), segments.count(rejected_mask))
    # The cumulative sum of the mask is a trained token's number in its completion.
    weigh = lambda mask: clean(jnp.where(jnp.cumsum(mask, axis=-1) <= shared, 1.0, alpha), mask)
    return weigh(chosen_mask), weigh(rejected_mask)


def wpo_weights(
    logprobs, log_sum_squared_probs, mask, segment_ids=None, *, max_segments: int = 1
) -> Array:
    """`exp(mean_t(log π(token) - log Σ_v π(v)²))`: how likely the policy is to say it now  (WPO,
    arXiv:2406.11827, eq. 2).

    A pair's loss is multiplied by the weights of both of its completions.

    Args:
      logprobs: `[B, T]` log π of the completion's tokens, in nats.
      log_sum_squared_probs: `[B, T]` log Σ_v π(v)² of the distributions they were sampled from.
      mask: `[B, T]` bool, True on tokens that count.
      segment_ids: `[B, T]` int32, 0 = padding; None: a row is one sequence.
      max_segments: the most sequences in a row; static, because it is a shape.

    Returns: `[B * max_segments]` weights, as `segments.segment_sum` orders sequences; 0 for one
    without a trained token.  No gradient.

    Raises: ValueError on unequal shapes, TypeError where `mask` is not bool.

    >>> lp = jnp.log(jnp.array([[0.5, 0.5]]))
    >>> wpo_weights(lp, lp, jnp.array([[True, True]])).tolist()
    [1.0]
    """
    check_shapes(logprobs=logprobs, log_sum_squared_probs=log_sum_squared_probs, mask=mask)
    of_sequences = lambda x: segments.segment_sum(x, mask, segment_ids, max_segments=max_segments)
    # Means over sequences are sums over counts: `segment_sum` takes packed rows too.
    number = of_sequences(jnp.ones(jnp.shape(mask)))
    total = of_sequences(constant(logprobs, mask) - constant(log_sum_squared_probs, mask))
    return clean(
        jnp.exp(jnp.clip(total / jnp.maximum(number, 1.0), -MAX_LOG_RATIO, MAX_LOG_RATIO)),
        number > 0,
    )


def _check_label_smoothing(label_smoothing) -> None:
    """Raises where ε is not in [0, 0.5); traced values are trusted."""
    if isinstance(label_smoothing, int | float) and not 0 <= label_smoothing < 0.5:
        raise ValueError(
            "label_smoothing is the share of pairs labelled the wrong way round, in [0, 0.5), but "
            f"is {label_smoothing}; "
            "where more than half are, swap chosen and rejected"
        )


def _rewards(chosen, rejected, ref_chosen, ref_rejected, beta) -> tuple[Array, Array]:
    check_positive(beta=beta)
    chosen, rejected = log_ratios(chosen, rejected, ref_chosen, ref_rejected)
    return beta * chosen, beta * rejected


def _margin(chosen, rejected, ref_chosen, ref_rejected, beta, divergence, lengths=None) -> Array:
    check_positive(beta=beta)
    return beta * _difference(chosen, rejected, ref_chosen, ref_rejected, divergence, lengths)


def _difference(chosen, rejected, ref_chosen, ref_rejected, divergence, lengths=None) -> Array:
    """`s_c - s_r` of the scores of the log-ratios, or by the token, `s_c/|c| - s_r/|r|`."""
    scores = tuple(divergence(x) for x in log_ratios(chosen, rejected, ref_chosen, ref_rejected))
    # A divergence that reduces would broadcast against the pairs without a word.
    check_shapes(divergence=scores[0], chosen=chosen)
    if lengths is not None:
        scores = averages(*scores, *lengths)
    return scores[0] - scores[1]
