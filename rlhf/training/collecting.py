"""A step's completions with their rewards, before they are learned from."""

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf import hosts, rollouts
from rlhf.fields import documented
from rlhf.rollouts import Rollout
from rlhf.train import TrainState
from rlhf.training import meshes, programs
from rlhf.training.prompts import PromptBatch
from rlhf.training.sampling import trimmed
from rlhf.typing import RewardFn, SampleFn


@documented
class Completions(NamedTuple):
    """Completions and their rewards.

    Attributes:
      rollout: [B, T], a prompt's completions contiguous; with several processes of NumPy, all rows
        in each, until `meshes.place` puts them back.
      rewards: [B], NaN: could not be scored.
      reasons: B, what went wrong with a completion; None: nothing.
      num_samples: completions of a prompt.
      metrics: to be logged.
      times: seconds of the parts, `time/...`.
      context: entries of the state's context that the step takes in place of its own.
      of_all: metrics of all that was sampled, where only a part of it is learned from.
      all_rewards: of all that was sampled; None: it is all here.
    """

    rollout: Rollout
    rewards: Any
    reasons: list[str | None]
    num_samples: int
    metrics: dict[str, Any]
    times: dict[str, float]
    context: Mapping[str, Any] = {}
    of_all: Mapping[str, Any] = {}
    all_rewards: Any = None


@documented
class Collector(NamedTuple):
    """How a step comes by its completions.

    Attributes:
      collect: `(state, batch) -> Completions`.
      shapes: `(state, batch) -> Rollout` of the shapes that `collect` returns.
      trace: `(state, batch) -> {name: traced program}`, for shapes.
    """

    collect: Callable[[TrainState, Any], Completions]
    shapes: Callable[[TrainState, Any], Rollout]
    trace: Callable[[TrainState, Any], dict[str, jax.stages.Traced]]


def table(tokenizer: Any, completions: Completions) -> dict[str, Any]:
    """Columns of a file of `samples/`: a completion a row."""
    # Here and not above: `import rlhf` must not wait for pyarrow.
    import pyarrow

    return {
        "prompt": rollouts.text.prompts(tokenizer, completions.rollout),
        "completion": rollouts.text.continuations(tokenizer, completions.rollout),
        "reward": np.asarray(completions.rewards, float).tolist(),
        # Typed: a column of None alone would get Arrow's null type, and files of a run would
        # differ.
        "reason": pyarrow.array(completions.reasons, pyarrow.string()),
    }


def sampled(sample: SampleFn, reward_fn: RewardFn, mesh: Mesh) -> Collector:
    """Completions that are sampled, then scored.

    Args:
      sample: `(state, prompts, key) -> Rollout`.
      reward_fn: `(rollout, columns, num_samples) -> Rewarded`, on the host.
      mesh: where the state is.
    """

    def collect(state: TrainState, batch: PromptBatch) -> Completions:
        start = time.perf_counter()
        # Waits, so that the times below are true; reward functions on the host would wait anyway.
        rollout = jax.block_until_ready(sample(state, meshes.place(batch.prompts, mesh), batch.key))
        # The update before is done once sampling is, so that the time of sampling holds what was
        # left of it.
        after_sampling = time.perf_counter()
        # A few megabytes of tokens and log-probs: rewards, metrics and selection read all rows.
        rollout = hosts.fetch(rollout)
        # Read off the rollout: pair samplers make two completions a prompt, whatever the options
        # say.
        num_samples = len(rollout.tokens) // len(batch.prompts.tokens)
        new_columns = rollout.tokens.shape[1] - batch.prompts.tokens.shape[1]
        # Reward models read columns too; the rollout stays as wide as those of other steps.
        scored = trimmed(rollout, new_columns)
        if scored is not rollout and not hosts.several():
            scored = meshes.place(scored, mesh)
        rewarded = reward_fn(scored, batch.columns, num_samples)
        times = {
            "time/sampling": after_sampling - start,
            "time/rewards": time.perf_counter() - after_sampling,
        }
        return Completions(
            rollout, rewarded.rewards, rewarded.reasons, num_samples, rewarded.metrics, times
        )

    def shapes(state: TrainState, batch: PromptBatch) -> Rollout:
        return sample_shapes(sample, mesh, state, batch.prompts, batch.key)

    def trace(state: TrainState, batch: PromptBatch) -> dict[str, jax.stages.Traced]:
        return {"sample": trace_sample(sample, mesh, state, batch.prompts, batch.key)}

    return Collector(collect, shapes, trace)


def sample_shapes(sample: SampleFn, mesh: Mesh, state: TrainState, prompts: Any, key: Any) -> Any:
    """The shapes of what `sample` returns, with their places."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        rollout = jax.eval_shape(sample, state, *_shaped(prompts, key, mesh))
    return meshes.place_shapes(rollout, mesh)


def trace_sample(
    sample: SampleFn, mesh: Mesh, state: TrainState, prompts: Any, key: Any
) -> jax.stages.Traced:
    """The program that samples, for shapes."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(sample).trace(state, *_shaped(prompts, key, mesh))


def _shaped(prompts: Any, key: Any, mesh: Mesh) -> tuple[Any, Any]:
    everywhere = NamedSharding(mesh, PartitionSpec())
    return meshes.place_shapes(prompts, mesh), programs.shaped(key, everywhere)
