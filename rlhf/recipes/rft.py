"""Rejection sampling fine-tuning: sample, score, and learn to write the best of it, as trlX has it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import losses
from rlhf.loop import Training, fit
from rlhf.ranges import Count, Share, checked
from rlhf.recipes import online, online_steps, setup, sft
from rlhf.recipes.online import Sampling, Scoring
from rlhf.rollouts import Batch, Rollout
from rlhf.runs import RunFolder


@partial(jax.jit, static_argnames="best_only")
def kept(rewards, percentile: float, *, best_only: bool = False):
    """Which answers are learnt: those at or above their prompt's percentile.  `[P, G]` -> `[P, G]` bool.

    None with the lowest reward of all: where all answers of a prompt are equally bad, their percentile is that of each.
    """
    above = losses.offline.rft(rewards, percentile=percentile) & (rewards > jnp.nanmin(rewards))
    best = jax.nn.one_hot(losses.offline.best_of_n(rewards), rewards.shape[1], dtype=bool)
    return above & best if best_only else above


def distinct(rollout: Rollout, rows: np.ndarray) -> np.ndarray:
    """The first of each prompt and answer among these rows, in their order."""
    read = [] if rollout.inputs is None else [rollout.inputs["tokens"], rollout.inputs["segment_ids"]]
    written = np.concatenate([rollout.tokens, rollout.mask, rollout.segment_ids, *read], axis=1)[rows]
    return rows[np.sort(np.unique(written, axis=0, return_index=True)[1])]


def dealt(rollout: Rollout, rows: np.ndarray, number: int, micro_batches: int = 1) -> list[Batch]:
    """These rows dealt out to `number` optimizer mini-batches, and rows that train nothing behind them; no rows, no batches.

    Their size is `micro_batches` times a power of two, so that few sizes are compiled however many rows there are.
    """
    if not len(rows):
        return []
    share = -(-len(rows) // (number * micro_batches))
    room = number * micro_batches * 2 ** (share - 1).bit_length()
    index, real = np.resize(rows, room), np.arange(room) < len(rows)
    batch = Batch(
        tokens=rollout.tokens[index],
        mask=rollout.mask[index] & real[:, None],
        positions=rollout.positions[index],
        segment_ids=rollout.segment_ids[index],
        inputs=setup.select(rollout.inputs, index),
    )
    return [setup.select(batch, slice(i, None, number)) for i in range(number)]


@checked
def main(
    model: setup.Model, source: online.Asking, training: Training, scoring: Scoring, sampling: Sampling, output: str, *,
    start_percentile: Share = 0.7, end_percentile: Share = 0.95, improve_steps: Count = 4, mini_batches: Count = 1,
    best_only: bool = False, resume: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Rejection sampling fine-tuning: samples answers, keeps each prompt's best, and learns to write them.

    Rows have `prompt`, and the columns that the reward functions read.  A step draws answers once and passes over them
    `improve_steps` times, each time over fewer and better ones.

    Args:
      output: a new folder for the run.
      start_percentile: of a prompt's rewards; the first pass learns the answers at or above it.
      end_percentile: the last pass'.
      improve_steps: passes over the answers of a step, between the two.
      mini_batches: optimizer steps of a pass.
      best_only: learn one answer a prompt at most, its best.
      resume: go on with the run in the folder.
    """
    run = RunFolder(output, options=locals())
    if start_percentile > end_percentile:
        raise ValueError(f"percentiles must rise, but go from {start_percentile} to {end_percentile}")
    if sampling.num_samples < 2:
        raise ValueError(f"num_samples {sampling.num_samples}: an answer is chosen among others; give at least 2")
    percentiles, updates = np.linspace(start_percentile, end_percentile, improve_steps), improve_steps * mini_batches
    begin = online_steps.start(run, model, source, training, scoring, sampling, rows=training.batch_size)
    policy = setup.policy(model, training.seed)
    sample = online.sampler(policy, sampling, begin.eos_ids)
    make_update = setup.offline_step(policy.of_whole(sft.objective(policy.lm)), sft.prepare, training)

    def make_step(optimizer):
        update = make_update(optimizer)

        def iterate(state, asked: online.Asked):
            end = int(state.step) + updates  # also where a pass keeps nothing, and takes no steps
            rollout = sample(state, asked.prompts, asked.key)
            rewards, figures = begin.judge(rollout, asked.columns, sampling.num_samples)
            grouped, drawn = rewards.reshape(-1, sampling.num_samples), jax.device_get(rollout)
            order, learnt, seen = np.random.default_rng(np.asarray(jax.random.key_data(asked.key))), [], []
            for percentile in percentiles:
                chosen = distinct(drawn, np.flatnonzero(kept(grouped, float(percentile), best_only=best_only)))
                learnt.append(len(chosen) / len(drawn.tokens))
                for batch in dealt(drawn, order.permutation(chosen), mini_batches, training.micro_batches):
                    state, metrics = update(state, batch)
                    seen.append(metrics)
            mean = jax.tree.map(lambda *values: jnp.mean(jnp.stack(values)), *seen) if seen else {}
            figures = {**mean, **figures, **online.figures(rollout), "kept": np.mean(learnt)}
            return state._replace(step=jnp.asarray(end, state.step.dtype)), figures

        return iterate

    _, figures = fit(
        run, training, make_step, policy.params, lambda number, size: begin.train.take(training.seed, number, size),
        total=begin.total, fixed=policy.context(), updates=updates, shown=("reward", "kept"),
        evaluate=begin.test and online.evaluation(run, sample, begin.judge, begin.test, training, begin.tokenizer),
        export=partial(policy.export, run.path, begin.tokenizer),
    )  # fmt: skip
    return figures
