"""What recipes that sample share: what is checked and loaded before the policy, the step from
prompts to an update, and the loop over it.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlhf import hosts
from rlhf.fields import documented
from rlhf.rollouts.environment import Environment
from rlhf.sharding import MeshStep, jit_step
from rlhf.train import TrainState
from rlhf.training import (
    collecting,
    environments,
    evaluation,
    meshes,
    model_info,
    programs,
    prompts,
    rewards,
    selection,
)
from rlhf.training.collecting import Collector, Completions
from rlhf.training.loading import Loaded
from rlhf.training.loop import fit
from rlhf.training.options import (
    EnvironmentOptions,
    MeshOptions,
    ModelOptions,
    PromptOptions,
    RewardOptions,
    SamplingOptions,
    SelectionOptions,
    TrainingOptions,
)
from rlhf.training.programs import Step
from rlhf.training.prompts import PromptBatch, PromptSet
from rlhf.training.runs import RunFolder
from rlhf.training.sampling import BUCKET, StopCriteria, policy_sampler, stop_criteria, trimmed
from rlhf.typing import Export, Hook, MakeUpdate, RewardFn

SINGLE_TURN = EnvironmentOptions()
UNSELECTED = SelectionOptions()


@documented
class Inputs(NamedTuple):
    """All that a run has before its policy is loaded.

    Attributes:
      tokenizer: of the policy.
      stop: what ends a completion.
      train: prompts to learn from.
      held_out: prompts to evaluate on; None: there are none.
      reward_fn: rewards of completions.
      environment: what is talked to instead; None: completions are sampled once.
      mesh: of devices.
      total: steps of the loop.
      batch: `(number) -> PromptBatch` of step `number`, from 0.
      max_new_tokens: the most tokens after a prompt.
    """

    tokenizer: Any
    stop: StopCriteria
    train: PromptSet
    held_out: PromptSet | None
    reward_fn: RewardFn
    environment: Environment | None
    mesh: Mesh
    total: int
    batch: Callable[[int], PromptBatch]
    max_new_tokens: int


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
    environment: EnvironmentOptions = SINGLE_TURN,
    selected: SelectionOptions = UNSELECTED,
) -> Inputs:
    """Prompts, rewards and mesh, all of it checked before a model loads.

    Args:
      run: says what is left out.
      model, dataset, training, sampling, reward, mesh: options.
      rows: of a step's batch: completions, or pairs of them.
      num_minibatches: optimizer mini-batches that they are cut into.
      environment, selected: options.

    Raises: ValueError for options, prompts and rewards that cannot be.
    """
    # The update would find it too, but only after the model is loaded and a batch sampled.
    if rows % (num_minibatches * training.micro_batches):
        raise ValueError(
            f"a step's {rows} rows cannot be taken in {num_minibatches} mini-batches of "
            f"{training.micro_batches} equal parts; "
            "change --mini_batches or --batch_size"
        )
    selection.check(selected, training)
    devices = meshes.make(mesh, rows=rows, micro_batches=num_minibatches * training.micro_batches)
    played = environments.load(environment, reward, sampling)
    tokenizer = model_info.load_tokenizer(model)
    seq2seq = model_info.load_seq2seq(model, tokenizer)
    stop = stop_criteria(model, sampling, tokenizer)
    train, held_out = prompts.load(dataset, tokenizer, seq2seq, say=run.say)
    total = training.total_steps(len(train.rows), has_held_out=held_out is not None)
    # Prompts and what is sampled after them must fit the model's positions.
    parts = train.prompts, held_out and held_out.prompts
    longest = completion_tokens(sampling, environment)
    model_info.check_tokens(model, tokenizer, *parts, max_new_tokens=longest)
    reward_fn = (
        rewards.load(reward, dataset, tokenizer, train.rows, held_out.rows if held_out else [])
        if played is None
        else _no_rewards
    )
    batch = partial(train.take, training.seed, size=training.batch_size)
    return Inputs(
        tokenizer, stop, train, held_out, reward_fn, played, devices, total, batch, longest
    )


def completion_tokens(sampling: SamplingOptions, environment: EnvironmentOptions) -> int:
    """The most tokens after a prompt."""
    if environment.environment is None:
        return sampling.max_new_tokens
    return environment.max_conversation_tokens


def _no_rewards(rollout: Any, columns: Any, num_samples: int) -> Any:
    raise TypeError("an environment gives the rewards")


def collector(
    loaded: Loaded,
    inputs: Inputs,
    sampling: SamplingOptions,
    environment: EnvironmentOptions,
    num_samples: int,
) -> Collector:
    """Completions of the policy, sampled and scored, or played where there is an environment.

    Args:
      loaded: the policy.
      inputs: of the run.
      sampling, environment: options.
      num_samples: completions of a prompt.
    """
    if inputs.environment is None:
        sample = policy_sampler(loaded, sampling, inputs.stop, num_samples)
        return collecting.sampled(sample, inputs.reward_fn, inputs.mesh)
    return environments.played(
        loaded,
        inputs.environment,
        environment,
        sampling,
        inputs.stop,
        inputs.tokenizer,
        num_samples,
        inputs.mesh,
    )


def make_step(
    collector: Collector,
    make_update: MakeUpdate,
    mesh: Mesh,
    state: TrainState,
    *,
    max_new_tokens: int,
    bucket: int = BUCKET,
    on_rollout: Callable | None = None,
) -> Step:
    """`(state, batch) -> (state, metrics)`: collects completions with their rewards, and updates on
    them, in as few columns as hold them: one update is compiled for each multiple of `bucket`.

    Args:
      collector: of completions and rewards.
      make_update: `(max_new_tokens) -> update`, a recipe's `make_update`.
      mesh: where the state is.
      state: of the run; only where its arrays are is read.
      max_new_tokens: the last columns of the collected rollouts, which are those of completions.
      bucket: columns, as of `sampling.trimmed`.
      on_rollout: `(state, completions)`, called before every update, such as `log_completions`;
        None: nothing is.
    """
    # Shapes: the first state's own arrays are consumed, and must not be held here.
    like = jax.tree.map(lambda x: programs.shaped(x, x.sharding), state)

    @cache
    def jitted(width: int) -> MeshStep:
        return jit_step(make_update(max_new_tokens=width), mesh, like)

    warn_if_equal = rewards.EqualRewards()
    # Of the last step: few bytes beside a model's, and all that a study of a failed update needs.
    given: dict[str, Any] = {}

    def step(state: TrainState, batch: Any) -> tuple[TrainState, dict]:
        scored = collector.collect(state, batch)
        # Rewards of groups that fill up are NaN, which would read as if they could not be scored.
        sampled = scored.rewards if scored.all_rewards is None else scored.all_rewards
        warn_if_equal(sampled, scored.num_samples)
        if on_rollout is not None:
            on_rollout(state, scored)
        state = state._replace(context={**state.context, **scored.context})
        rollout = trimmed(scored.rollout, max_new_tokens, bucket=bucket)
        cut = scored.rollout.tokens.shape[1] - rollout.tokens.shape[1]
        # `batch.key` sampled the rollout; a key is used once, so that the update gets one folded
        # from it.
        update_key = jax.random.fold_in(batch.key, 1)
        inputs = rollout, scored.rewards, update_key
        if cut or hosts.several():
            inputs = (
                *meshes.place((rollout, np.asarray(scored.rewards)), mesh),
                meshes.everywhere(update_key, mesh),
            )
        given.update(rollout=inputs[0], rewards=inputs[1])
        state, metrics = jitted(max_new_tokens - cut)(state, *inputs)
        return state, {**scored.metrics, **metrics, **scored.of_all, **scored.times}

    def trace(state: TrainState, batch: Any) -> dict[str, jax.stages.Traced]:
        rollout = collector.shapes(state, batch)
        scores = jax.ShapeDtypeStruct((len(rollout.tokens),), np.float32)
        update_key = programs.shaped(batch.key, NamedSharding(mesh, PartitionSpec()))
        # Of all columns: the widest update is the one that must fit.
        update = jitted(max_new_tokens)
        updated = update.trace(state, rollout, meshes.place(scores, mesh), update_key)
        return {**collector.trace(state, batch), "update": updated}

    return Step(step, trace, lambda batch: {**batch._asdict(), **given})


def log_completions(
    run: RunFolder, dataset: PromptOptions, tokenizer: Any, updates: int = 1
) -> Callable | None:
    """`(state, completions)` that writes a step's completions to `samples/`, as often as the
    options say; None: never.

    Args:
      run: whose folder it is.
      dataset: the options.
      tokenizer: of the policy.
      updates: optimizer steps of a step of the loop.
    """
    if not dataset.log_completions:
        return None

    def write(state: TrainState, completions: Completions) -> None:
        # The state counts optimizer steps, the folder steps of the loop, from 1.
        number = int(state.step) // updates + 1
        if number % dataset.log_completions == 0:
            run.samples(number, collecting.table(tokenizer, completions), phase="train")

    return write


def train(
    run: RunFolder,
    dataset: PromptOptions,
    training: TrainingOptions,
    inputs: Inputs,
    state: TrainState,
    collector: Collector,
    make_update: MakeUpdate,
    *,
    evaluated: Collector | None = None,
    selected: SelectionOptions = UNSELECTED,
    updates: int = 1,
    fixed: Sequence[str] = ("frozen", "reference"),
    hooks: Sequence[Hook] = (),
    callbacks: Sequence[Callable] = (),
    shown: tuple[str, ...],
    export: Export,
) -> TrainState:
    """The loop: collects, updates, evaluates, saves; what `rlhf.training.loop.fit` makes of it.

    Args:
      run, dataset, training, inputs: of the recipe.
      state: at step 0; consumed.
      collector: of a step's completions.
      make_update: `(max_new_tokens) -> update`, for rollouts whose last columns are so many.
      evaluated: of held-out prompts; None: the same collector.
      selected: options; which prompts and groups a step learns from.
      updates: optimizer steps of a step.
      fixed, hooks, callbacks, shown, export: as in `fit`.

    Returns: the last state.
    """
    # Before the selection: held-out prompts are evaluated as they are, and none is passed over.
    evaluate = evaluation.of_completions(
        run, evaluated or collector, inputs.held_out, training, inputs.tokenizer
    )
    update = make_update(max_new_tokens=inputs.max_new_tokens)
    chosen = selection.select(
        selected, training, inputs.train, inputs.mesh, collector, update, state
    )
    # Groups of earlier steps stand beside those of this one, and all of them in all columns.
    replays = selected.replay_groups > 0
    step = make_step(
        chosen.collector,
        (lambda max_new_tokens: chosen.update) if replays else make_update,
        inputs.mesh,
        chosen.state,
        max_new_tokens=inputs.max_new_tokens,
        bucket=inputs.max_new_tokens if replays else BUCKET,
        on_rollout=log_completions(run, dataset, inputs.tokenizer, updates),
    )
    return fit(
        run,
        training,
        chosen.state,
        step,
        chosen.batch,
        total=inputs.total,
        updates=updates,
        fixed=fixed,
        hooks=hooks,
        callbacks=callbacks,
        shown=shown,
        evaluate=evaluate,
        export=export,
        mesh=inputs.mesh,
    )
