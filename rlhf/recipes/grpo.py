"""Group relative policy optimisation: sample groups, compare within them, clipped steps with a KL to the reference."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.lm import LM
from rlhf.rollouts import Batch, Prompts, Rollout
from rlhf.train import TrainState, minibatches, train_step


def prepare(batch: Batch) -> Batch:
    """The optimizer mini-batch with its weights."""
    return batch._replace(weights=losses.weights.token_mean(batch.mask, batch.segment_ids))


def objective(lm: LM, *, clip_low: float = 0.2, clip_high: float = 0.2, kl_coef: float = 0.04) -> Callable:
    """The `loss_fn` of a prepared `Batch`; `params` are the policy's."""

    def loss_fn(params, context, batch, key):
        where: dict[str, Any] = dict(positions=batch.positions, segment_ids=batch.segment_ids, temperature=batch.temperature)
        s = rollouts.score(lm, params, batch.tokens, **where)
        pg = losses.clipped_surrogate(
            s.logprobs, batch.logprobs, batch.advantages, batch.mask, clip_low=clip_low, clip_high=clip_high
        )
        kl = losses.kl.k3(s.logprobs, batch.ref_logprobs, batch.mask)
        metrics = {"kl": losses.weighted_sum(kl, batch.weights), "entropy": losses.weighted_sum(s.entropy, batch.weights)}
        return losses.weighted_sum(pg + kl_coef * kl, batch.weights), metrics

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
    return batch, rollout_metrics(rollout, rewards, ref_logprobs)


def rollout_metrics(rollout: Rollout, rewards, ref_logprobs) -> dict:
    """What people watch: mean reward, KL to the reference in nats a sequence, tokens a completion, share that ended."""
    kl = losses.segment_sum(losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask), rollout.mask)
    return {
        "reward": jnp.nanmean(rewards),
        "kl_to_reference": kl.mean(),
        "completion_length": rollout.mask.sum(-1).mean(),
        "finished": rollout.finished.mean(),
    }


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
