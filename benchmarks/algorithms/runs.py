"""Whole runs as one function: `train(key, params, learning_rate, knob) -> curves`, compiled once and
vmapped over seeds and hyper-parameters.

Prompts, sampling, scores, updates and evaluations are all inside: nothing leaves the device until
the curves are there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from rlhf import rollouts, tasks
from rlhf.lm import LM
from rlhf.models import TransformerConfig, transformer
from rlhf.recipes import sft
from rlhf.rollouts import Batch, Prompts, Rollout
from rlhf.tasks.characters import EOS, PAD, VOCABULARY
from rlhf.tasks.task import Task
from rlhf.train import TrainState, init_state, reference
from rlhf.training.policy import Policy

Array = jax.Array
NONE = "none"  # in place of a second hyper-parameter
WARM_RATE = 3e-3  # learning rate of the warm start
WARM_ROWS = 64
UPDATES = 2  # optimizer steps on the completions of a step
RISE = 0.1  # share of the optimizer steps in which the learning rate rises


class Setting(NamedTuple):
    """What a comparison holds equal.

    Attributes:
      task: which is learned.
      hidden_size: of the model, of two layers and four heads.
      warm_steps: supervised steps on right completions, from random weights, before the algorithm
        starts.
      steps: of the algorithm.
      prompts: of a step.
      samples: completions of a prompt.
      evaluations: evenly spread, after the one at the start; a divisor of `steps`.
      eval_prompts: of each.
      last_prompts: of the one at the end, which is compared: 256 would leave a run's share of right
        completions uncertain by 0.01.
      staleness: steps by which the policy that samples is behind.
      rates: learning rates of the sweep.
    """

    task: Task
    hidden_size: int = 32
    warm_steps: int = 300
    steps: int = 150
    prompts: int = 16
    samples: int = 8
    evaluations: int = 10
    eval_prompts: int = 256
    last_prompts: int = 1024
    staleness: int = 0
    rates: tuple[float, ...] = (2e-4, 4e-4, 8e-4, 1.6e-3)


class Algorithm(NamedTuple):
    """How a policy learns.

    Attributes:
      make_step: (policy, optimizer, setting, knob, reward) -> `step(state, behaviour, key) ->
        (state, tokens)`, of a recipe's `make_update`; `behaviour` are the parameters that sample,
        `tokens` how many were sampled.
      knob: name of the second hyper-parameter.
      knobs: its two values in the sweep, the default first.
      make_policy: (lm, setting) -> Policy.
      start: (policy, params, key) -> (params, context) of the state at step 0.
      lean: (setting, state) -> transforms of logits in evaluations; None: there are none.
    """

    make_step: Callable
    knob: str
    knobs: tuple[float, ...]
    make_policy: Callable
    start: Callable
    lean: Callable | None = None


def headless(lm: LM, setting: Setting) -> Policy:
    """A policy without a head."""
    return Policy(lm)


def bare(policy: Policy, params: Any, key: Array) -> tuple[Any, dict]:
    """A start without anything but the parameters."""
    return params, {}


def with_reference(policy: Policy, params: Any, key: Array) -> tuple[Any, dict]:
    """A start with the parameters as a reference too."""
    return params, {"reference": reference(params)}


def model(setting: Setting) -> LM:
    return transformer(
        TransformerConfig(
            len(VOCABULARY),
            setting.hidden_size,
            num_layers=2,
            num_heads=4,
            mlp_size=3 * setting.hidden_size,
            tied=True,
        )
    )


def sample(task: Task, lm: LM, params: Any, prompts: Prompts, key: Array, **options) -> Rollout:
    """Completions at temperature 1, in loops of fixed length."""
    return rollouts.generate(
        lm,
        params,
        prompts,
        key,
        max_new_tokens=task.max_new_tokens,
        eos_ids=(EOS,),
        early_end=False,
        **options,
    )


def ended(completions: Array) -> Array:
    """Completions `[B, A]` with an end token each: `[B, A + 1]`.

    >>> ended(jnp.array([[7, 8], [9, 0]])).tolist()
    [[7, 8, 2], [9, 2, 0]]
    """
    length = (completions != PAD).sum(axis=1)
    return jnp.pad(completions, ((0, 0), (0, 1))).at[jnp.arange(len(length)), length].set(EOS)


def demonstrations(setting: Setting, key: Array, number: int) -> Batch:
    """Prompts with right completions."""
    prompt_key, attempt_key = jax.random.split(key)
    prompts = setting.task.prompts(prompt_key, number)
    completions = setting.task.attempts(attempt_key, prompts, 1.0)
    # One that always fills the limit, as the bandit's do, has no end token.
    has_end = completions.shape[1] < setting.task.max_new_tokens
    completions = ended(completions) if has_end else completions
    return rollouts.types.token_rows(tasks.as_rollout(prompts, completions))


def warm(setting: Setting, key: Array) -> Any:
    """Parameters that supervised learning has brought part of the way; `key` is consumed.

    Of the setting only `task`, `hidden_size` and `warm_steps` matter.
    """
    init_key, data_key = jax.random.split(key)
    lm = model(setting)
    optimizer = optax.adam(WARM_RATE)
    update = sft.make_update(Policy(lm), optimizer)

    def step(state, number):
        key = jax.random.fold_in(data_key, number)
        return update(state, demonstrations(setting, key, WARM_ROWS))[0], None

    state = init_state(lm.init(init_key), optimizer, init_key)
    return jax.lax.scan(step, state, jnp.arange(setting.warm_steps))[0].params


def of_samples(make_update, collect):
    """`Algorithm.make_step` of an update on rollouts, and of how these are sampled and paid."""

    def make_step(policy, optimizer, setting, knob, reward):
        update = make_update(policy, optimizer, setting, knob)

        def step(state, behaviour, key):
            keys = jax.random.split(key, 4)
            prompts = setting.task.prompts(keys[0], setting.prompts)
            paid = partial(reward, setting.task, key=keys[1])
            rollout, rewards = collect(setting, policy, state, behaviour, prompts, paid, keys[2])
            state, _ = update(state, rollout, rewards, keys[3])
            return state, rollout.mask.sum()

        return step

    return make_step


def make_train(algorithm: Algorithm, setting: Setting, reward: Callable | None = None) -> Callable:
    """`train(key, params, learning_rate, knob) -> curves`, pure.

    Args:
      algorithm: that learns.
      setting: held equal.
      reward: (task, rollout, key) -> [B], what the algorithm is paid; None: the task's score.

    Returns: a function whose curves are arrays `[evaluations + 1]`: `exact`, the share of right
    completions; `score`; `tokens`, sampled so far.
    """
    reward = reward or (lambda task, rollout, key: task.score(rollout))
    policy = algorithm.make_policy(model(setting), setting)
    every = setting.steps // setting.evaluations

    def train(key, params, learning_rate, knob):
        run_key, start_key, held_out_key = jax.random.split(key, 3)
        optimizer = make_optimizer(setting, learning_rate)
        learn = algorithm.make_step(policy, optimizer, setting, knob, reward)
        params, context = algorithm.start(policy, params, start_key)
        state = init_state(params, optimizer, start_key, context)
        behaviours = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (setting.staleness + 1, *x.shape)), state.params
        )

        def step(carry, number):
            state, behaviours, tokens = carry
            # The oldest one samples; with a staleness of 0 that is the policy itself.
            behaviours = jax.tree.map(
                lambda old, new: jnp.concatenate([old[1:], new[None]]), behaviours, state.params
            )
            behaviour = jax.tree.map(lambda x: x[0], behaviours)
            evaluate = partial(evaluated, algorithm, setting, policy)
            found = jax.lax.cond(number % every == 0, evaluate, no_scores, state, held_out_key)
            state, more = learn(state, behaviour, jax.random.fold_in(run_key, number))
            return (state, behaviours, tokens + more), {**found, "tokens": tokens}

        # Each step evaluates before it learns.
        carry = state, behaviours, jnp.zeros((), jnp.int32)
        (state, _, tokens), curves = jax.lax.scan(step, carry, jnp.arange(setting.steps))
        of_last = setting._replace(eval_prompts=setting.last_prompts)
        last = evaluated(algorithm, of_last, policy, state, held_out_key)
        return jax.tree.map(
            lambda x, end: jnp.append(x[::every], end), curves, {**last, "tokens": tokens}
        )

    return train


def make_optimizer(setting: Setting, learning_rate: Array) -> optax.GradientTransformation:
    """Adam, whose learning rate rises from 0 and falls to 0, each linearly."""
    number = UPDATES * setting.steps
    rise = round(RISE * number)
    # Without the rise Adam's first steps, on gradients of one batch, unlearn what the start knew.
    parts = [
        optax.linear_schedule(0.0, learning_rate, rise),
        optax.linear_schedule(learning_rate, 0.0, number - rise),
    ]
    schedule = optax.join_schedules(parts, [rise])
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


def no_scores(state: TrainState, key: Array) -> dict[str, Array]:
    """What stands where nothing is evaluated."""
    return {"exact": jnp.zeros(()), "score": jnp.zeros(())}


def evaluated(
    algorithm: Algorithm, setting: Setting, policy: Policy, state: TrainState, key: Array
) -> dict[str, Array]:
    """Of one completion of each held-out prompt: the share that is right, and the mean score."""
    prompt_key, sample_key = jax.random.split(key)
    prompts = setting.task.prompts(prompt_key, setting.eval_prompts)
    lean = () if algorithm.lean is None else algorithm.lean(setting, state)
    params = trunk(state.params)
    rollout = sample(
        setting.task, policy.lm, params, prompts, sample_key, sampler=rollouts.sampler(*lean)
    )
    return {
        "exact": setting.task.exact(rollout).mean(),
        "score": setting.task.score(rollout).mean(),
    }


def trunk(params: Any) -> Any:
    """Parameters of the language model, also of one with heads."""
    return params.get("lm", params)
