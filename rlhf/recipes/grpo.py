"""Group relative policy optimisation: sample groups, compare within them, clipped steps with a KL to the reference."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from rlhf import losses, rollouts, tasks
from rlhf.lm import LM
from rlhf.loop import Training, fit
from rlhf.models.huggingface import load_tokenizer
from rlhf.recipes import online, setup
from rlhf.recipes.online import Sampling, Scoring
from rlhf.rollouts import Batch, Prompts, Rollout
from rlhf.runs import RunFolder
from rlhf.train import TrainState, minibatches, train_step


def prepare(batch: Batch, weights: Callable = losses.weights.token_mean) -> Batch:
    """The optimizer mini-batch with its weights."""
    return batch._replace(weights=weights(batch.mask, batch.segment_ids))


def objective(lm: LM, *, loss: Callable = losses.clipped_surrogate, kl_coef: float = 0.04, **knobs) -> Callable:
    """The `loss_fn` of a prepared `Batch`; `params` are the policy's, `loss` a surrogate and `knobs` its own.

    With a `kl_coef` of 0 the batch needs no log-probs of a reference.
    """

    def loss_fn(params, context, batch, key):
        where: dict[str, Any] = dict(positions=batch.positions, segment_ids=batch.segment_ids, temperature=batch.temperature)
        s = rollouts.score(lm, params, batch.tokens, **where)
        per_token = loss(s.logprobs, batch.logprobs, batch.advantages, batch.mask, **knobs)
        metrics = {"entropy": losses.weighted_sum(s.entropy, batch.weights)}
        if kl_coef:
            kl = losses.kl.k3(s.logprobs, batch.ref_logprobs, batch.mask)
            metrics["kl"] = losses.weighted_sum(kl, batch.weights)
            per_token = per_token + kl_coef * kl
        return losses.weighted_sum(per_token, batch.weights), metrics

    return loss_fn


def experience(lm: LM, ref_params, rollout: Rollout, rewards, *, num_samples: int) -> tuple[Batch, dict]:
    """A rollout as a `Batch`: advantages within the groups, log-probs of the reference.

    Args:
      rewards: `[B]`, NaN where a completion could not be scored.
      num_samples: completions a prompt.
    """
    advantages = losses.group_relative(rewards.reshape(-1, num_samples)).reshape(-1, 1)
    where: dict[str, Any] = dict(positions=rollout.positions, segment_ids=rollout.segment_ids, temperature=rollout.temperature)
    ref_logprobs = rollouts.token_logprobs(lm, ref_params, rollout.tokens, **where)
    batch = rollouts.batch_of(
        rollout, advantages=jnp.where(rollout.mask, advantages, 0.0), ref_logprobs=jax.lax.stop_gradient(ref_logprobs)
    )
    return batch, online.rollout_metrics(rollout, rewards, ref_logprobs)


def iteration(
    lm: LM,
    reward_fn: Callable,
    optimizer,
    *,
    max_new_tokens: int,
    num_samples: int = 8,
    sampler: rollouts.samplers.Sampler = rollouts.samplers.Sampler(),
    eos_ids: tuple[int, ...] = (),
    epochs: int = 1,
    mini_batches: int = 1,
    micro_batches: int = 1,
    early_end: bool = True,
    **knobs,
) -> Callable:
    """One pure iteration, `(state, prompts, key) -> (state, metrics)`: sample, score, compare, and take the optimizer steps.

    `state.context["reference"]` holds the reference's params; `reward_fn(context, rollout, key) -> [B]`; `knobs` are those of
    `objective`.
    """
    step = train_step(objective(lm, **knobs), optimizer, micro_batches=micro_batches)

    def iterate(state: TrainState, prompts: Prompts, key) -> tuple[TrainState, dict]:
        sample_key, reward_key, order_key = jax.random.split(key, 3)
        rollout = rollouts.generate(
            lm, state.params, prompts, sample_key, max_new_tokens=max_new_tokens, num_samples=num_samples,
            sampler=sampler, eos_ids=eos_ids, early_end=early_end,
        )  # fmt: skip
        rewards = reward_fn(state.context, rollout, reward_key)
        batch, seen = experience(lm, state.context["reference"], rollout, rewards, num_samples=num_samples)
        batches = minibatches(order_key, batch, mini_batches, epochs)
        state, metrics = jax.lax.scan(lambda state, batch: step(state, prepare(batch)), state, batches)
        return state, {**jax.tree.map(jnp.mean, metrics), **seen}

    return iterate


def main(
    model: setup.Model, source: setup.Data, training: Training, scoring: Scoring, sampling: Sampling, output: str, *,
    loss: str = "grpo", clip_low: float | None = None, clip_high: float | None = None, beta: float = 0.0,
    updates_per_batch: int = 1, mini_batches: int = 1, resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Group relative policy optimisation: samples groups of answers, scores them, and compares within each group.

    Rows have `prompt`, and the columns that the reward functions read.

    Args:
      output: a new folder for the run.
      loss: grpo, dr_grpo, dapo, lite_ppo, gspo, luspo, gmpo, cispo, sapo, vespo, dppo or max_rl.
      clip_low: lower half-width of the trust region; null: the loss's own.
      clip_high: upper half-width; null: the loss's own.
      beta: coefficient of the KL to the model as it was; 0: that is not computed.
      updates_per_batch: passes over the sampled answers.
      mini_batches: optimizer steps of a pass.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    algorithm = online.algorithm(loss, sampling.max_new_tokens, clip_low=clip_low, clip_high=clip_high)
    tokenizer = load_tokenizer(model.model)
    judge = scoring.judge(source, tokenizer)
    rows, held_out = source.rows(tasks.prompts)
    train, test = online.Questions.of(tokenizer, rows), online.Questions.of(tokenizer, held_out) if held_out else None
    total = training.total_steps(len(train.rows))
    policy = setup.policy(model, training.seed)
    sample = online.sampler(policy, sampling, tokenizer)
    loss_fn = policy.of_whole(objective(policy.lm, loss=algorithm.loss, kl_coef=beta))

    def make_step(optimizer):
        step = train_step(loss_fn, optimizer, micro_batches=training.micro_batches)

        @partial(jax.jit, donate_argnums=0)
        def update(state, rollout, rewards, key):
            where: dict[str, Any] = dict(positions=rollout.positions, segment_ids=rollout.segment_ids)
            reference = lambda: rollouts.token_logprobs(
                policy.lm, policy.reference(state.context), rollout.tokens, temperature=rollout.temperature, **where
            )
            advantages = algorithm.advantages(rewards.reshape(-1, sampling.num_samples), rollout.mask)
            batch = rollouts.batch_of(rollout, advantages=advantages, ref_logprobs=reference() if beta else None)
            batches = minibatches(key, batch, mini_batches, updates_per_batch)
            state, metrics = jax.lax.scan(lambda state, b: step(state, prepare(b, algorithm.weights)), state, batches)
            return state, jax.tree.map(jnp.mean, metrics)

        def iterate(state, asked: online.Asked):
            rollout = sample(state, asked.prompts, asked.key)
            rewards, figures = judge(rollout, asked.columns, sampling.num_samples)
            state, metrics = update(state, rollout, rewards, jax.random.fold_in(asked.key, 1))
            return state, {**metrics, **figures, **online.figures(rollout)}

        return iterate

    state, figures = fit(
        run, training, make_step, policy.params, lambda number, size: train.take(training.seed, number, size),
        total=total, context=policy.context(with_reference=beta > 0), updates=mini_batches * updates_per_batch,
        shown=("reward", "completion_length"),
        evaluate=test and online.evaluation(run, sample, judge, test, training, tokenizer),
    )  # fmt: skip
    policy.export(run.path, state, tokenizer)
    return figures
