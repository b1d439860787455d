"""Preference objectives on pairs of completions: what DPO, online DPO, XPO and reward models
share.
"""

import inspect
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.lm import LM, Params
from rlhf.losses import preference
from rlhf.rollouts import Pairs, Rollout
from rlhf.shared_prefix import SharedPrefix
from rlhf.training.policy import Policy

# Arguments of losses that divide by numbers of tokens.
LENGTHS = ("chosen_length", "rejected_length")


def with_weights(pairs: Pairs, *, max_segments: int = 1) -> Pairs:
    """An optimizer mini-batch with its weights: every pair the same.

    A place of a packed row that holds no pair weighs nothing, and neither does a pair with a side
    of which nothing is trained.
    """
    # `[R, K, T]` -> `[R * K, T]`, the completions of a pair side by side: a model reads rows, and
    # the prompt that neighbours share can be read once.
    rows = rollouts.pair_rows(pairs)
    trained = (
        losses.segment_sum(rows.mask, rows.mask, rows.segment_ids, max_segments=max_segments) > 0
    )
    valid = trained.reshape(pairs.tokens.shape[0], -1, 2).all(-1)
    # `maximum(…, 1)`: a batch without a valid pair has loss 0 rather than NaN.
    return pairs._replace(weights=valid / jnp.maximum(valid.sum(), 1).astype(jnp.float32))


def completion_sums(per_token, pairs: Pairs, mask=None, *, max_segments: int = 1):
    """Sums over the trained tokens of each completion, chosen and rejected: `[R * K, T]` ->
    `[R, N, 2]`; of triples 3.

    Args:
      per_token: `[R * K, T]`.
      pairs: R rows of K completions.
      mask: `[R * K, T]` bool, the tokens that are summed; None: the trained ones.
      max_segments: the most sequences of a packed row.
    """
    rows = rollouts.pair_rows(pairs)
    mask = rows.mask if mask is None else mask
    of_sequences = losses.segment_sum(per_token, mask, rows.segment_ids, max_segments=max_segments)
    # Unpacked pairs are `[R, 2, T]` with one sequence a row; packed ones `[R, 1, T]` with the sides
    # of a pair as neighbouring segments.  Both end as `[R, N, 2]`.
    return of_sequences.reshape(pairs.tokens.shape[0], -1, max(pairs.tokens.shape[1], 2))


def lengths(pairs: Pairs, *, max_segments: int = 1):
    """`[R, N, 2]` float32: the number of trained tokens of each completion."""
    mask = rollouts.pair_rows(pairs).mask.astype(jnp.float32)
    return completion_sums(mask, pairs, max_segments=max_segments)


def sequence_logprobs(
    lm: LM,
    params: Params,
    pairs: Pairs,
    *,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
) -> jax.Array:
    """`[R, N, 2]`: the log-probs of whole completions, chosen and rejected; gradients flow to
    `params`.
    """
    rows = rollouts.pair_rows(pairs)
    logprobs = rollouts.score_batch(lm, params, rows, shared=shared).logprobs
    return completion_sums(logprobs, pairs, max_segments=max_segments)


def with_reference(
    policy: Policy,
    context,
    pairs: Pairs,
    *,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
) -> Pairs:
    """Pairs with the reference's sequence log-probs; no gradient."""
    logprobs = sequence_logprobs(
        policy.lm, policy.reference_params(context), pairs, max_segments=max_segments, shared=shared
    )
    return pairs._replace(ref_logprobs=jax.lax.stop_gradient(logprobs))


