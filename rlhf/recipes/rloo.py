"""REINFORCE leave-one-out: each answer against the mean of its siblings, the KL to the reference in the reward."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.lm import LM, SharedPrefix
from rlhf.loop import Training
from rlhf.losses import presets
from rlhf.ranges import Coefficient, Count, between, checked
from rlhf.recipes import grpo, online, online_steps, setup
from rlhf.recipes.importance import Importance
from rlhf.recipes.online import Drawing, Scoring
from rlhf.rollouts import Batch, Rollout
from rlhf.runs import RunFolder

prepare = partial(grpo.prepare, weights=presets.rloo().weights)  # the optimizer mini-batch: every answer weighs the same


def objective(lm: LM, *, clip_low: float = 0.2, clip_high: float = 0.2, shared: SharedPrefix | None = None) -> Callable:
    """The `loss_fn` of a prepared `Batch`, as `grpo.objective`: one ratio of whole answers, clipped."""
    return grpo.objective(lm, loss=presets.rloo(clip_low=clip_low, clip_high=clip_high).loss, kl_coef=0.0, shared=shared)


def experience(
    lm: LM, ref_params, rollout: Rollout, rewards, *, num_samples: int, kl_coef: float = 0.05, normalize: bool = False,
    shared: SharedPrefix | None = None,
) -> tuple[Batch, dict]:  # fmt: skip
    """A rollout as a `Batch`: advantages over the other answers of the prompt, of `reward - kl_coef · k1` of the whole answer.

    Args:
      rewards: `[B]`, NaN where a completion could not be scored.
      num_samples: completions a prompt.
      normalize: advantages with mean 0 and deviation 1 over the batch, which couples its rows.
      shared: what the rows of the rollout share.
    """
    ref_logprobs = online.logprobs(lm, ref_params, rollout, shared)
    penalties = kl_coef * losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask)
    advantages = presets.rloo().advantages(rewards.reshape(-1, num_samples), rollout.mask, penalties)
    if normalize:
        of_answers = losses.segment_sum(advantages, losses.segments.last_trained(rollout.mask))
        scored = jnp.where(jnp.isnan(rewards), jnp.nan, of_answers)
        advantages = losses.groups.to_tokens(losses.group_relative(scored[None, :]), rollout.mask)
    return rollouts.batch_of(rollout, advantages=advantages), online.rollout_metrics(rollout, rewards, ref_logprobs)


@checked
def main(
    model: setup.Model,
    source: online.Asking,
    training: Training,
    scoring: Scoring,
    drawing: Drawing,
    importance: Importance,
    output: str,
    *,
    num_samples: Annotated[int, between(2, 65_536)] = 2,
    beta: Coefficient = 0.05,
    clip_low: Annotated[float, between(0, 1, above=True, below=True)] = 0.2,
    clip_high: Annotated[float, between(0, 1, above=True, below=True)] = 0.2,
    normalize_advantages: bool = False,
    updates_per_batch: Count = 1,
    mini_batches: Count = 1,
    resume: bool = False,
) -> dict[str, float]:
    """REINFORCE leave-one-out: samples several answers, and compares each with the mean of the others.

    Rows have `prompt`, and the columns that the reward functions read.

    Args:
      output: a new folder for the run.
      num_samples: answers a prompt, at least 2.
      beta: what the KL to the model as it was costs, per nat of a whole answer.
      clip_low: lower half-width of the trust region on the ratio of whole answers.
      clip_high: upper half-width.
      normalize_advantages: to mean 0 and deviation 1 over the batch.
      updates_per_batch: passes over the sampled answers.
      mini_batches: optimizer steps of a pass.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    begin = online_steps.start(
        run, model, source, training, scoring, drawing,
        rows=training.batch_size * num_samples, mini_batches=mini_batches, epochs=updates_per_batch,
    )  # fmt: skip
    policy = setup.policy(model, training.seed)
    sample = online.player(policy.lm, online.params_of(policy), drawing, begin.eos_ids, num_samples)
    prompt = SharedPrefix(num_samples, drawing.max_new_tokens)
    shared = prompt.fitting(training.batch_size * num_samples, mini_batches * training.micro_batches)
    loss_fn = policy.of_whole(objective(policy.lm, clip_low=clip_low, clip_high=clip_high, shared=shared))
    knobs = dict(num_samples=num_samples, kl_coef=beta, normalize=normalize_advantages, shared=prompt)

    def compared(state, rollout, rewards):
        return state, *experience(policy.lm, policy.reference(state.context), rollout, rewards, **knobs)

    _, figures = online_steps.learn(
        begin, policy, sample, compared, prepare, loss_fn, together=shared.rows, weigh=importance.weigh(drawing.sampler()),
        fixed=policy.context(with_reference=True), shown=("reward", "kl_to_reference"),
    )  # fmt: skip
    return figures
