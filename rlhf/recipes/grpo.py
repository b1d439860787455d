"""Group relative policy optimisation: sample groups, compare within them, clipped steps with a KL
to the reference.
"""

from functools import partial
from typing import Annotated, Literal

import jax.numpy as jnp
import optax

from rlhf import losses, rollouts
from rlhf.losses import presets
from rlhf.losses.presets import Objective
from rlhf.ranges import Coefficient, Count, Every, between
from rlhf.shared_prefix import NOT_SHARED, SharedPrefix
from rlhf.training import loading, online, policy_gradient
from rlhf.training.importance import ImportanceOptions, Weigh, weighted
from rlhf.training.loading import load_policy
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    EnvironmentOptions,
    GroupSamplingOptions,
    MeshOptions,
    ModelOptions,
    PromptOptions,
    RewardOptions,
    SelectionOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import group_metrics, rollout_metrics
from rlhf.training.trained import Trained, result
from rlhf.typing import UpdateFn

GRPO = presets.grpo()


def make_update(
    policy: Policy,
    optimizer: optax.GradientTransformation,
    *,
    num_samples: int,
    algorithm: Objective = GRPO,
    kl_coef: float = 0.0,
    entropy_coef: float = 0.0,
    top_entropy: float = 1.0,
    mask_truncated: bool = False,
    epochs: int = 1,
    num_minibatches: int = 1,
    micro_batches: int = 1,
    max_new_tokens: int | None = None,
    importance: Weigh | None = None,
) -> UpdateFn:
    """GRPO: rewards normalised within a prompt's samples, then clipped policy-gradient steps
    (arXiv:2402.03300).

    Defaults are TRL 1.16's, but for the algorithm, which is the paper's: TRL's is dapo.

    Args:
      policy: what is trained; with a `kl_coef` its reference is in the state's context.
      optimizer: any optax transformation.
      num_samples: completions of a prompt, contiguous rows of the rollout, at least 2.
      algorithm: advantages, per-token loss and weights: GRPO's own, or another preset.
      kl_coef: of the KL to the reference (k3), in nats a token; 0: there is none.
      entropy_coef: of the policy's entropy, in nats a token, which is rewarded.
      top_entropy: share of the batch's tokens that are trained, those with the highest entropy when
        they were sampled; 1: all.
      mask_truncated: whether completions that were cut at the length limit train nothing.
      epochs: passes over the rollout.
      num_minibatches: optimizer steps of a pass.
      micro_batches: parts of a step, taken one after the other; the result is the same.
      max_new_tokens: last columns of the rollout, in which a prompt's samples differ: what comes
        before is read once; None: rows are read by themselves.
      importance: of `ImportanceOptions.weigh`, where the sampler's filters make it another than the
        policy; None: no weights.

    Returns: `update(state, rollout, rewards, key) -> (state, metrics)`, pure: jit, scan, vmap or
    shard it.  `rewards` is `[B]`, NaN where a completion could not be scored: it is left out of its
    group, with advantage 0.

    Raises: ValueError for fewer than 2 samples a prompt, which leaves nothing to compare.
    """
    check_groups(num_samples)
    # Samples of a prompt differ only in the last columns: what is before is read once a group.
    prompt = NOT_SHARED if max_new_tokens is None else SharedPrefix(num_samples, max_new_tokens)
    steps = policy_gradient.make_steps(
        policy,
        optimizer,
        algorithm,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        epochs=epochs,
        num_minibatches=num_minibatches,
        micro_batches=micro_batches,
        prompt=prompt,
    )

    def update(state, rollout, rewards, key):
        advantages = algorithm.advantages(rewards.reshape(-1, num_samples), rollout.mask)
        ref_logprobs = (
            # Of the whole batch and once: mini-batches of all epochs read the same numbers.
            policy.reference_logprobs(state.context, rollout, shared=prompt) if kl_coef else None
        )
        batch = rollouts.batch_of(rollout, advantages=advantages, ref_logprobs=ref_logprobs)
        # After the advantages: a truncated completion still counts in its group's mean.
        if mask_truncated:
            batch = batch._replace(mask=losses.masks.finished_only(batch.mask, rollout.finished))
        batch, mismatch = weighted(importance, batch, rollout)
        if top_entropy < 1:
            # Of the whole batch, before it is cut into parts, so that the share does not depend on
            # how it is cut.
            entropy = policy.score(state.params, state.context, rollout, shared=prompt).entropy
            trained = losses.masks.top_entropy(entropy, batch.mask, share=top_entropy)
            weights = 1.0 if batch.importance is None else batch.importance
            # As weights rather than in the mask: tokens left out still count where losses are
            # divided.
            batch = batch._replace(importance=jnp.where(trained, weights, 0.0))
        state, metrics = steps(state, batch, key)
        # Groups without spread train nothing: the share of them says how much of a batch is wasted.
        of_groups = group_metrics(rewards.reshape(-1, num_samples))
        return state, {
            **metrics,
            **rollout_metrics(rollout, rewards, ref_logprobs),
            **of_groups,
            **mismatch,
        }

    return update


