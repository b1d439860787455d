"""Group advantages: a prompt's samples compared with each other.  None of these is differentiated.

One normaliser, `group_relative(rewards, mean=…, std=…)`, with the statistics as arguments, spans
GRPO and its relatives; the named ones below are its settings.  In all of them a NaN reward marks a
sample that could not be scored: it is left out of every statistic and its advantage is 0.  A sample
that is alone in its group has nothing to be compared with: its advantage is 0.  Where the spread is
0 nothing is divided, so a group of equal rewards has advantages of 0.  Rewards that differ from
their group's middle one by at most 4 units of rounding of the group's largest are equal to it: 0.1
+ 0.2 and 0.3 are no news.
"""

from collections.abc import Callable

import jax.numpy as jnp

from rlhf.losses import segments
from rlhf.losses._common import Array, check_shapes, clean, constant, rounding
from rlhf.losses.advantages import returns


def group_mean(rewards) -> Array:
    """The mean of a group's scored samples.  `[P, G]` -> `[P, G]`; 0 where none is.

    >>> group_mean(jnp.array([[1., 0.]])).tolist()
    [[0.5, 0.5]]
    """
    middle, deviations = _from_middle(rewards)
    return _alike(middle + _mean(deviations, ~jnp.isnan(rewards)), rewards)


def leave_one_out_mean(rewards) -> Array:
    """The mean of a sample's scored siblings, `(Σ r - r_i) / (n - 1)`.  `[P, G]` -> `[P, G]`; 0
    where there are none.

    >>> leave_one_out_mean(jnp.array([[1., 0., 4.]])).tolist()
    [[2.0, 2.5, 0.5]]
    """
    middle, deviations = _from_middle(rewards)
    siblings = _siblings(~jnp.isnan(rewards))
    return jnp.where(siblings > 0, middle + _of_others(deviations) / jnp.maximum(siblings, 1), 0.0)


def group_std(rewards, *, correction=1) -> Array:
    """The standard deviation of a group's scored samples.  `[P, G]` -> `[P, G]`.

    `correction` is subtracted from their number: 1 is Bessel's (TRL, verl), 0 the population's.

    >>> group_std(jnp.array([[1., 0.]])).tolist()
    [[0.707, 0.707]]
    """
    scored = ~jnp.isnan(rewards)
    _, deviations = _from_middle(rewards)
    squares = (clean(deviations - _mean(deviations, scored), scored) ** 2).sum(-1, keepdims=True)
    return _alike(jnp.sqrt(squares / jnp.maximum(_number(scored) - correction, 1)), rewards)


def batch_std(rewards) -> Array:
    """Couples rows: the standard deviation of all scored samples, with Bessel's correction.
    `[P, G]` -> `[P, G]`.

    >>> batch_std(jnp.array([[1.], [0.]])).tolist()
    [[0.707], [0.707]]
    """
    return _alike(group_std(rewards.reshape(1, -1))[:, :1], rewards)


def leave_one_out_std(rewards) -> Array:
    """The standard deviation of a sample's scored siblings, with Bessel's correction.  `[P, G]` ->
    `[P, G]`.

    Of the n - 1 others, `Σ (r_j - mean)² = Σ (r_j - m)² - (n - 1) (mean - m)²`, m being the group's
    middle reward.

    >>> leave_one_out_std(jnp.array([[1., 0., 4.]])).tolist()
    [[2.828, 2.121, 0.707]]
    """
    siblings = _siblings(~jnp.isnan(rewards))
    _, deviations = _from_middle(rewards)
    squares = _of_others(deviations**2) - _of_others(deviations) ** 2 / jnp.maximum(siblings, 1)
    # Rounding may leave the difference of two equal sums below 0, whose root is NaN.
    squares = jnp.where(siblings > 1, jnp.maximum(squares, 0.0), 0.0)
    return jnp.sqrt(squares / jnp.maximum(siblings - 1, 1))


