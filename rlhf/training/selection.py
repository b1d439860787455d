"""What a step learns from: prompts by how often they are solved, groups whose rewards differ, and
groups of earlier steps.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from rlhf import hosts, losses
from rlhf.fields import documented
from rlhf.rollouts import Rollout, filtering, replay
from rlhf.train import TrainState
from rlhf.training import meshes
from rlhf.training.collecting import Collector, Completions
from rlhf.training.options import SelectionOptions, TrainingOptions
from rlhf.training.prompts import PromptBatch, PromptSet
from rlhf.training.sampling import completion_metrics
from rlhf.typing import UpdateFn


@documented
class PromptRounds(NamedTuple):
    """The prompts of a step that may sample several times.

    Attributes:
      batches: prompts of each round.
      key: of the first round.
    """

    batches: Sequence[PromptBatch]
    key: Any


@documented
class Selected(NamedTuple):
    """The parts of a loop.

    Attributes:
      collector: of a step's completions.
      update: on them.
      batch: `(number) -> batch` of the collector, from 0.
      state: with what the selection remembers in its context.
    """

    collector: Collector
    update: UpdateFn
    batch: Callable[[int], Any]
    state: TrainState


def check(options: SelectionOptions, training: TrainingOptions) -> None:
    """Raises: ValueError for a buffer that cannot hold the groups of a step."""
    if 0 < options.replay_groups < training.batch_size:
        raise ValueError(
            f"replay_groups {options.replay_groups} is less than a step's {training.batch_size} "
            "groups, one a prompt; raise it, or lower --batch_size"
        )


def select(
    options: SelectionOptions,
    training: TrainingOptions,
    prompts: PromptSet,
    mesh: Mesh,
    collector: Collector,
    update: UpdateFn,
    state: TrainState,
) -> Selected:
    """The parts of a loop that learns from what the options choose.

    Args:
      options, training: of the recipe.
      prompts: to learn from.
      mesh: where the state is.
      collector, update, state: without a selection.
    """
    size = training.batch_size
    # One width for all prompts where rows of different rounds or steps go into one batch.
    takes_others = bool(options.replay_groups or options.dynamic_sampling)
    batch: Callable[[int], Any] = partial(
        prompts.take, training.seed, size=size, narrow=not takes_others
    )
    context = dict(state.context)
    if options.curriculum != "none":
        collector, known = by_curriculum(collector, prompts, size, mesh, narrow=not takes_others)
        context |= known
    if takes_others:
        shapes = collector.shapes(state, batch(0))
        num_samples = len(shapes.tokens) // size
    if options.replay_groups:
        update, buffer = with_buffer(update, shapes, num_samples, options.replay_groups, mesh)
        context |= buffer
    if options.dynamic_sampling:
        batch = rounds(prompts, training.seed, size, options.dynamic_sampling)
        collector = informative(collector, size, num_samples, mesh)
    return Selected(collector, update, batch, state._replace(context=context))


def rounds(prompts: PromptSet, seed: int, size: int, number_of_rounds: int) -> Callable:
    """`(number) -> PromptRounds` of step `number`: a pure function of it, so that a resumed run
    reads what the first would have.  Prompts of rounds that a step does not need are passed over.
    """

    def batch(number: int) -> PromptRounds:
        first = number * number_of_rounds
        batches = [
            # One width for all: rows of different rounds go into one batch.
            prompts.take(seed, first + i, size, narrow=False)
            for i in range(number_of_rounds)
        ]
        return PromptRounds(batches, batches[0].key)

    return batch


def informative(collector: Collector, groups: int, num_samples: int, mesh: Mesh) -> Collector:
    """Samples round after round until `groups` prompts have completions whose rewards differ (DAPO,
    arXiv:2503.14476); where the rounds run out, groups that train nothing fill up.

    Args:
      collector: of one round.
      groups: prompts of a step.
      num_samples: completions of a prompt.
      mesh: where the state is.

    Returns: a collector of `PromptRounds`.
    """

    def collect(state: TrainState, batch: PromptRounds) -> Completions:
        of_rounds: list[Completions] = []
        reasons: list[str | None] = []

        # The key of `dynamic_sampling` is not used: the prompts of a round bring their own.
        def sample(prompts: PromptBatch, key: Any) -> tuple[Rollout, Any, np.ndarray]:
            scored = collector.collect(state, prompts)
            of_rounds.append(scored)
            # Texts are no arrays: rows carry their places in the list.
            places = np.arange(len(scored.reasons)) + len(reasons)
            reasons.extend(scored.reasons)
            # On the host: rows of rounds that are thrown away are not copied on the device.
            return (*jax.device_get((scored.rollout, scored.rewards)), places)

        rows, rewards, report = filtering.dynamic_sampling(
            sample,
            lambda rows: rows[1],
            batch.batches,
            batch.key,
            groups=groups,
            num_samples=num_samples,
            max_rounds=len(batch.batches),
        )
        return Completions(
            rows[0] if hosts.several() else meshes.place(rows[0], mesh),
            rewards.reshape(-1),
            [reasons[place] for place in np.asarray(rows[2])],
            num_samples,
            {
                "dynamic_sampling/rounds": report.rounds,
                "dynamic_sampling/all_high": report.dropped_high,
                "dynamic_sampling/all_low": report.dropped_low,
                "dynamic_sampling/missing": report.short,
            },
            {name: sum(one.times[name] for one in of_rounds) for name in of_rounds[0].times},
            all_rewards=np.concatenate([np.asarray(one.rewards) for one in of_rounds]),
            of_all=_of_all_rounds(
                [{**completion_metrics(one.rollout), **one.metrics} for one in of_rounds]
            ),
        )

    return Collector(
        collect,
        # Every round has the shapes of the step.
        lambda state, batch: collector.shapes(state, batch.batches[0]),
        lambda state, batch: collector.trace(state, batch.batches[0]),
    )


def _of_all_rounds(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Metrics of rounds as those of all rounds: the mean, but of counts the sum, and of extremes the
    extreme.
    """
    fetched = jax.device_get(metrics)
    join: dict[str, Callable] = {
        "tokens": np.sum,
        "sequences": np.sum,
        "completions/min_length": np.min,
        "completions/max_length": np.max,
    }
    return {name: join.get(name, np.mean)([one[name] for one in fetched]) for name in fetched[0]}


