"""Rejection sampling fine-tuning: sample, score, and learn to write the best of it, as trlX has
it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf import hosts, losses, rollouts
from rlhf.ranges import Count, Share
from rlhf.rollouts import Batch, Rollout
from rlhf.train import train_step
from rlhf.training import collecting, datasets, evaluation, meshes, offline, online, supervised
from rlhf.training import sampling as sample_of
from rlhf.training.loading import load_policy
from rlhf.training.loop import fit
from rlhf.training.optimizers import make_optimizer
from rlhf.training.options import (
    Callbacks,
    GroupSamplingOptions,
    MeshOptions,
    ModelOptions,
    PromptOptions,
    RewardOptions,
    TrainingOptions,
)
from rlhf.training.policy import Policy
from rlhf.training.programs import Step
from rlhf.training.prompts import PromptBatch
from rlhf.training.recipe import recipe
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import policy_sampler
from rlhf.training.trained import Trained, result
from rlhf.typing import StepFn


def make_update(
    policy: Policy, optimizer: optax.GradientTransformation, *, micro_batches: int = 1
) -> StepFn:
    """Rejection sampling fine-tuning: the mean cross-entropy of the completions that were selected
    (arXiv:2308.08998).

    Args:
      policy: what is trained.
      optimizer: any optax transformation.
      micro_batches: parts of a step, taken one after the other; the result is the same.

    Returns: `update(state, batch) -> (state, metrics)`, pure.  The batch, of `dealt`, needs no
    weights.
    """
    step = train_step(supervised.make_loss(policy), optimizer, micro_batches=micro_batches)

    def update(state, batch):
        return step(state, supervised.with_weights(batch))

    return update


# The percentile is an argument and not static: it changes from pass to pass.
@partial(jax.jit, static_argnames="best_only")
def selected(rewards, percentile: float, *, best_only: bool = False):
    """Which completions are trained on: those at or above their prompt's percentile.  `[P, G]` ->
    `[P, G]` bool.

    None with the lowest reward of all: where all completions of a prompt are equally bad, their
    percentile is that of each.
    """
    # Strictly above the lowest: a prompt whose completions are all equally bad would else train
    # them all, since each is at its percentile.
    above = losses.offline.rft(rewards, percentile=percentile) & (rewards > jnp.nanmin(rewards))
    best = jax.nn.one_hot(losses.offline.best_of_n(rewards), rewards.shape[1], dtype=bool)
    return above & best if best_only else above


def distinct(rollout: Rollout, rows: np.ndarray) -> np.ndarray:
    """The first of each prompt and completion among these rows, in their order."""
    read = (
        [] if rollout.inputs is None else [rollout.inputs["tokens"], rollout.inputs["segment_ids"]]
    )
    # Mask and segments too: the same tokens may be split otherwise into prompt and completion.
    written = np.concatenate([rollout.tokens, rollout.mask, rollout.segment_ids, *read], axis=1)[
        rows
    ]
    # `unique` sorts by content; its indices, sorted, bring back the order of the rows.
    return rows[np.sort(np.unique(written, axis=0, return_index=True)[1])]


def dealt(rollout: Rollout, rows: np.ndarray, number: int, micro_batches: int = 1) -> list[Batch]:
    """These rows dealt out to `number` optimizer mini-batches, and rows that train nothing behind
    them; no rows, no batches.

    Their size is `micro_batches` times a power of two, so that few sizes are compiled however many
    rows there are.
    """
    if not len(rows):
        return []
    # Rows of a micro-batch, rounded up, then up to a power of two.
    share = -(-len(rows) // (number * micro_batches))
    room = number * micro_batches * 2 ** (share - 1).bit_length()
    # `resize` repeats rows to fill the room; the repeated ones are masked, and train nothing.
    index = np.resize(rows, room)
    real = np.arange(room) < len(rows)
    batch = Batch(
        tokens=rollout.tokens[index],
        mask=rollout.mask[index] & real[:, None],
        positions=rollout.positions[index],
        segment_ids=rollout.segment_ids[index],
        inputs=datasets.select(rollout.inputs, index),
    )
    # Dealt like cards: the masked rows at the end are spread over all mini-batches.
    return [datasets.select(batch, slice(i, None, number)) for i in range(number)]


@recipe
def main(
    model: ModelOptions,
    dataset: PromptOptions,
    *,
    training: TrainingOptions = TrainingOptions(learning_rate=3e-5),
    mesh: MeshOptions,
    sampling: GroupSamplingOptions,
    reward: RewardOptions,
    output: str,
    start_percentile: Share = 0.7,
    end_percentile: Share = 0.95,
    improve_steps: Count = 4,
    mini_batches: Count = 1,
    best_only: bool = False,
    resume: bool = False,
    callbacks: Callbacks = (),
) -> Trained:
    """Rejection sampling fine-tuning: samples completions, keeps each prompt's best, and learns to
    write them.

    Rows have `prompt`, and the columns that the reward functions read.  A step samples once and
    passes over the completions `improve_steps` times, each time over fewer and better ones.
    Defaults are trlX's, but for num_samples, which is 32 there.  The learning rate is that of
    trlX's example.

    Args:
      output: a new folder for the run.
      start_percentile: of a prompt's rewards; the first pass learns the completions at or above it.
      end_percentile: the last pass'.
      improve_steps: passes over the completions of a step, between the two.
      mini_batches: optimizer steps of a pass.
      best_only: learn one completion a prompt at most, its best.
      resume: go on with the run in the folder.
      callbacks: `(step, metrics)` functions, called with every line of the log.
    """
    # 1. Everything that can be wrong is found before the model loads.
    run = RunFolder(output, options=locals())
    if start_percentile > end_percentile:
        raise ValueError(
            f"percentiles must rise, but go from {start_percentile} to {end_percentile}"
        )
    if sampling.num_samples < 2:
        raise ValueError(
            f"num_samples {sampling.num_samples}: a completion is chosen among others; give at "
            "least 2"
        )
    inputs = online.load_inputs(
        run,
        model,
        dataset,
        training,
        sampling,
        reward,
        mesh,
        rows=training.batch_size,
    )

    # 2. The policy and its optimizer state, born sharded.
    loaded = load_policy(model, training.seed, inputs.mesh, say=run.say)
    updates = improve_steps * mini_batches
    optimizer = make_optimizer(training, inputs.total * updates)
    state = loaded.init_state(optimizer, training.seed)

    # 3. The step: sample, score, and one update after the other on what is selected.
    sample = policy_sampler(loaded, sampling, inputs.stop, sampling.num_samples)
    collector = collecting.sampled(sample, inputs.reward_fn, inputs.mesh)
    update = offline.make_step(
        make_update(loaded.policy, optimizer, micro_batches=training.micro_batches),
        inputs.mesh,
        state,
    )
    on_rollout = online.log_completions(run, dataset, inputs.tokenizer, updates)
    percentiles = np.linspace(start_percentile, end_percentile, improve_steps)

    def step(state, batch: PromptBatch):
        # Where the step ends, also if a pass selects nothing and takes no optimizer steps: the
        # schedule and resuming count on the same number a step.
        end = int(state.step) + updates
        scored = collector.collect(state, batch)
        if on_rollout is not None:
            on_rollout(state, scored)
        grouped = scored.rewards.reshape(-1, sampling.num_samples)
        # From the batch's key: a resumed run shuffles as the first would have.
        order = np.random.default_rng(np.asarray(jax.random.key_data(batch.key)))
        # How many rows are selected is only known on the host, which cuts batches of that size.
        on_host = sample_of.trimmed(jax.device_get(scored.rollout), inputs.max_new_tokens)
        shares = []
        of_updates = []
        for percentile in percentiles:
            above = selected(grouped, float(percentile), best_only=best_only)
            chosen = distinct(on_host, np.flatnonzero(above))
            shares.append(len(chosen) / len(on_host.tokens))
            shuffled = order.permutation(chosen)
            # Sampled once a step: later passes train on completions of an older policy, as trlX
            # does.
            for part in dealt(on_host, shuffled, mini_batches, training.micro_batches):
                state, metrics = update(state, meshes.place(part, inputs.mesh))
                of_updates.append(metrics)
        mean = (
            jax.tree.map(lambda *values: jnp.mean(jnp.stack(values)), *of_updates)
            if of_updates
            else {}
        )
        metrics = {
            **mean,
            **scored.metrics,
            **sample_of.completion_metrics(on_host),
            **scored.times,
            "selected": np.mean(shares),
        }
        # In the place and type of the old one: another sharding would compile the step again.
        step_number = hosts.put(np.asarray(end, state.step.dtype), state.step.sharding)
        return state._replace(step=step_number), metrics

    def trace(state, batch: PromptBatch):
        # A step's batches have few sizes, powers of two: the largest holds all completions.
        rows = jax.eval_shape(rollouts.token_rows, collector.shapes(state, batch))
        traced = update.trace(state, meshes.place(rows, inputs.mesh))
        return {**collector.trace(state, batch), **traced}

    # 4. The shared loop: metrics, evaluations, checkpoints, export.
    evaluate = evaluation.of_completions(
        run, collector, inputs.held_out, training, inputs.tokenizer
    )
    state = fit(
        run,
        training,
        state,
        Step(step, trace),
        inputs.batch,
        total=inputs.total,
        updates=updates,
        callbacks=callbacks,
        shown=("reward", "selected"),
        evaluate=evaluate,
        export=partial(loaded.export, run.path, inputs.tokenizer),
        mesh=inputs.mesh,
    )
    return result(run, model, loaded, inputs.tokenizer, state)