def group_relative(
    rewards, *, mean: Callable | None = group_mean, std: Callable | None = group_std, eps=1e-4
) -> Array:
    """`A = (r - mean(r)) / (std(r) + eps)`, by default within each prompt's group  (GRPO,
    arXiv:2402.03300, §4.1.2).

    Args:
      rewards: `[P, G]`, prompts × samples; NaN marks a sample that could not be scored.
      mean: what is subtracted: `group_mean`, `leave_one_out_mean`, any `[P, G] -> [P, G]` that
        leaves out NaN and moves with the rewards, `mean(r + c) = mean(r) + c`, or None for nothing.
      std: what is divided by: `group_std`, `batch_std`, `leave_one_out_std`, any `[P, G] -> [P, G]`
        that leaves out NaN, or None for nothing.
      eps: added to the spread (TRL: 1e-4; verl: 1e-6).

    Returns: `[P, G]` advantages.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`.

    >>> group_relative(jnp.array([[1., 0.], [1., 1.]])).tolist()
    [[0.707, -0.707], [0.0, 0.0]]
    """
    _check_grouped(rewards)
    scored = ~jnp.isnan(rewards)
    middle, deviations = _from_middle(rewards)
    # The rewards without differences that are only rounding: what the statistics see.
    settled = jnp.where(scored, middle + deviations, jnp.nan)
    if mean is None:
        advantages = settled
    else:
        # Differences to the middle reward are exact; a mean of the rewards themselves would be
        # rounded to their magnitude.
        center = mean(jnp.where(scored, deviations, jnp.nan))
        check_shapes(mean=center, rewards=rewards)
        advantages = deviations - center
    if std is not None:
        spread = std(settled)
        check_shapes(std=spread, rewards=rewards)
        # A spread of 0 is a group of equal rewards: nothing is divided, not even by eps.
        advantages = advantages / jnp.where(spread > 0, spread + eps, 1.0)
    # A sample that is alone in its group has nothing to be compared with.
    return constant(advantages, scored & (_number(scored) > 1))


def dr_grpo(rewards) -> Array:
    """`A = r - mean_group`, not divided: no bias towards easy and hard prompts  (Dr. GRPO,
    arXiv:2503.20783).

    Use with `weights.constant`.

    Args:
      rewards: `[P, G]`, prompts × samples; NaN marks a sample that could not be scored.

    Returns: `[P, G]` advantages.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`.

    >>> dr_grpo(jnp.array([[1., 0.]])).tolist()
    [[0.5, -0.5]]
    """
    return group_relative(rewards, std=None)


def lite_ppo(rewards, *, eps=1e-4) -> Array:
    """Couples rows: `A = (r - mean_group) / (std_batch + eps)`  (LitePPO, arXiv:2508.08221; TRL's
    `batch` scaling).

    The whole batch must be given at once.

    Args:
      rewards: `[P, G]`, prompts × samples; NaN marks a sample that could not be scored.
      eps: added to what is divided by.

    Returns: `[P, G]` advantages.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`.

    >>> lite_ppo(jnp.array([[1., 0.], [1., 1.]])).tolist()
    [[1.0, -1.0], [0.0, 0.0]]
    """
    return group_relative(rewards, std=batch_std, eps=eps)


def rloo(rewards) -> Array:
    """`A_i = r_i - mean_{j ≠ i} r_j`: REINFORCE with the others as the baseline  (RLOO,
    arXiv:2402.14740).

    Args:
      rewards: `[P, G]`, prompts × samples; NaN marks a sample that could not be scored.

    Returns: `[P, G]` advantages.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`.

    >>> rloo(jnp.array([[1., 0., 0.]])).tolist()
    [[1.0, -0.5, -0.5]]
    """
    return group_relative(rewards, mean=leave_one_out_mean, std=None)


def leave_one_out(rewards, *, eps=1e-6) -> Array:
    """`A_i = (r_i - mean_{j ≠ i}) / (std_{j ≠ i} + eps)`: both statistics of the others alone
    (NeMo RL's GRPO).

    Where the others agree nothing is divided.

    Args:
      rewards: `[P, G]`, prompts × samples; NaN marks a sample that could not be scored.
      eps: added to what is divided by.

    Returns: `[P, G]` advantages.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`.

    >>> leave_one_out(jnp.array([[3., 0., 1.]])).tolist()
    [[3.536, -1.414, -0.236]]
    """
    return group_relative(rewards, mean=leave_one_out_mean, std=leave_one_out_std, eps=eps)


