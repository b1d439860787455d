"""Named algorithms: which advantages, which per-token loss, which weights.

Each function returns an `Objective`, a tuple of three functions that a train step calls in this
order:

```python
objective = presets.dapo()
advantages = objective.advantages(rewards, mask)                           # once per batch
weights = objective.weights(mask)                                          # once per optimizer
mini-batch per_token = objective.loss(logprobs, old_logprobs, advantages, mask)       # in every
micro-batch loss = losses.weighted_sum(per_token, weights)
```

A KL to the reference, an entropy bonus, importance weights are terms and factors that a user adds
to `per_token`.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.losses import groups, policy, ratios, segments
from rlhf.losses import weights as reduction
from rlhf.losses.advantages import gae, returns, token_rewards, whiten

SEQUENCE_LEVEL = (
    policy.gspo,
    policy.luspo,
    policy.gmpo,
    ratios.sequence_log_ratio,
    ratios.product_log_ratio,
)
# A token's loss looks at no other token: where its ratio does not either, the loss of a batch can be
# taken in pieces.
TOKEN_LEVEL = (
    policy.clipped_surrogate,
    policy.dual_clipped_surrogate,
    policy.two_sided_surrogate,
    policy.cispo,
    policy.sapo,
    policy.dppo,
)
TOKEN_SUMS = (reduction.token_mean, reduction.sequence_sum, reduction.constant)


@documented
class Objective(NamedTuple):
    """An algorithm; every function also takes `segment_ids=`, `[B, T]` int32, for packed rows.

    Attributes:
      advantages: (rewards [P, G], mask [B, T]) -> [B, T]; `ppo`: as `gae`; some take
        `penalties [B, T]`.
      loss: (logprobs, old_logprobs, advantages, mask), all [B, T] -> [B, T].
      weights: (mask [B, T]) -> [B, T].
      is_token_level: whether the loss treats each token by itself: a train step then makes the
        logits once (`rollouts.score_loss`).
    """

    advantages: Callable
    loss: Callable
    weights: Callable
    is_token_level: bool = False


def objective(advantages: Callable, loss: Callable, weights: Callable, **options) -> Objective:
    """An `Objective` of a group advantage `[P, G] -> [P, G]`, a surrogate with its options, and
    weights; checked to go together.

    Args:
      advantages: `(rewards [P, G]) -> [P, G]`, from `groups`.
      loss: a surrogate from `policy`, or any of its signature.
      weights: from `weights`, for example `functools.partial(weights.constant, length=1024)`.
      options: the surrogate's.

    Raises: ValueError where a sequence's ratio meets weights that sum over tokens: each of its
    tokens carries the whole sequence's loss, so that it would count by its length, twice.

    >>> mine = objective(groups.dr_grpo, policy.cispo, reduction.token_mean, max_ratio=4.0)
    >>> mine.advantages(jnp.array([[1., 0.]]), jnp.array([[True], [True]])).tolist()
    [[0.5], [-0.5]]
    """

    loss = functools.partial(loss, **options)
    # A loss may take its ratio as an option: both places are looked at.
    sequence_level = [f.__name__ for f in SEQUENCE_LEVEL if f in (loss.func, _ratio(loss))]
    if sequence_level and _bare(weights) in TOKEN_SUMS:
        name = _bare(weights).__name__
        raise ValueError(
            f"{sequence_level[0]} is one ratio for a whole sequence, but weights.{name} sums over tokens: "
            "each sequence "
            "would count by its length; use weights.sequence_mean (or the token form, gspo_token)"
        )
    return Objective(_of_groups(advantages), _with_segments(loss), weights, _is_token_level(loss))


def replaced(
    algorithm: Objective, *, advantages: Callable | None = None, loss: Callable | None = None
) -> Objective:
    """The algorithm with other advantages of its groups, or another surrogate.

    Args:
      algorithm: a preset.
      advantages: `(rewards [P, G]) -> [P, G]`, from `groups`; None: its own.
      loss: `(logprobs, old_logprobs, advantages, mask) -> [B, T]`, from `policy`, its options
        bound; None: its own.

    >>> mine = replaced(grpo(), advantages=groups.dr_grpo)
    >>> mine.advantages(jnp.array([[1., 0.]]), jnp.array([[True], [True]])).tolist()
    [[0.5], [-0.5]]
    """
    if advantages is not None:
        algorithm = algorithm._replace(advantages=_of_groups(advantages))
    if loss is None:
        return algorithm
    return algorithm._replace(loss=_with_segments(loss), is_token_level=_is_token_level(loss))


def ppo(*, discount=1.0, lam=0.95, clip_low=0.2, clip_high=0.2) -> Objective:
    """PPO  (arXiv:1707.06347): GAE, clipped surrogate, token mean; add `clipped_value_loss` with
    the returns.

    `advantages(rewards
    [B, T], values, mask, *, bootstrap, segment_ids=None) -> (advantages,
    returns)`; whiten the advantages in every optimizer mini-batch.

    >>> lp, mask = jnp.array([[-1.]]), jnp.array([[True]])
    >>> ppo().loss(lp, lp, jnp.array([[2.]]), mask).tolist()
    [[-2.0]]
    """
    return Objective(
        functools.partial(gae, discount=discount, lam=lam),
        _clipped(clip_low, clip_high),
        reduction.token_mean,
        is_token_level=True,
    )


def reinforce_pp(*, discount=1.0, clip_low=0.2, clip_high=0.2) -> Objective:
    """REINFORCE++  (arXiv:2501.03262): reward-to-go with the KL in the reward, whitened over the
    batch; clipped surrogate.

    `advantages(rewards [P, G], mask, penalties [B, T], segment_ids=None)`; couples rows.

    >>> penalties, mask = jnp.array([[0.1], [0.3]]), jnp.array([[True], [True]])
    >>> reinforce_pp().advantages(jnp.array([[1., 0.]]), mask, penalties).tolist()
    [[0.707], [-0.707]]
    """

    def advantages(rewards, mask, penalties, segment_ids=None):
        # REINFORCE++ has the KL in the reward of each token, not in the loss.
        paid = token_rewards(rewards.reshape(-1), penalties, mask, segment_ids=segment_ids)
        return whiten(returns(paid, mask, segment_ids=segment_ids, discount=discount), mask)

    loss = _clipped(clip_low, clip_high)
    return Objective(advantages, loss, reduction.token_mean, is_token_level=True)


def reinforce_pp_baseline(*, clip_low=0.2, clip_high=0.2) -> Objective:
    """REINFORCE++-baseline  (arXiv:2501.03262): `r - mean_group`, whitened over all tokens of the
    batch; clipped surrogate.

    Couples rows.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> reinforce_pp_baseline().loss(lp, old, reinforce_pp_baseline().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-0.849], [0.589]]
    """

    def advantages(rewards, mask, segment_ids=None):
        # Whitened after it is spread to tokens: long completions count by their length.
        return whiten(groups.to_tokens(groups.dr_grpo(rewards), mask, segment_ids), mask)

    loss = _clipped(clip_low, clip_high)
    return Objective(advantages, loss, reduction.token_mean, is_token_level=True)


def rloo(*, clip_low=0.2, clip_high=0.2) -> Objective:
    """RLOO  (arXiv:2402.14740): leave-one-out baseline, the KL in the reward, one ratio of whole
    sequences.

    `advantages(rewards [P, G], mask, penalties [B, T], segment_ids=None)`.

    >>> penalties, mask = jnp.array([[0.1], [0.3]]), jnp.array([[True], [True]])
    >>> rloo().advantages(jnp.array([[1., 0.]]), mask, penalties).tolist()
    [[1.2], [-1.2]]
    """

    def advantages(rewards, mask, penalties, segment_ids=None):
        # Sequences of a packed row: there is one reward for each.
        slots = rewards.size // mask.shape[0]
        # The KL of a whole sequence comes off its reward before the baseline is taken.
        paid = segments.segment_sum(penalties, mask, segment_ids, max_segments=slots)
        return groups.to_tokens(
            groups.rloo(rewards - paid.reshape(rewards.shape)), mask, segment_ids
        )

    def loss(logprobs, old_logprobs, advantages, mask, segment_ids=None):
        level = functools.partial(ratios.product_log_ratio, segment_ids=segment_ids)
        return policy.clipped_surrogate(
            logprobs,
            old_logprobs,
            advantages,
            mask,
            clip_low=clip_low,
            clip_high=clip_high,
            log_ratio=level,
        )

    return Objective(advantages, loss, reduction.sequence_mean)


def grpo(*, clip_low=0.2, clip_high=0.2, eps=1e-4) -> Objective:
    """GRPO  (arXiv:2402.03300): group mean and deviation, clipped surrogate, mean over sequences of
    token means.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> grpo().loss(lp, old, grpo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-0.848], [0.589]]
    """
    advantages = functools.partial(groups.group_relative, eps=eps)
    return objective(
        advantages,
        policy.clipped_surrogate,
        reduction.sequence_mean,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def dr_grpo(*, length: float, clip_low=0.2, clip_high=0.2) -> Objective:
    """Dr. GRPO  (arXiv:2503.20783): group mean alone, and a constant length, so that neither
    difficulty nor length biases.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> dr_grpo(length=4).loss(lp, old, dr_grpo(length=4).advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-0.6], [0.417]]
    """
    weights = functools.partial(reduction.constant, length=length)
    return objective(
        groups.dr_grpo, policy.clipped_surrogate, weights, clip_low=clip_low, clip_high=clip_high
    )


def dapo(*, clip_low=0.2, clip_high=0.28, eps=1e-4) -> Objective:
    """DAPO  (arXiv:2503.14476): GRPO with a higher upper clip and the token mean; see
    `masks.finished_only`.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> dapo().loss(lp, old, dapo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-0.905], [0.589]]
    """
    advantages = functools.partial(groups.group_relative, eps=eps)
    return objective(
        advantages,
        policy.clipped_surrogate,
        reduction.token_mean,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def lite_ppo(*, clip_low=0.2, clip_high=0.2) -> Objective:
    """LitePPO  (arXiv:2508.08221): group mean, batch deviation, clipped surrogate, token mean.  Couples rows.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> lite_ppo().loss(lp, old, lite_ppo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-0.848], [0.589]]
    """
    return objective(
        groups.lite_ppo,
        policy.clipped_surrogate,
        reduction.token_mean,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def gspo(*, clip_low=3e-4, clip_high=4e-4, eps=1e-4) -> Objective:
    """GSPO  (arXiv:2507.18071): GRPO with the sequence's ratio, mean over sequences.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> gspo().loss(lp, old, gspo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-0.707], [0.707]]
    """
    advantages = functools.partial(groups.group_relative, eps=eps)
    return objective(
        advantages, policy.gspo, reduction.sequence_mean, clip_low=clip_low, clip_high=clip_high
    )


def luspo(*, clip_low=3e-4, clip_high=4e-4, eps=1e-4) -> Objective:
    """LUSPO  (arXiv:2602.05261): GSPO times the sequence's length.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> luspo().loss(lp, old, luspo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-0.707], [0.707]]
    """
    advantages = functools.partial(groups.group_relative, eps=eps)
    return objective(
        advantages, policy.luspo, reduction.sequence_mean, clip_low=clip_low, clip_high=clip_high
    )


def gmpo(*, clip_low=0.4, clip_high=0.4, eps=1e-4) -> Objective:
    """GMPO  (arXiv:2507.20673): the geometric mean of bounded ratios, mean over sequences.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> gmpo().loss(lp, old, gmpo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-1.055], [0.589]]
    """
    advantages = functools.partial(groups.group_relative, eps=eps)
    return objective(
        advantages, policy.gmpo, reduction.sequence_mean, clip_low=clip_low, clip_high=clip_high
    )


def cispo(*, max_ratio=5.0, min_ratio=0.0, eps=1e-4) -> Objective:
    """CISPO  (arXiv:2506.13585): bounded, detached ratios on every token's gradient, token mean.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> cispo().loss(lp, old, cispo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[0.817], [-0.408]]
    """
    advantages = functools.partial(groups.group_relative, eps=eps)
    return objective(
        advantages, policy.cispo, reduction.token_mean, max_ratio=max_ratio, min_ratio=min_ratio
    )


def sapo(*, tau_pos=1.0, tau_neg=1.05, eps=1e-4) -> Objective:
    """SAPO  (arXiv:2511.20347): a soft gate in place of the clip, mean over sequences.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> sapo().loss(lp, old, sapo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-1.869], [1.229]]
    """
    advantages = functools.partial(groups.group_relative, eps=eps)
    return objective(
        advantages, policy.sapo, reduction.sequence_mean, tau_pos=tau_pos, tau_neg=tau_neg
    )


def vespo(*, k_pos=2.0, lam_pos=3.0, k_neg=3.0, lam_neg=2.0, eps=1e-4) -> Objective:
    """VESPO  (arXiv:2602.10693): a smooth weight of whole sequences on every token's gradient,
    token mean.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> vespo().loss(lp, old, vespo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[0.184], [-0.396]]
    """
    advantages = functools.partial(groups.group_relative, eps=eps)
    options = {"k_pos": k_pos, "lam_pos": lam_pos, "k_neg": k_neg, "lam_neg": lam_neg}
    return objective(advantages, policy.vespo, reduction.token_mean, **options)


def dppo(*, threshold_low=0.2, threshold_high=0.2) -> Objective:
    """DPPO  (arXiv:2602.04879): group mean, a trust region on probabilities, token mean.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> dppo().loss(lp, old, dppo().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-0.833], [0.417]]
    """
    thresholds = {"threshold_low": threshold_low, "threshold_high": threshold_high}
    return objective(groups.dr_grpo, policy.dppo, reduction.token_mean, **thresholds)


def max_rl(*, clip_low=0.2, clip_high=0.2) -> Objective:
    """MaxRL  (arXiv:2602.02710): rewards relative to the group's success rate, clipped surrogate,
    token mean.

    >>> lp, old, mask = jnp.log(jnp.array([[0.5], [0.5]])), jnp.log(jnp.array([[0.3], [0.6]])), jnp.array([[True], [True]])
    >>> max_rl().loss(lp, old, max_rl().advantages(jnp.array([[1., 0.]]), mask), mask).tolist()
    [[-1.2], [0.833]]
    """
    return objective(
        groups.max_rl,
        policy.clipped_surrogate,
        reduction.token_mean,
        clip_low=clip_low,
        clip_high=clip_high,
    )


def _clipped(clip_low, clip_high) -> Callable:
    return _with_segments(
        functools.partial(policy.clipped_surrogate, clip_low=clip_low, clip_high=clip_high)
    )


def _bare(function: Any) -> Any:
    # A `functools.partial` has the function that it binds arguments of in `func`.
    return getattr(function, "func", function)


def _ratio(loss: Any) -> Any:
    """What makes a loss's log-ratio: bound as an option, or each token's own."""
    return _bare(getattr(loss, "keywords", {}).get("log_ratio", ratios.token_log_ratio))


def _is_token_level(loss: Any) -> bool:
    return _bare(loss) in TOKEN_LEVEL and _ratio(loss) is ratios.token_log_ratio


def _with_segments(loss: Callable) -> Callable:
    """`loss`, which may be given `segment_ids` whether or not it looks at sequences."""
    # A train step gives `segment_ids` to every loss; those that work by the token drop it.
    if "segment_ids" in inspect.signature(loss).parameters:
        return loss
    return lambda *arrays, segment_ids=None: loss(*arrays)


def _of_groups(advantages: Callable) -> Callable:
    return lambda rewards, mask, segment_ids=None: groups.to_tokens(
        advantages(rewards), mask, segment_ids
    )
