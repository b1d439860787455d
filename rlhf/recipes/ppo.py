"""Proximal policy optimisation for language models: value head on the policy's trunk, KL to the
reference in the reward.
"""

from collections.abc import Callable
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import optax

from rlhf import losses, rollouts
from rlhf.losses import moments
from rlhf.losses.controllers import Controller
from rlhf.models import scalar_head
from rlhf.ranges import Coefficient, Count, Share, Strength, between
from rlhf.rollouts import Batch
from rlhf.train import minibatches, run_minibatches, train_step
from rlhf.training import online
from rlhf.training.importance import ImportanceOptions, Weigh, weighted
from rlhf.training.loading import load_with_head
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    EnvironmentOptions,
    MeshOptions,
    ModelOptions,
    PromptOptions,
    RewardOptions,
    SamplingOptions,
    TrainingOptions,
)
from rlhf.training.policy import HEAD, Policy
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import rollout_metrics
from rlhf.training.trained import Trained, result
from rlhf.typing import UpdateFn

# Of all scores so far, where they are scaled; its state is in the train state's context.
RUNNING = moments.running()


def make_loss(
    policy: Policy, *, clip: float = 0.2, value_clip: float = 0.2, value_coef: float = 0.1
) -> Callable:
    """The `loss_fn` of a mini-batch with its weights: the clipped surrogate and the clipped value
    loss  (arXiv:1707.06347).

    Args:
      policy: with a value head; `params` is `{"lm": …, "head": …}`.
      clip: half-width of the trust region.
      value_clip: half-width of the value's trust region, in units of reward.
      value_coef: weight of the value loss.
    """

    def per_token(logprobs, entropy, batch):
        loss = losses.clipped_surrogate(
            logprobs,
            batch.old_logprobs,
            batch.advantages,
            batch.mask,
            clip_low=clip,
            clip_high=clip,
        )
        return loss if batch.importance is None else loss * batch.importance

    def loss_fn(params, context, batch, key):
        policy_loss, scored = policy.score_loss(params, context, batch, per_token, key=key)
        value_loss = losses.weighted_sum(
            losses.clipped_value_loss(
                scored.values[HEAD], batch.values, batch.returns, batch.mask, clip=value_clip
            ),
            batch.weights,
        )
        # KL(old ‖ new), estimated on samples of the old policy; with a `target_kl` it ends the
        # passes over a batch.
        approx_kl = losses.kl.k3(batch.old_logprobs, scored.logprobs, batch.mask)
        return policy_loss + value_coef * value_loss, {
            "policy_loss": policy_loss,
            "value_loss": value_loss,
            "entropy": losses.weighted_sum(scored.entropy, batch.weights),
            "approx_kl": losses.weighted_sum(approx_kl, batch.weights),
        }

    return loss_fn


def with_weights(batch: Batch) -> Batch:
    """An optimizer mini-batch with its weights, and advantages whitened over all of it, before it
    is cut into micro-batches.
    """
    # Whitening takes mean and deviation over the mini-batch: in a micro-batch they would be others.
    return batch._replace(
        advantages=losses.whiten(batch.advantages, batch.mask),
        weights=losses.weights.token_mean(batch.mask, batch.segment_ids),
    )


def estimate(
    policy: Policy,
    state: Any,
    rollout: rollouts.Rollout,
    scores,
    *,
    kl_coef,
    discount: float = 1.0,
    lam: float = 0.95,
    whiten_rewards: bool = False,
) -> tuple[Batch, dict]:
    """A rollout as a `Batch` with values, advantages and returns, by GAE on rewards
    `score at the end - kl_coef · k1`.

    A score stands for all that follows.  A row without one (NaN: it was cut, say, and only finished
    completions are scored) goes on with the value after its last token instead.

    Args:
      policy: with a value head; its reference is in the state's context.
      state: of training, whose parameters sampled the rollout.
      rollout: `[B, T]`.
      scores: `[B]`; centre them near 0, or let `lam` be 1: with less, a value head that starts at 0
        makes early tokens see less of the score.
      kl_coef: cost of the KL to the reference, per nat; a number or `[]`.
      discount: of a reward, per token.
      lam: λ of GAE; 1: Monte Carlo, 0: one-step TD.
      whiten_rewards: rewards of deviation 1 over the batch's tokens, their mean as it is.

    Returns: the batch, and metrics.
    """
    # Values of the policy that sampled, of the whole batch and once: all epochs use the same.
    scored = policy.score(state.params, state.context, rollout)
    ref_logprobs = policy.reference_logprobs(state.context, rollout)
    kl = losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask)
    rewards = losses.token_rewards(scores, kl_coef * kl, rollout.mask)
    if whiten_rewards:
        rewards = losses.advantages.whiten_rewards(rewards, rollout.mask)
    values = jax.lax.stop_gradient(scored.values[HEAD])
    # A row with a score ended: nothing follows, and the value after it is 0.
    bootstrap = jnp.where(jnp.isnan(scores), scored.last_value[HEAD], 0.0)
    advantages, returns = losses.gae(
        rewards, values, rollout.mask, bootstrap=bootstrap, discount=discount, lam=lam
    )
    metrics = rollout_metrics(rollout, scores, ref_logprobs)
    metrics["explained_variance"] = losses.value.explained_variance(values, returns, rollout.mask)
    batch = rollouts.batch_of(
        rollout, values=values, ref_logprobs=ref_logprobs, advantages=advantages, returns=returns
    )
    return batch, metrics