def by_curriculum(
    collector: Collector, prompts: PromptSet, size: int, mesh: Mesh, *, narrow: bool = True
) -> tuple[Collector, dict[str, Any]]:
    """Prompts chosen by `p (1 - p)`, p being how often they were solved (arXiv:2502.12272).

    Rewards are read as the share that is solved: those below 0 as 0, those above 1 as 1.

    Args:
      collector: of the prompts that are chosen.
      prompts: to choose from.
      size: prompts of a step.
      mesh: where the state is.
      narrow: as in `PromptSet.select`.

    Returns: a collector, and an entry for the state's context that holds what is known of every
    prompt.
    """
    curriculum = replay.curriculum(len(prompts.rows))
    choose = jax.jit(partial(curriculum.sample, n=size))
    update = jax.jit(curriculum.update)

    def collect(state: TrainState, batch: PromptBatch) -> Completions:
        known = state.context["curriculum"]
        # Keys 0 and 1 of a step sample and update.
        key = jax.random.fold_in(batch.key, 2)
        chosen = np.asarray(choose(known, meshes.everywhere(key, mesh) if hosts.several() else key))
        scored = collector.collect(state, prompts.select(chosen, batch.key, narrow=narrow))
        solved = np.clip(np.asarray(scored.rewards), 0, 1).reshape(size, -1)
        known = update(known, chosen, solved)
        # Of those that were tried: the others stand at one half.
        tried = known.count > 0
        pass_rate = (known.pass_rate * tried).sum() / tried.sum()
        metrics = {**scored.metrics, "curriculum/pass_rate": pass_rate}
        return scored._replace(context={"curriculum": known}, metrics=metrics)

    start = {"curriculum": meshes.everywhere(curriculum.init(), mesh)}
    return collector._replace(collect=collect), start


def with_buffer(
    update: UpdateFn, shapes: Rollout, num_samples: int, capacity: int, mesh: Mesh
) -> tuple[UpdateFn, dict[str, Any]]:
    """An update in which groups without a difference in reward are replaced by groups of earlier
    steps, which are sampled in proportion to the deviation of their rewards (arXiv:2504.08837).

    Args:
      update: of an algorithm.
      shapes: of the rollouts.
      num_samples: completions of a prompt.
      capacity: groups that the buffer holds, the newest.
      mesh: where the state is.

    Returns: an update, and an entry for the state's context that holds the buffer.
    """

    def in_groups(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x.reshape(-1, num_samples, *x.shape[1:]) if x.ndim else x, tree
        )

    def replayed(state: TrainState, rollout: Rollout, rewards: Any, key: Any) -> tuple:
        sample_key, update_key = jax.random.split(key)
        buffer = state.context["replay"]
        sampled = in_groups((rollout, rewards))
        _, grouped = sampled
        spread = jnp.nan_to_num(losses.groups.group_std(grouped)[:, 0])
        # Before this step's groups are added: they train already.
        earlier = replay.sample(buffer, sample_key, len(spread), weight=replay.proportional)
        stale = (spread == 0) & earlier.real

        def either(old: Any, new: Any) -> Any:
            if not new.ndim:
                return new
            old_ones = stale.reshape(-1, *[1] * (new.ndim - 1))
            return jnp.where(old_ones, old, new).reshape(-1, *new.shape[2:])

        mixed, mixed_rewards = jax.tree.map(either, earlier.rows, sampled)
        # Minus infinity: a group without a difference is not stored.
        buffer = replay.add(buffer, sampled, jnp.where(spread > 0, spread, -jnp.inf))
        state = state._replace(context={**state.context, "replay": buffer})
        state, metrics = update(state, mixed, mixed_rewards, update_key)
        return state, {**metrics, "replay/share": stale.mean()}

    rewards = jax.ShapeDtypeStruct((len(shapes.tokens),), jnp.float32)
    example = jax.eval_shape(in_groups, (shapes, rewards))
    buffer = replay.init(example, capacity)
    return replayed, {"replay": meshes.everywhere(buffer, mesh)}