@recipe
def main(
    model: ModelOptions,
    dataset: PromptOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=1e-6),
    mesh: MeshOptions,
    sampling: GroupSamplingOptions = GroupSamplingOptions(max_new_tokens=512),
    reward: RewardOptions,
    importance: ImportanceOptions,
    environment: EnvironmentOptions,
    selection: SelectionOptions,
    output: str,
    loss: str = "grpo",
    clip_low: Coefficient | None = None,
    clip_high: Coefficient | None = None,
    max_ratio: Annotated[float, between(1, 1000, above=True)] | None = None,
    scale_rewards: Literal["group", "batch", "none"] | None = None,
    kl_coef: Coefficient = 0.0,
    entropy_coef: Coefficient = 0.0,
    top_entropy: Annotated[float, between(0, 1, above=True)] = 1.0,
    mask_truncated_completions: bool = False,
    sync_every: Every = 0,
    sync_share: Annotated[float, between(0, 1, above=True)] = 0.6,
    updates_per_batch: Count = 1,
    mini_batches: Count = 1,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Group relative policy optimisation: samples groups of completions, scores them, and compares
    within each group.

    Rows have `prompt`, and the columns that the reward functions read.  Learning rate and sampling
    are TRL 1.16's.

    Args:
      output: a new folder for the run.
      loss: grpo, dr_grpo, dapo, lite_ppo, gspo, luspo, gmpo, cispo, sapo, vespo, dppo or max_rl.
      clip_low: lower half-width of the trust region; null: the loss's own.
      clip_high: upper half-width; null: the loss's own.
      max_ratio: upper bound of the ratio where it is not clipped (TRL's delta), of cispo its own
        bound; null: the loss's own.
      scale_rewards: rewards less their group's mean are divided by their deviation in the group, in
        the batch, or not; null: the loss's own.
      kl_coef: coefficient of the KL to the reference, which is the model as it was; 0: that is not
        computed.
      entropy_coef: coefficient of the entropy, which is rewarded.
      top_entropy: share of tokens that are trained, those with the highest entropy; 1: all.
      mask_truncated_completions: completions that were cut at the length limit train nothing.
      sync_every: steps after which the reference moves towards the policy; 0: it stays.
      sync_share: how far.
      updates_per_batch: passes over the sampled completions.
      mini_batches: optimizer steps of a pass.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    algorithm = policy_gradient.named(
        loss,
        online.completion_tokens(sampling, environment),
        scale_rewards=scale_rewards,
        clip_low=clip_low,
        clip_high=clip_high,
        max_ratio=max_ratio,
    )
    hooks = loading.following(model, sync_every, sync_share)
    if hooks and not kl_coef:
        raise ValueError(
            f"sync_every {sync_every} moves the reference, but with a kl_coef of 0 there is none; "
            "give --kl_coef"
        )
    check_groups(sampling.num_samples)
    inputs = online.load_inputs(
        run,
        model,
        dataset,
        training,
        sampling,
        reward,
        mesh,
        rows=training.batch_size * sampling.num_samples,
        num_minibatches=mini_batches,
        environment=environment,
        selected=selection,
    )

    # 2. The policy, its reference and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, inputs.mesh, say=run.say)
    # The schedule counts optimizer steps, of which a step of the loop takes several.
    updates = mini_batches * updates_per_batch
    optimizer = make_optimizer(training, inputs.total * updates)
    state = loaded.init_state(optimizer, training.seed, loaded.context(with_reference=kl_coef > 0))

    # 3. The step: sample or play, score, update.
    collector = online.collector(loaded, inputs, sampling, environment, sampling.num_samples)
    update_for = partial(
        make_update,
        loaded.policy,
        optimizer,
        num_samples=sampling.num_samples,
        algorithm=algorithm,
        kl_coef=kl_coef,
        entropy_coef=entropy_coef,
        top_entropy=top_entropy,
        mask_truncated=mask_truncated_completions,
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
        # A reference that moves belongs to the checkpoint; one that stays is loaded again.
        fixed=("frozen",) if hooks else ("frozen", "reference"),
        hooks=hooks,
        callbacks=callbacks,
        shown=("reward", "completions/mean_length"),
        export=partial(loaded.export, run.path, inputs.tokenizer),
    )
    return result(run, model, loaded, inputs.tokenizer, state)


def check_groups(num_samples: int) -> None:
    """Raises: ValueError for fewer than 2 samples of a prompt."""
    if num_samples < 2:
        raise ValueError(
            f"num_samples {num_samples}: advantages compare the samples of a prompt with each "
            "other; give at least 2"
        )