def initial_context(controller: Controller) -> dict[str, Any]:
    """What `make_update` keeps in the state's context for a controller: its state, and the moments
    of all scores.
    """
    return {"kl": controller.init(), "scores": RUNNING.init()}


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    kl_coef: float | Controller = 0.05,
    discount: float = 1.0,
    lam: float = 0.95,
    clip: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.1,
    whiten_rewards: bool = False,
    scale_scores: bool = False,
    score_clip: float | None = None,
    epochs: int = 4,
    num_minibatches: int = 1,
    micro_batches: int = 1,
    target_kl: float | None = None,
    importance: Weigh | None = None,
) -> UpdateFn:
    """PPO with a value head on the policy's trunk, and the KL to the reference in the reward
    (arXiv:1909.08593).

    Defaults are those of TRL 1.12, the last with this trainer.

    Args:
      policy: with a value head; `state.params` is `{"lm": …, "head": …}`, its reference is in the
        state's context.
      optimizer: any optax transformation.
      kl_coef: cost of the KL to the reference, per nat; or a controller of it, whose
        `initial_context` is in the state's.
      discount: of a reward, per token.
      lam: λ of GAE; 1: Monte Carlo, 0: one-step TD.
      clip: half-width of the trust region.
      value_clip: half-width of the value's trust region, in units of reward.
      value_coef: weight of the value loss.
      whiten_rewards: rewards of deviation 1 over the batch's tokens.
      scale_scores: less the mean of all scores so far, divided by their deviation; needs a
        controller's context.
      score_clip: scores beyond ± this are clipped, after scaling.
      epochs: passes over the rollout.
      num_minibatches: optimizer steps of a pass.
      micro_batches: parts of a step, taken one after the other; the result is the same.
      target_kl: nats a token by which the policy may move on one rollout; beyond it the remaining
        steps are left out.
      importance: of `ImportanceOptions.weigh`, where the sampler's filters make it another than the
        policy; None: no weights.

    Returns: `update(state, rollout, scores, key) -> (state, metrics)`, pure.  `scores` is `[B]`,
    NaN where there is none.

    Raises: ValueError for scaled scores without a controller.
    """
    controller = kl_coef if isinstance(kl_coef, Controller) else None
    if scale_scores and controller is None:
        raise ValueError(
            "scale_scores keeps moments in the state's context; give kl_coef as "
            "losses.controllers.fixed(…)"
        )
    loss_fn = make_loss(policy, clip=clip, value_clip=value_clip, value_coef=value_coef)
    step = train_step(loss_fn, optimizer, micro_batches=micro_batches)

    def minibatch_step(state, minibatch):
        return step(state, with_weights(minibatch))

    def update(state, rollout, scores, key):
        context = state.context
        coef = kl_coef if controller is None else context["kl"].coef
        # What is logged as the reward: before scaling and clipping.
        shown_scores = scores
        if controller is not None:
            # The batch's scores count before they are scaled by the moments, so that the first
            # batch is too.
            context = context | {"scores": RUNNING.update(context["scores"], scores)}
        if scale_scores:
            scores = RUNNING.scale(context["scores"], scores)
        if score_clip is not None:
            scores = jnp.clip(scores, -score_clip, score_clip)
        batch, metrics = estimate(
            policy,
            state,
            rollout,
            scores,
            kl_coef=coef,
            discount=discount,
            lam=lam,
            whiten_rewards=whiten_rewards,
        )
        metrics |= {"reward": jnp.nanmean(shown_scores), "kl_coef": coef}
        if controller is not None:
            # After the rewards: a coefficient is used for the batch whose KL moves it.
            moved = controller.update(context["kl"], metrics["objective/kl"], len(scores))
            context = context | {"kl": moved}
        batch, mismatch = weighted(importance, batch, rollout)
        batches = minibatches(key, batch, num_minibatches, epochs)
        # Before the steps: the moments stay even where every step is skipped.
        state = state._replace(context=context)
        state, of_steps = run_minibatches(minibatch_step, state, batches, target_kl=target_kl)
        return state, {**of_steps, **metrics, **mismatch}

    return update


