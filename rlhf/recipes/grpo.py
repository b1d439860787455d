"""Group relative policy optimisation: sample groups, compare within them, clipped steps with a KL to the reference."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.lm import LM, SharedPrefix
from rlhf.loop import Training
from rlhf.ranges import Coefficient, Count, Every, between, checked
from rlhf.recipes import online, online_steps, setup
from rlhf.recipes.importance import Importance
from rlhf.recipes.online import Sampling, Scoring
from rlhf.rollouts import Batch, Rollout
from rlhf.runs import RunFolder


def prepare(batch: Batch, weights: Callable = losses.weights.token_mean) -> Batch:
    """The optimizer mini-batch with its weights."""
    return batch._replace(weights=weights(batch.mask, batch.segment_ids))


def objective(
    lm: LM,
    *,
    loss: Callable = losses.clipped_surrogate,
    kl_coef: float = 0.04,
    shared: SharedPrefix | None = None,
    **knobs,
) -> Callable:
    """The `loss_fn` of a prepared `Batch`; `params` are the policy's, `loss` a surrogate and `knobs` its own.

    What rows share is read once.  With a `kl_coef` of 0 the batch needs no log-probs of a reference.
    """

    def loss_fn(params, context, batch, key):
        s = rollouts.score_batch(lm, params, batch, shared=shared)
        per_token = loss(s.logprobs, batch.logprobs, batch.advantages, batch.mask, **knobs)
        if batch.importance is not None:  # of what sampling decided alone: the KL is of the policy as it is
            per_token = per_token * batch.importance
        metrics = {"entropy": losses.weighted_sum(s.entropy, batch.weights)}
        if kl_coef:
            kl = losses.kl.k3(s.logprobs, batch.ref_logprobs, batch.mask)
            metrics["kl"] = losses.weighted_sum(kl, batch.weights)
            per_token = per_token + kl_coef * kl
        return losses.weighted_sum(per_token, batch.weights), metrics

    return loss_fn


def experience(
    lm: LM, ref_params, rollout: Rollout, rewards, *, num_samples: int, shared: SharedPrefix | None = None
) -> tuple[Batch, dict]:
    """A rollout as a `Batch`: advantages within the groups, log-probs of the reference.

    Args:
      rewards: `[B]`, NaN where a completion could not be scored.
      num_samples: completions a prompt.
      shared: what the rows of the rollout share.
    """
    advantages = losses.group_relative(rewards.reshape(-1, num_samples)).reshape(-1, 1)
    ref_logprobs = online.logprobs(lm, ref_params, rollout, shared)
    batch = rollouts.batch_of(rollout, advantages=jnp.where(rollout.mask, advantages, 0.0), ref_logprobs=ref_logprobs)
    return batch, online.rollout_metrics(rollout, rewards, ref_logprobs)


def iteration(
    lm: LM,
    reward_fn: Callable,
    optimizer,
    *,
    max_new_tokens: int,
    num_samples: int = 8,
    loss: Callable = losses.clipped_surrogate,
    kl_coef: float = 0.04,
    **how,
) -> Callable:
    """`online_steps.iteration`, with its arguments; `state.context["reference"]` holds the reference's params."""
    _check_groups(num_samples)
    sampled = dict(num_samples=num_samples, shared=SharedPrefix(num_samples, max_new_tokens))

    def compared(state, rollout, rewards):
        return state, *experience(lm, state.context["reference"], rollout, rewards, **sampled)

    return online_steps.iteration(
        lm, reward_fn, optimizer, compared, prepare, lambda shared: objective(lm, loss=loss, kl_coef=kl_coef, shared=shared),
        max_new_tokens=max_new_tokens, num_samples=num_samples, **how,
    )  # fmt: skip


@checked
def main(
    model: setup.Model,
    source: online.Asking,
    training: Training,
    scoring: Scoring,
    sampling: Sampling,
    importance: Importance,
    output: str,
    *,
    loss: str = "grpo",
    clip_low: Coefficient | None = None,
    clip_high: Coefficient | None = None,
    beta: Coefficient = 0.0,
    sync_every: Every = 0,
    sync_share: Annotated[float, between(0, 1, above=True)] = 0.6,
    updates_per_batch: Count = 1,
    mini_batches: Count = 1,
    resume: bool = False,
) -> dict[str, float]:
    """Group relative policy optimisation: samples groups of answers, scores them, and compares within each group.

    Rows have `prompt`, and the columns that the reward functions read.

    Args:
      output: a new folder for the run.
      loss: grpo, dr_grpo, dapo, lite_ppo, gspo, luspo, gmpo, cispo, sapo, vespo, dppo or max_rl.
      clip_low: lower half-width of the trust region; null: the loss's own.
      clip_high: upper half-width; null: the loss's own.
      beta: coefficient of the KL to the reference, which is the model as it was; 0: that is not computed.
      sync_every: steps after which the reference moves towards the policy; 0: it stays.
      sync_share: how far.
      updates_per_batch: passes over the sampled answers.
      mini_batches: optimizer steps of a pass.
      resume: go on with the run in the folder.
    """
    run, groups = RunFolder(output, options=locals()), sampling.num_samples
    algorithm = online.algorithm(loss, sampling.max_new_tokens, clip_low=clip_low, clip_high=clip_high)
    hooks = setup.following(model, sync_every, sync_share)
    if hooks and not beta:
        raise ValueError(f"sync_every {sync_every} moves the reference, but with a beta of 0 there is none; give --beta")
    _check_groups(groups)
    begin = online_steps.start(
        run, model, source, training, scoring, sampling,
        rows=training.batch_size * groups, mini_batches=mini_batches, epochs=updates_per_batch,
    )  # fmt: skip
    policy = setup.policy(model, training.seed)
    sample = online.sampler(policy, sampling, begin.eos_ids)
    prompt = SharedPrefix(groups, sampling.max_new_tokens)
    shared = prompt.fitting(training.batch_size * groups, mini_batches * training.micro_batches)
    loss_fn = policy.of_whole(objective(policy.lm, loss=algorithm.loss, kl_coef=beta, shared=shared))

    def compared(state, rollout, rewards):
        advantages = algorithm.advantages(rewards.reshape(-1, groups), rollout.mask)
        reference = online.logprobs(policy.lm, policy.reference(state.context), rollout, prompt) if beta else None
        return state, rollouts.batch_of(rollout, advantages=advantages, ref_logprobs=reference), {}

    _, figures = online_steps.learn(
        begin, policy, sample, compared, partial(prepare, weights=algorithm.weights), loss_fn, together=shared.rows,
        weigh=importance.weigh(sampling.sampler()),
        **setup.kept(policy.context(with_reference=beta > 0), hooks),
    )  # fmt: skip
    return figures


def _check_groups(num_samples: int) -> None:
    if num_samples < 2:
        raise ValueError(
            f"num_samples {num_samples}: advantages compare the samples of a prompt with each other; give at least 2"
        )
