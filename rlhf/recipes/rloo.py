"""REINFORCE leave-one-out: each completion against the mean of its siblings, the KL to the
reference in the reward.
"""

from functools import partial
from typing import Annotated, Any

import jax.numpy as jnp
import optax

from rlhf import losses, rollouts
from rlhf.losses import presets
from rlhf.ranges import Coefficient, Count, between
from rlhf.rollouts import Batch, Rollout
from rlhf.shared_prefix import NOT_SHARED, SharedPrefix
from rlhf.training import online, policy_gradient
from rlhf.training.importance import ImportanceOptions, Weigh, weighted
from rlhf.training.loading import load_policy
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    EnvironmentOptions,
    MeshOptions,
    ModelOptions,
    NumSamples,
    PromptOptions,
    RewardOptions,
    SamplingOptions,
    SelectionOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import rollout_metrics
from rlhf.training.trained import Trained, result
from rlhf.typing import UpdateFn


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    num_samples: int,
    kl_coef: float = 0.05,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    normalize_advantages: bool = False,
    epochs: int = 1,
    num_minibatches: int = 1,
    micro_batches: int = 1,
    max_new_tokens: int | None = None,
    importance: Weigh | None = None,
) -> UpdateFn:
    """RLOO: advantages `r_i - mean of the other r_j`, with `r = reward - kl_coef · k1` of a
    completion  (arXiv:2402.14740).

    Defaults are TRL 1.16's.

    Args:
      policy: what is trained; its reference is in the state's context.
      optimizer: any optax transformation.
      num_samples: completions of a prompt, contiguous rows of the rollout.
      kl_coef: cost of the KL to the reference, per nat of a completion.
      clip_low: lower half-width of the trust region on the ratio of whole completions.
      clip_high: upper half-width.
      normalize_advantages: to mean 0 and deviation 1 over the batch, which couples its rows.
      epochs: passes over the rollout.
      num_minibatches: optimizer steps of a pass.
      micro_batches: parts of a step, taken one after the other; the result is the same.
      max_new_tokens: last columns of the rollout, in which a prompt's samples differ: what comes
        before is read once; None: rows are read by themselves.
      importance: of `ImportanceOptions.weigh`, where the sampler's filters make it another than the
        policy; None: no weights.

    Returns: `update(state, rollout, rewards, key) -> (state, metrics)`, pure.  `rewards` is `[B]`,
    NaN where a completion could not be scored: it is left out of its group, with advantage 0.
    """
    # The ratio is that of whole completions: at the first step it is 1, and this is REINFORCE.
    algorithm = presets.rloo(clip_low=clip_low, clip_high=clip_high)
    prompt = NOT_SHARED if max_new_tokens is None else SharedPrefix(num_samples, max_new_tokens)
    steps = policy_gradient.make_steps(
        policy,
        optimizer,
        algorithm,
        epochs=epochs,
        num_minibatches=num_minibatches,
        micro_batches=micro_batches,
        prompt=prompt,
    )

    def update(state, rollout, rewards, key):
        batch, metrics = estimate(
            policy,
            state,
            rollout,
            rewards,
            num_samples=num_samples,
            kl_coef=kl_coef,
            normalize_advantages=normalize_advantages,
            prompt=prompt,
        )
        batch, mismatch = weighted(importance, batch, rollout)
        state, of_steps = steps(state, batch, key)
        return state, {**of_steps, **metrics, **mismatch}

    return update