def max_rl(rewards, *, eps=1e-4) -> Array:
    """`A = (r - mean_group) / (mean_group + eps)`: rare successes weigh more  (MaxRL,
    arXiv:2602.02710).

    For rewards that are not negative.  Where the mean is 0 nothing is divided.

    Args:
      rewards: `[P, G]`, prompts × samples; NaN marks a sample that could not be scored.
      eps: added to what is divided by.

    Returns: `[P, G]` advantages.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`.

    >>> max_rl(jnp.array([[1., 0., 0., 0.]])).tolist()
    [[3.0, -1.0, -1.0, -1.0]]
    """
    return group_relative(rewards, std=group_mean, eps=eps)


def opo(rewards, lengths) -> Array:
    """`A_i = r_i - Σ n_j r_j / Σ n_j`: the baseline weighted by length  (OPO, arXiv:2505.23585).

    Args:
      rewards: `[P, G]`, NaN where a sample could not be scored.
      lengths: `[P, G]` trained tokens of each sample.

    Returns: `[P, G]` advantages, for steps that are exactly on policy.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`, or `lengths` has another shape.

    >>> opo(jnp.array([[1., 0.]]), jnp.array([[3, 1]])).tolist()
    [[0.25, -0.75]]
    """
    _check_grouped(rewards)
    check_shapes(lengths=lengths, rewards=rewards)
    weights = constant(lengths, ~jnp.isnan(rewards))

    def weighted_mean(rewards):
        total = clean(rewards * weights, weights > 0).sum(-1, keepdims=True)
        return _alike(total / jnp.maximum(weights.sum(-1, keepdims=True), 1), rewards)

    return group_relative(rewards, mean=weighted_mean, std=None)


def gpg(rewards) -> Array:
    """Couples rows: `A = α (r - mean_group)` with `α = samples / samples of nonzero reward`  (GPG,
    arXiv:2504.02546).

    The whole batch must be given at once.  Use with `policy.reinforce`.

    Args:
      rewards: `[P, G]`, prompts × samples; NaN marks a sample that could not be scored.

    Returns: `[P, G]` advantages.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G]`.

    >>> gpg(jnp.array([[1., 0.]])).tolist()
    [[1.0, -1.0]]
    """
    scored = ~jnp.isnan(rewards)
    alpha = scored.sum() / jnp.maximum((scored & (rewards != 0)).sum(), 1)
    return alpha * dr_grpo(rewards)


def pass_at_k(rewards, *, std: Callable | None = None, eps=1e-4) -> Array:
    """Only a group's best sample counts, `A = (r_best - r_second) / (std + eps)`  (pass@k training,
    arXiv:2503.19595).

    Args:
      rewards: `[P, G]`, NaN where a sample could not be scored.
      std: what is divided by, as for `group_relative`; None: nothing.

    Returns: `[P, G]`; 0 for all others, and where two share the first place.  Gradients and errors
    as `group_relative`.

    >>> pass_at_k(jnp.array([[3., 1., 2.]])).tolist()
    [[1.0, 0.0, 0.0]]
    """
    _check_grouped(rewards)

    def second(rewards):
        # The unscored sort first, away from the two best at the end.
        ordered = jnp.sort(jnp.where(jnp.isnan(rewards), -jnp.inf, rewards), axis=-1)
        # The second from the end; a group of one has a single column, its own reward.
        return _alike(ordered[:, -2:][:, :1], rewards)

    # All but the best would be at or below 0: for pass@k only the best counts.
    return jnp.maximum(group_relative(rewards, mean=second, std=std, eps=eps), 0.0)