@recipe
def main(
    model: ModelOptions,
    dataset: PromptOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=3e-6),
    mesh: MeshOptions,
    sampling: SamplingOptions = SamplingOptions(max_new_tokens=53, temperature=0.7),
    reward: RewardOptions,
    importance: ImportanceOptions,
    environment: EnvironmentOptions,
    output: str,
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
    callbacks: Callbacks = (),
) -> Trained:
    """Proximal policy optimisation: samples completions, and a value head says how much better than
    expected they are.

    Rows have `prompt`, and the columns that the reward functions read.  The value head is not in
    `model/`.  Learning rate and sampling are TRL 1.12's, the last with this trainer.

    Args:
      output: a new folder for the run.
      num_samples: completions of a prompt.
      kl_coef: coefficient of the KL to the reference, in the reward, per nat; with a kl_target at
        the start.
      kl_target: nats a completion that the coefficient holds the KL at; null: the coefficient
        stays.
      kl_horizon: completions in which the coefficient changes by at most a fifth.
      discount: of a reward, per token.
      lam: GAE λ: 1 = Monte Carlo, 0 = one-step TD.
      clip: half-width of the trust region.
      value_clip: half-width of the value's trust region, in units of reward.
      value_coef: weight of the value loss.
      updates_per_batch: passes over the sampled completions.
      mini_batches: optimizer steps of a pass.
      target_kl: nats a token by which the policy may move on one batch; once it is beyond, the
        other steps are left out.
      whiten_rewards: rewards of deviation 1 over the batch's tokens.
      scale_rewards: scores less the mean of all so far, divided by their deviation.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    # Also a coefficient that stays is a controller here: one form of state for all runs.
    controller = losses.controllers.fixed(kl_coef)
    if kl_target is not None:
        controller = losses.controllers.adaptive_kl(
            target=kl_target, horizon=kl_horizon, init_coef=kl_coef
        )
    inputs = online.load_inputs(
        run,
        model,
        dataset,
        training,
        sampling,
        reward,
        mesh,
        rows=training.batch_size * num_samples,
        num_minibatches=mini_batches,
        environment=environment,
    )

    # 2. The policy with its value head, the reference and the optimizer state, born sharded.
    loaded = load_with_head(model, training.seed, inputs.mesh, scalar_head, say=run.say)
    updates = mini_batches * updates_per_batch
    optimizer = make_optimizer(training, inputs.total * updates)
    context = {**loaded.context(with_reference=True), **initial_context(controller)}
    state = loaded.init_state(optimizer, training.seed, context)

    # 3. The step: sample or play, score, update.
    collector = online.collector(loaded, inputs, sampling, environment, num_samples)
    update = make_update(
        loaded.policy,
        optimizer,
        kl_coef=controller,
        discount=discount,
        lam=lam,
        clip=clip,
        value_clip=value_clip,
        value_coef=value_coef,
        whiten_rewards=whiten_rewards,
        scale_scores=scale_rewards,
        epochs=updates_per_batch,
        num_minibatches=mini_batches,
        micro_batches=training.micro_batches,
        target_kl=target_kl,
        importance=importance.weigh(sampling.sampler(inputs.stop.eos_ids)),
    )
    # The value head is no part of the model that is exported.
    actor = loaded._replace(head=None)

    def export(state, over):
        actor.export(run.path, inputs.tokenizer, state._replace(params=state.params["lm"]), over)

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = online.train(
        run,
        dataset,
        training,
        inputs,
        state,
        collector,
        # Rows are read by themselves, however many columns their completions have.
        lambda max_new_tokens: update,
        updates=updates,
        callbacks=callbacks,
        shown=("reward", "objective/kl"),
        export=export,
    )
    return result(run, model, actor, inputs.tokenizer, state._replace(params=state.params["lm"]))