def estimate(
    policy: Policy,
    state: Any,
    rollout: Rollout,
    rewards,
    *,
    num_samples: int,
    kl_coef: float = 0.05,
    normalize_advantages: bool = False,
    prompt: SharedPrefix = NOT_SHARED,
) -> tuple[Batch, dict]:
    """A rollout as a `Batch` with advantages, and metrics.

    Args:
      policy: what is trained; its reference is in the state's context.
      state: of training.
      rollout: `[B, T]`, a prompt's samples contiguous.
      rewards: `[B]`, NaN where there is none.
      num_samples: completions of a prompt.
      kl_coef: cost of the KL to the reference, per nat of a completion.
      normalize_advantages: to mean 0 and deviation 1 over the batch.
      prompt: what a prompt's samples have in common, read once.
    """
    ref_logprobs = policy.reference_logprobs(state.context, rollout, shared=prompt)
    # k1 = log π - log π_ref of the sampled tokens: summed, the exact log-ratio of a completion.
    penalties = kl_coef * losses.kl.k1(rollout.logprobs, ref_logprobs, rollout.mask)
    grouped = rewards.reshape(-1, num_samples)
    advantages = presets.rloo().advantages(grouped, rollout.mask, penalties)
    if normalize_advantages:
        advantages = normalized(advantages, rollout.mask, rewards)
    # No `ref_logprobs`: the KL is in the reward already, and not in the loss.
    batch = rollouts.batch_of(rollout, advantages=advantages)
    return batch, rollout_metrics(rollout, rewards, ref_logprobs)


def normalized(advantages, mask, rewards):
    """Advantages `[B, T]` of whole completions, with mean 0 and deviation 1 over those that have a
    reward.
    """
    # Every token has its completion's advantage: one of them, the last, says it.
    of_completions = losses.segment_sum(advantages, losses.segments.last_trained(mask))
    # Completions without a reward have advantage 0, and must not pull the mean there.
    scored = jnp.where(jnp.isnan(rewards), jnp.nan, of_completions)
    return losses.groups.to_tokens(losses.group_relative(scored[None, :]), mask)


@recipe
def main(
    model: ModelOptions,
    dataset: PromptOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=1e-6),
    mesh: MeshOptions,
    sampling: SamplingOptions = SamplingOptions(max_new_tokens=512),
    reward: RewardOptions,
    importance: ImportanceOptions,
    environment: EnvironmentOptions,
    selection: SelectionOptions,
    output: str,
    num_samples: NumSamples = 2,
    kl_coef: Coefficient = 0.05,
    clip_low: Annotated[float, between(0, 1, above=True, below=True)] = 0.2,
    clip_high: Annotated[float, between(0, 1, above=True, below=True)] = 0.2,
    normalize_advantages: bool = False,
    updates_per_batch: Count = 1,
    mini_batches: Count = 1,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """REINFORCE leave-one-out: samples several completions, and compares each with the mean of the
    others.

    Rows have `prompt`, and the columns that the reward functions read.  Learning rate and sampling
    are TRL 1.16's.

    Args:
      output: a new folder for the run.
      num_samples: completions of a prompt, at least 2.
      kl_coef: coefficient of the KL to the reference, in the reward, per nat of a completion.
      clip_low: lower half-width of the trust region on the ratio of whole completions.
      clip_high: upper half-width.
      normalize_advantages: to mean 0 and deviation 1 over the batch.
      updates_per_batch: passes over the sampled completions.
      mini_batches: optimizer steps of a pass.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
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
        selected=selection,
    )

    # 2. The policy, its reference and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, inputs.mesh, say=run.say)
    updates = mini_batches * updates_per_batch
    optimizer = make_optimizer(training, inputs.total * updates)
    state = loaded.init_state(optimizer, training.seed, loaded.context(with_reference=True))

    # 3. The step: sample or play, score, update.
    collector = online.collector(loaded, inputs, sampling, environment, num_samples)
    update_for = partial(
        make_update,
        loaded.policy,
        optimizer,
        num_samples=num_samples,
        kl_coef=kl_coef,
        clip_low=clip_low,
        clip_high=clip_high,
        normalize_advantages=normalize_advantages,
        epochs=updates_per_batch,
        num_minibatches=mini_batches,
        micro_batches=training.micro_batches,
        importance=importance.weigh(sampling.sampler(inputs.stop.eos_ids)),
    )

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    state = online.train(
        run,
        dataset,
        training,
        inputs,
        state,
        collector,
        update_for,
        selected=selection,
        updates=updates,
        callbacks=callbacks,
        shown=("reward", "objective/kl"),
        export=partial(loaded.export, run.path, inputs.tokenizer),
    )
    return result(run, model, loaded, inputs.tokenizer, state)