def weighted_rewards(rewards, weights) -> Array:
    """`r = Σ_k w_k r_k` over the scores that there are; NaN where a sample has none  (TRL's
    sum-then-normalise).

    Args:
      rewards: `[..., K]`, one score a reward function; NaN where it gave none.
      weights: `[K]`.

    Returns: `[...]`.  No gradient.

    Raises: ValueError where the number of weights is not that of the reward functions.

    >>> weighted_rewards(jnp.array([[1., 2.], [jnp.nan, 2.]]), jnp.array([1., 0.5])).tolist()
    [2.0, 1.0]
    """
    if jnp.shape(rewards)[-1:] != jnp.shape(weights):
        raise ValueError(
            f"rewards {list(jnp.shape(rewards))} but weights {list(jnp.shape(weights))}: one "
            "weight a reward function"
        )
    scored = ~jnp.isnan(rewards)
    each = constant(rewards, scored) * jnp.reshape(
        constant(weights, True), (1,) * (jnp.ndim(rewards) - 1) + (-1,)
    )
    return jnp.where(scored.any(-1), each.sum(-1), jnp.nan)


def gdpo(rewards, weights, *, eps=1e-4) -> Array:
    """Couples rows: every reward normalised in its groups, the weighted sum normalised over the
    batch  (GDPO, arXiv:2601.05242).

    Args:
      rewards: `[P, G, K]`, NaN where a function gave no score.
      weights: `[K]`.
      eps: added to both standard deviations.

    Returns: `[P, G]`, 0 where a sample has no score.  No gradient.

    Raises: ValueError where `rewards` is not `[P, G, K]`, or the number of weights is not K.

    >>> gdpo(jnp.array([[[1., 9.], [0., 0.]]]), jnp.array([1., 1.])).tolist()
    [[0.707, -0.707]]
    """
    if jnp.ndim(rewards) != 3:
        raise ValueError(
            "rewards must be [P, G, K], prompts × samples × functions, but are "
            f"{list(jnp.shape(rewards))}"
        )
    each = [
        # group_relative makes 0 of NaN; back to NaN, so that a missing score is no score of 0.
        jnp.where(jnp.isnan(r), jnp.nan, group_relative(r, eps=eps))
        for r in jnp.moveaxis(rewards, -1, 0)
    ]
    combined = weighted_rewards(jnp.stack(each, axis=-1), weights)
    # The batch as a single group.
    return group_relative(combined.reshape(1, -1), eps=eps).reshape(combined.shape)


def optimal_token_baseline(
    rewards, logprobs, log_sum_sq_probs, mask, *, num_samples: int, importance=None, eps=1e-8
) -> Array:
    """`A_it = R_it - B_t`, `B_t = Σ_i W_it R_it / Σ_i W_it`,
    `W_it = Σ_{u ≤ t} ρ² (1 - 2π + Σ_v π_v²)`
    (The Optimal Token Baseline, ICML 2026).

    W stands for the squared norm of the gradient of the path so far; the sums run over a prompt's
    samples that still go on.

    Args:
      rewards: `[B, T]`, a prompt's samples contiguous.
      logprobs: `[B, T]` log π of the sampled tokens.
      log_sum_sq_probs: `[B, T]` log Σ_v π_v², from `logits.log_sum_squared_probs`.
      mask: `[B, T]` bool, True on sampled tokens.
      num_samples: samples a prompt; static.
      importance: `[B, T]` weights ρ of the sampler's mismatch, or None for 1.

    Returns: `[B, T]`, 0 where `mask` is False.  Where a sample goes on alone the baseline is its
    own return, and its advantage 0; to train it on R there, take `returns`.  No gradient.

    Raises: ValueError on unequal shapes, or where num_samples does not divide B; TypeError where
    `mask` is not bool.

    >>> r, half, m = jnp.array([[1.], [0.]]), jnp.log(jnp.full((2, 1), 0.5)), jnp.ones((2, 1), bool)
    >>> optimal_token_baseline(r, half, half, m, num_samples=2).tolist()
    [[0.5], [-0.5]]
    """
    importance = jnp.ones(jnp.shape(mask)) if importance is None else importance
    check_shapes(
        rewards=rewards,
        logprobs=logprobs,
        log_sum_sq_probs=log_sum_sq_probs,
        importance=importance,
        mask=mask,
    )
    probs = jnp.exp(constant(logprobs, mask))
    squares = jnp.exp(constant(log_sum_sq_probs, mask))
    energy = constant(importance, mask) ** 2 * (1 - 2 * probs + squares)
    # Cleaned, so that a sample that has ended leaves the sums of its group.
    path = clean(jnp.cumsum(energy, axis=-1), mask)
    togo = returns(rewards, mask)
    grouped = lambda x: split(x, size=num_samples)
    baseline = grouped(path * togo).sum(1, keepdims=True) / (
        grouped(path).sum(1, keepdims=True) + eps
    )
    return clean(togo - baseline.repeat(num_samples, axis=1).reshape(togo.shape), mask)


