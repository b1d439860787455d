"""Proximal policy optimisation for language models: value head on the policy's trunk, KL to the reference in the reward."""

from collections.abc import Callable
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp

from rlhf import losses, rollouts
from rlhf.lm import LM, Head
from rlhf.loop import Training
from rlhf.models import scalar_head
from rlhf.ranges import Coefficient, Count, Share, Strength, between, checked
from rlhf.recipes import online, online_steps, setup
from rlhf.recipes.importance import Importance
from rlhf.recipes.online import Drawing, Scoring
from rlhf.rollouts import Batch, Rollout
from rlhf.runs import RunFolder


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
        if batch.importance is not None:
            pg = pg * batch.importance
        value = losses.clipped_value_loss(s.values["value"], batch.values, batch.returns, batch.mask, clip=value_clip)
        moved = losses.kl.k3(batch.logprobs, jax.lax.stop_gradient(s.logprobs), batch.mask)
        each = {"policy_loss": pg, "value_loss": value, "entropy": s.entropy, "approx_kl": moved}
        metrics = {name: losses.weighted_sum(x, batch.weights) for name, x in each.items()}
        return metrics["policy_loss"] + value_coef * metrics["value_loss"], metrics

    return loss_fn


def evaluate(lm: LM, head: Head, params, batch: Batch | Rollout) -> rollouts.Scored:
    """Log-probs and values of a batch's tokens, in one pass."""
    return rollouts.score_batch(lm, params["lm"], batch, heads={"value": (head, params["head"])})


def experience(
    lm: LM, head: Head, params, ref_params, rollout: Rollout, scores, *, kl_coef=0.05, discount=1.0, lam=0.95,
    whiten_rewards: bool = False,
) -> tuple[Batch, dict]:  # fmt: skip
    """A rollout as a `Batch`: rewards `score at the end - kl_coef · k1`, advantages and returns by GAE.

    A score stands for all that follows.  A row without one (NaN: it was cut, say, and only whole answers are scored) goes on
    with the value after its last token instead.

    Args:
      scores: `[B]`, the reward model's; centre them near 0, or let `lam` be 1: with less, a value head that starts at 0 makes
        early tokens see less of the score.
      whiten_rewards: rewards of deviation 1 over the batch's tokens, their mean as it is.
    """
    s = evaluate(lm, head, params, rollout)
    ref_logprobs = online.logprobs(lm, ref_params, rollout)
    kl = losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask)
    rewards = losses.token_rewards(scores, kl_coef * kl, rollout.mask)
    rewards = losses.advantages.whiten_rewards(rewards, rollout.mask) if whiten_rewards else rewards
    values = jax.lax.stop_gradient(s.values["value"])
    bootstrap = jnp.where(jnp.isnan(scores), s.last_value["value"], 0.0)
    advantages, returns = losses.gae(rewards, values, rollout.mask, bootstrap=bootstrap, discount=discount, lam=lam)
    seen = online.rollout_metrics(rollout, scores, ref_logprobs)
    seen["explained_variance"] = losses.value.explained_variance(values, returns, rollout.mask)
    arrays = dict(values=values, ref_logprobs=ref_logprobs, advantages=advantages, returns=returns)
    return rollouts.batch_of(rollout, **arrays), seen


