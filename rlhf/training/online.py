"""What recipes that sample share: what is checked and loaded before the policy, and the step from
prompts to an update.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf import rollouts
from rlhf.fields import documented
from rlhf.rollouts import Rollout
from rlhf.sharding import jit_step
from rlhf.train import TrainState
from rlhf.training import loading, meshes, prompts, rewards
from rlhf.training.options import (
    MeshOptions,
    ModelOptions,
    PromptOptions,
    RewardOptions,
    SamplingOptions,
    TrainingOptions,
)
from rlhf.training.prompts import PromptBatch, PromptSet
from rlhf.training.rewards import RewardScorer
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import StopCriteria, stop_criteria
from rlhf.typing import RewardFn, SampleFn, StepFn, UpdateFn


@documented
class Inputs(NamedTuple):
    """All that a run has before its policy is loaded.

    Attributes:
      tokenizer: of the policy.
      stop: what ends a completion.
      train: prompts to learn from.
      held_out: prompts to evaluate on; None: there are none.
      reward_fn: rewards of completions.
      mesh: of devices.
      total: steps of the loop.
      batch: `(number) -> PromptBatch` of step `number`, from 0.
    """

    tokenizer: Any
    stop: StopCriteria
    train: PromptSet
    held_out: PromptSet | None
    reward_fn: RewardScorer
    mesh: Mesh
    total: int
    batch: Callable[[int], PromptBatch]


def load_inputs(
    run: RunFolder,
    model: ModelOptions,
    dataset: PromptOptions,
    training: TrainingOptions,
    sampling: SamplingOptions,
    reward: RewardOptions,
    mesh: MeshOptions,
    *,
    rows: int,
    num_minibatches: int = 1,
) -> Inputs:
    """Prompts, rewards and mesh, all of it checked before a model loads.

    Args:
      run: says what is left out.
      model, dataset, training, sampling, reward, mesh: options.
      rows: of a step's batch: completions, or pairs of them.
      num_minibatches: optimizer mini-batches that they are cut into.

    Raises: ValueError for options, prompts and rewards that cannot be.
    """
    # The update would find it too, but only after the model is loaded and a batch sampled.
    if rows % (num_minibatches * training.micro_batches):
        raise ValueError(
            f"a step's {rows} rows cannot be taken in {num_minibatches} mini-batches of "
            f"{training.micro_batches} equal parts; "
            "change --mini_batches or --batch_size"
        )
    devices = meshes.make(mesh, rows=rows, micro_batches=num_minibatches * training.micro_batches)
    tokenizer = loading.load_tokenizer(model)
    seq2seq = loading.load_seq2seq(model, tokenizer)
    stop = stop_criteria(model, sampling, tokenizer)
    train, held_out = prompts.load(dataset, tokenizer, seq2seq, say=run.say)
    total = training.total_steps(len(train.rows), has_held_out=held_out is not None)
    # Prompts and what is sampled after them must fit the model's positions.
    parts = train.prompts, held_out and held_out.prompts
    loading.check_tokens(model, tokenizer, *parts, max_new_tokens=sampling.max_new_tokens)
    reward_fn = rewards.load(
        reward, dataset, tokenizer, train.rows, held_out.rows if held_out else []
    )
    batch = partial(train.take, training.seed, size=training.batch_size)
    return Inputs(tokenizer, stop, train, held_out, reward_fn, devices, total, batch)


def make_step(
    sample: SampleFn,
    reward_fn: RewardFn,
    update: UpdateFn,
    mesh: Mesh,
    state: TrainState,
    *,
    on_rollout: Callable | None = None,
) -> StepFn:
    """`(state, PromptBatch) -> (state, metrics)`: samples completions, scores them, updates on
    them.

    Args:
      sample: `(state, prompts, key) -> Rollout`.
      reward_fn: `(rollout, columns, num_samples) -> (rewards [B], metrics)`, on the host.
      update: a recipe's `make_update`.
      mesh: where the state is.
      state: of the run; only where its arrays are is read.
      on_rollout: `(state, rollout, rewards)`, called before every update, such as
        `log_completions`; None: nothing is.
    """
    jitted = jit_step(update, mesh, state)

    def step(state: TrainState, batch: PromptBatch) -> tuple[TrainState, dict]:
        start_time = time.perf_counter()
        # Waits, so that the times below are true; reward functions on the host would wait anyway.
        rollout = jax.block_until_ready(sample(state, meshes.place(batch.prompts, mesh), batch.key))
        sampled = time.perf_counter()
        # Read off the rollout: pair samplers make two completions a prompt, whatever the options
        # say.
        num_samples = len(rollout.tokens) // len(batch.prompts.tokens)
        scores, reward_metrics = reward_fn(rollout, batch.columns, num_samples)
        # The update before is done once sampling is, so that the time of sampling holds what was
        # left of it.
        times = {
            "time/sampling": sampled - start_time,
            "time/rewards": time.perf_counter() - sampled,
        }
        if on_rollout is not None:
            on_rollout(state, rollout, scores)
        # `batch.key` sampled the rollout; a key is used once, so that the update gets one folded
        # from it.
        state, metrics = jitted(state, rollout, scores, jax.random.fold_in(batch.key, 1))
        return state, {**reward_metrics, **metrics, **times}

    return step


def log_completions(
    run: RunFolder, dataset: PromptOptions, tokenizer: Any, updates: int = 1
) -> Callable | None:
    """`(state, rollout, rewards)` that writes a step's completions to `samples/`, as often as the
    options say; None: never.

    Args:
      run: whose folder it is.
      dataset: the options.
      tokenizer: of the policy.
      updates: optimizer steps of a step of the loop.
    """
    if not dataset.log_completions:
        return None

    def write(state: TrainState, rollout: Rollout, scores: Any) -> None:
        # The state counts optimizer steps, the folder steps of the loop, from 1.
        number = int(state.step) // updates + 1
        if number % dataset.log_completions:
            return
        table = {
            "prompt": rollouts.text.prompts(tokenizer, rollout),
            "completion": rollouts.text.completions(tokenizer, rollout),
            "reward": np.asarray(scores, float).tolist(),
        }
        run.samples(number, table, phase="train")

    return write