def split(values, *, size: int) -> Array:
    """`[B, ...]` -> `[P, G, ...]`: a prompt's `size` samples, which are contiguous, in a row.

    Raises: ValueError where the group size does not divide the batch.

    >>> split(jnp.arange(4), size=2).tolist()
    [[0, 1], [2, 3]]
    """
    batch, *rest = jnp.shape(values)
    if size < 1 or batch % size:
        raise ValueError(
            f"groups of {size} samples but a batch of {batch}: the group size must divide it"
        )
    return jnp.reshape(values, (batch // size, size, *rest))


def to_tokens(advantages, mask, segment_ids=None) -> Array:
    """Group advantages at every trained token: `[P, G]`, `[B, T]` bool -> `[B, T]`, 0 where `mask`
    is False.

    Rows are the groups' samples in order, `B = P · G`; for packed rows, sequences as
    `segments.segment_sum` orders them.

    >>> to_tokens(jnp.array([[1., -1.]]), jnp.array([[True, True], [True, False]])).tolist()
    [[1.0, 1.0], [-1.0, 0.0]]
    """
    return segments.spread(jnp.reshape(advantages, -1), mask, segment_ids)


def _check_grouped(rewards) -> None:
    if jnp.ndim(rewards) != 2:
        raise ValueError(
            f"rewards must be [P, G], prompts × samples, but are {list(jnp.shape(rewards))}: use "
            "groups.split"
        )


def _number(scored) -> Array:
    return scored.sum(-1, keepdims=True)


def _siblings(scored) -> Array:
    """`[P, G]`: how many others of a sample's group are scored."""
    return _number(scored) - scored


def _mean(deviations, scored) -> Array:
    return deviations.sum(-1, keepdims=True) / jnp.maximum(_number(scored), 1)


def _of_others(x) -> Array:
    """`Σ_{j ≠ i} x_j`, from both sides: taking x_i off the sum of all would leave its rounding."""
    before = jnp.cumsum(x, axis=-1)
    after = jnp.flip(jnp.cumsum(jnp.flip(x, -1), axis=-1), -1)
    # Two exclusive sums, of what stands before and behind a sample.
    none = jnp.zeros_like(x[:, :1])
    return jnp.concatenate([none, before[:, :-1]], -1) + jnp.concatenate([after[:, 1:], none], -1)


def _from_middle(rewards) -> tuple[Array, Array]:
    """A group's middle reward `[P, 1]`, and how far all are from it `[P, G]`: 0 where that is
    rounding, or not scored.
    """
    scored = ~jnp.isnan(rewards)
    values = constant(rewards, scored)
    ordered = jnp.sort(jnp.where(scored, values, jnp.inf), axis=-1)
    # The lower median is one of the rewards: differences to it are exact, and 0 among equals, where
    # differences to a rounded mean are not.
    place = jnp.maximum(_number(scored) - 1, 0) // 2
    middle = jnp.where(
        scored.any(-1, keepdims=True), jnp.take_along_axis(ordered, place, axis=-1), 0.0
    )
    deviations = clean(values - middle, scored)
    return middle, jnp.where(jnp.abs(deviations) > rounding(values, axis=-1), deviations, 0.0)


def _alike(x, rewards) -> Array:
    return jnp.broadcast_to(x, jnp.shape(rewards))