def iteration(
    lm: LM, head: Head, reward_fn: Callable, optimizer, *, kl_coef: float = 0.05, discount: float = 1.0, lam: float = 0.95,
    clip: float = 0.2, value_clip: float = 0.2, value_coef: float = 0.1, epochs: int = 4, **how,
) -> Callable:  # fmt: skip
    """`online_steps.iteration`, with its arguments; `state.params` is `{"lm": …, "head": …}`, `state.context["reference"]` the
    reference's params."""

    def estimated(state, rollout, scores):
        reference, knobs = state.context["reference"], dict(kl_coef=kl_coef, discount=discount, lam=lam)
        return state, *experience(lm, head, state.params, reference, rollout, scores, **knobs)

    loss_fn, of_lm = objective(lm, head, clip=clip, value_clip=value_clip, value_coef=value_coef), lambda params: params["lm"]
    of_shared = lambda shared: loss_fn
    return online_steps.iteration(lm, reward_fn, optimizer, estimated, prepare, of_shared, epochs=epochs, of_lm=of_lm, **how)


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
    num_samples: Count = 1,
    kl_coef: Coefficient = 0.05,
    kl_target: Strength | None = None,
    kl_horizon: Annotated[int, between(1, 1_000_000_000)] = 10_000,
    discount: Share = 1.0,
    lam: Share = 0.95,
    clip: Annotated[float, between(0, 1, above=True, below=True)] = 0.2,
    value_clip: Strength = 0.2,
    value_coef: Coefficient = 0.1,
    updates_per_batch: Count = 4,
    mini_batches: Count = 1,
    target_kl: Strength | None = None,
    whiten_rewards: bool = False,
    scale_rewards: bool = False,
    resume: bool = False,
) -> dict[str, float]:
    """Proximal policy optimisation: samples answers, and a value head says how much better than expected they are.

    Rows have `prompt`, and the columns that the reward functions read.  The value head is not in `model/`.

    Args:
      output: a new folder for the run.
      num_samples: answers a prompt.
      kl_coef: what the KL to the model as it was costs, per nat; with a kl_target at the start.
      kl_target: nats an answer that the coefficient holds the KL at; null: the coefficient stays.
      kl_horizon: answers in which the coefficient changes by at most a fifth.
      discount: of a reward, per token.
      lam: of generalised advantages; 1: what came of it, 0: what the value head expects of the next token.
      clip: half-width of the trust region.
      value_clip: half-width of the value's trust region, in units of reward.
      value_coef: weight of the value loss.
      updates_per_batch: passes over the sampled answers.
      mini_batches: optimizer steps of a pass.
      target_kl: nats a token by which the policy may move on one batch; once it is beyond, the other steps are left out.
      whiten_rewards: rewards of deviation 1 over the batch's tokens.
      scale_rewards: scores less the mean of all so far, divided by their deviation.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    controller = losses.controllers.fixed(kl_coef)
    if kl_target is not None:
        controller = losses.controllers.adaptive_kl(target=kl_target, horizon=kl_horizon, init_coef=kl_coef)
    begin = online_steps.start(
        run, model, source, training, scoring, drawing,
        rows=training.batch_size * num_samples, mini_batches=mini_batches, epochs=updates_per_batch,
    )  # fmt: skip
    policy, head = setup.with_head(model, training.seed, scalar_head)
    actor, whole = policy._replace(params=policy.params["lm"], head=None), online.params_of(policy)
    sample = online.player(policy.lm, lambda state: whole(state)["lm"], drawing, begin.eos_ids, num_samples)
    loss_fn = policy.of_whole(objective(policy.lm, head, clip=clip, value_clip=value_clip, value_coef=value_coef))

    def estimated(state, rollout, scores):
        learn_from = partial(
            experience, policy.lm, head, whole(state), actor.reference(state.context), rollout,
            discount=discount, lam=lam, whiten_rewards=whiten_rewards,
        )  # fmt: skip
        context, batch, seen = online_steps.adapted(learn_from, state.context, scores, controller, scale_scores=scale_rewards)
        return state._replace(context=context), batch, seen

    _, figures = online_steps.learn(
        begin, policy, sample, estimated, prepare, loss_fn, fixed=actor.context(with_reference=True),
        weigh=importance.weigh(drawing.sampler()),
        context=online_steps.moving(controller), target_kl=target_kl, shown=("reward", "kl_to_reference"),
        export=lambda state, over: actor.export(run.path, begin.tokenizer, state._replace(params=state.params["lm"]), over),
    )  # fmt: skip
    return figures
