"""Proximal policy optimisation for language models: value head on the policy's trunk, KL to the reference in the reward."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.lm import LM, Head
from rlhf.recipes.online import rollout_metrics
from rlhf.rollouts import Batch, Prompts, Rollout
from rlhf.train import TrainState, minibatches, train_step


def prepare(batch: Batch) -> Batch:
    """The optimizer mini-batch with whitened advantages and its weights."""
    return batch._replace(
        advantages=losses.whiten(batch.advantages, batch.mask),
        weights=losses.weights.token_mean(batch.mask, batch.segment_ids),
    )


def objective(lm: LM, head: Head, *, clip: float = 0.2, value_clip: float = 0.2, value_coef: float = 0.1) -> Callable:
    """The `loss_fn` of a prepared `Batch`; `params` is `{"lm": …, "head": …}`."""

    def loss_fn(params, context, batch, key):
        s = evaluate(lm, head, params, batch)
        pg = losses.clipped_surrogate(s.logprobs, batch.logprobs, batch.advantages, batch.mask, clip_low=clip, clip_high=clip)
        value = losses.clipped_value_loss(s.values["value"], batch.values, batch.returns, batch.mask, clip=value_clip)
        metrics = {
            "policy_loss": losses.weighted_sum(pg, batch.weights),
            "value_loss": losses.weighted_sum(value, batch.weights),
            "entropy": losses.weighted_sum(s.entropy, batch.weights),
        }
        return losses.weighted_sum(pg + value_coef * value, batch.weights), metrics

    return loss_fn


def evaluate(lm: LM, head: Head, params, batch: Batch | Rollout) -> rollouts.Scored:
    """Log-probs and values of a batch's tokens, in one pass."""
    where: dict[str, Any] = dict(positions=batch.positions, segment_ids=batch.segment_ids, temperature=batch.temperature)
    return rollouts.score(lm, params["lm"], batch.tokens, heads={"value": (head, params["head"])}, **where)


def experience(
    lm: LM, head: Head, params, ref_params, rollout: Rollout, scores, *, kl_coef: float = 0.05, discount=1.0, lam=0.95
) -> tuple[Batch, dict]:
    """A rollout as a `Batch`: rewards `score at the end - kl_coef · k1`, advantages and returns by GAE.

    A score stands for all that follows.  A row without one (NaN: it was cut, say, and only whole answers are scored) goes on
    with the value after its last token instead.

    Args:
      scores: `[B]`, the reward model's; centre them near 0, or let `lam` be 1: with less, a value head that starts at 0 makes
        early tokens see less of the score.
    """
    s = evaluate(lm, head, params, rollout)
    where: dict[str, Any] = dict(positions=rollout.positions, segment_ids=rollout.segment_ids, temperature=rollout.temperature)
    ref_logprobs = rollouts.token_logprobs(lm, ref_params, rollout.tokens, **where)
    kl = losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask)
    rewards = losses.token_rewards(scores, kl_coef * kl, rollout.mask)
    bootstrap = jnp.where(jnp.isnan(scores), s.last_value["value"], 0.0)
    advantages, returns = losses.gae(rewards, s.values["value"], rollout.mask, bootstrap=bootstrap, discount=discount, lam=lam)
    batch = rollouts.batch_of(
        rollout,
        values=jax.lax.stop_gradient(s.values["value"]),
        ref_logprobs=jax.lax.stop_gradient(ref_logprobs),
        advantages=advantages,
        returns=returns,
    )
    return batch, rollout_metrics(rollout, scores, ref_logprobs)


def iteration(
    lm: LM,
    head: Head,
    reward_fn: Callable,
    optimizer,
    *,
    max_new_tokens: int,
    num_samples: int = 1,
    sampler: rollouts.samplers.Sampler = rollouts.samplers.Sampler(),
    eos_ids: tuple[int, ...] = (),
    kl_coef: float = 0.05,
    discount: float = 1.0,
    lam: float = 0.95,
    epochs: int = 4,
    mini_batches: int = 1,
    micro_batches: int = 1,
    early_end: bool = True,
    **knobs,
) -> Callable:
    """One pure iteration, `(state, prompts, key) -> (state, metrics)`: sample, score, estimate, and take the optimizer steps.

    `state.params` is `{"lm": …, "head": …}`, `state.context["reference"]` the reference's params;
    `reward_fn(context, rollout, key) -> [B]`; `knobs` are those of `objective`.
    """
    step = train_step(objective(lm, head, **knobs), optimizer, micro_batches=micro_batches)

    def iterate(state: TrainState, prompts: Prompts, key) -> tuple[TrainState, dict]:
        sample_key, reward_key, order_key = jax.random.split(key, 3)
        rollout = rollouts.generate(
            lm, state.params["lm"], prompts, sample_key, max_new_tokens=max_new_tokens, num_samples=num_samples,
            sampler=sampler, eos_ids=eos_ids, early_end=early_end,
        )  # fmt: skip
        scores = reward_fn(state.context, rollout, reward_key)
        batch, seen = experience(
            lm, head, state.params, state.context["reference"], rollout, scores, kl_coef=kl_coef, discount=discount, lam=lam
        )
        batches = minibatches(order_key, batch, mini_batches, epochs)
        state, metrics = jax.lax.scan(lambda state, batch: step(state, prepare(batch)), state, batches)
        return state, {**jax.tree.map(jnp.mean, metrics), **seen}

    return iterate