def comparison(
    *, loss: Callable = preference.sigmoid, beta: float = 0.1, max_segments: int = 1
) -> Callable:
    """`(sequence log-probs [R, N, 2], context, pairs with weights) -> (loss, metrics)`.

    Args:
      loss: of `losses.preference`; one that takes `chosen_length` and `rejected_length` is given
        them.  With one that couples rows, such as `aot`, this is the `objective` of
        `rlhf.coupled_train_step`.
      beta: strength of the pull towards the reference, per nat.
      max_segments: the most sequences of a packed row.
    """
    # Most losses take no lengths; counting them would cost two segment sums a step.
    by_length = "chosen_length" in inspect.signature(loss).parameters

    def sides(x):
        return x[..., 0].reshape(-1), x[..., 1].reshape(-1)

    def compare(logprobs, context, pairs):
        chosen, rejected = sides(logprobs)
        ref_chosen, ref_rejected = sides(pairs.ref_logprobs)
        extra = {}
        if by_length:
            extra = dict(
                zip(LENGTHS, sides(lengths(pairs, max_segments=max_segments)), strict=True)
            )
        per_pair = loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta, **extra)
        weights = pairs.weights.reshape(-1)
        # DPO's implicit reward of a completion is `β log π/π_ref`, up to a constant of the prompt.
        metrics = reward_metrics(
            beta * (chosen - ref_chosen), beta * (rejected - ref_rejected), weights
        )
        metrics["logps/chosen"] = losses.weighted_sum(chosen, weights)
        metrics["logps/rejected"] = losses.weighted_sum(rejected, weights)
        return losses.weighted_sum(per_pair, weights), metrics

    return compare


def reward_metrics(chosen, rejected, weights) -> dict:
    """Means over pairs of the rewards of either side, their difference, and how often the chosen
    side has the higher one.

    Args:
      chosen, rejected: `[N]` rewards, explicit or implicit, `β log π/π_ref`.
      weights: `[N]`, of the pairs.
    """
    per_pair = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": chosen > rejected,
        "rewards/margins": chosen - rejected,
    }
    return {name: losses.weighted_sum(x, weights) for name, x in per_pair.items()}


def make_loss(
    policy: Policy,
    *,
    loss: Callable = preference.sigmoid,
    beta: float = 0.1,
    max_segments: int = 1,
    shared: SharedPrefix | None = None,
    reference_in_step: bool = False,
) -> Callable:
    """The `loss_fn` of pairs with weights and the reference's log-probs, for `rlhf.train_step`.

    Args:
      policy: what is trained.
      loss: of `losses.preference`, one that does not couple rows.
      beta: strength of the pull towards the reference, per nat.
      max_segments: the most sequences of a packed row.
      shared: what the two completions of a pair have in common, read once.
      reference_in_step: log-probs of the reference are computed here, by that in the context, and
        not read from the pairs.
    """
    compare = comparison(loss=loss, beta=beta, max_segments=max_segments)

    def loss_fn(params, context, pairs, key):
        if reference_in_step:
            pairs = with_reference(policy, context, pairs, max_segments=max_segments, shared=shared)
        full = policy.full_params(params, context, key)
        logprobs = sequence_logprobs(
            policy.lm, full, pairs, max_segments=max_segments, shared=shared
        )
        return compare(logprobs, context, pairs)

    return loss_fn


def best_and_worst(rollout: Rollout, rewards, *, num_samples: int) -> tuple[Pairs, jax.Array, dict]:
    """The best and the worst completion of each prompt as `Pairs`; where none is better, neither is
    trained.

    Args:
      rewards: `[B]`, NaN where a completion could not be scored.
      num_samples: completions a prompt, contiguous.

    Returns: the pairs; `[P, 2]` int32, which of a prompt's completions they are; and metrics.
    """
    chosen, rejected, margin = losses.online.pairs_by_score(rewards.reshape(-1, num_samples))
    picked = jnp.stack([chosen, rejected], axis=1)

    def sides(x):
        return jnp.take_along_axis(
            x.reshape(-1, num_samples, x.shape[-1]), picked[:, :, None], axis=1
        )

    # Equal rewards say nothing; NaN compares false, so that a prompt without rewards is left out
    # too.  Masked rather than dropped: shapes stay.
    mask = sides(rollout.mask) & (margin > 0)[:, None, None]
    pairs = Pairs(
        tokens=sides(rollout.tokens),
        mask=mask,
        positions=sides(rollout.positions),
        segment_ids=sides(rollout.segment_ids),
        inputs=jax.tree.map(sides, rollout.inputs),
    )
    return pairs, picked, {"reward_margin": margin.mean(), "preferred": (margin > 0).mean()}
