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
EVALUATION = 2**30  # folded into a run's key: no step has this number


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
      evaluations: evenly spread, after the one at the start.
      eval_prompts: of each.
      staleness: steps by which the policy that samples is behind.
    """

    task: Task
    hidden_size: int = 32
    warm_steps: int = 300
    steps: int = 150
    prompts: int = 16
    samples: int = 8
    evaluations: int = 5
    eval_prompts: int = 256
    staleness: int = 0


class Online(NamedTuple):
    """An algorithm that learns from what it samples.

    Attributes:
      make_update: (policy, optimizer, setting, knob) -> `update(state, rollout, rewards, key)`.
      knob: name of the second hyper-parameter.
      knobs: its values in the sweep, of which the first is the default.
      start: (params, key, setting) -> (params, context) at step 0.
      policy: (lm, setting) -> Policy.
      sample: (setting, policy, state, behaviour, prompts, key) -> Rollout; `behaviour` are the
        parameters that sample.
    """

    make_update: Callable
    knob: str
    knobs: tuple[float, ...]
    start: Callable
    policy: Callable
    sample: Callable


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


def sample(setting: Setting, lm: LM, params: Any, prompts: Prompts, key: Array, **options) -> Rollout:
    """Completions at temperature 1, in loops of fixed length."""
    return rollouts.generate(
        lm,
        params,
        prompts,
        key,
        max_new_tokens=setting.task.max_new_tokens,
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


def demonstrations(setting: Setting, key: Array, number: int, accuracy: float = 1.0) -> Batch:
    """Rows with completions of the weak policy, which are right that often."""
    prompt_key, attempt_key = jax.random.split(key)
    prompts = setting.task.prompts(prompt_key, number)
    completions = setting.task.attempts(attempt_key, prompts, accuracy)
    # What fills the limit has no end token: of the bandit.
    if completions.shape[1] < setting.task.max_new_tokens:
        completions = ended(completions)
    return rollouts.types.token_rows(tasks.as_rollout(prompts, completions))


def warm(setting: Setting, key: Array) -> Any:
    """Parameters that supervised learning has brought part of the way; `key` is consumed."""
    init_key, data_key = jax.random.split(key)
    lm = model(setting)
    optimizer = optax.adam(3e-3)
    update = sft.make_update(Policy(lm), optimizer)

    def step(state, number):
        batch = demonstrations(setting, jax.random.fold_in(data_key, number), 64)
        return update(state, batch)[0], None

    state = init_state(lm.init(init_key), optimizer, init_key)
    return jax.lax.scan(step, state, jnp.arange(setting.warm_steps))[0].params


def make_train(algorithm: Online, setting: Setting, reward: Callable | None = None) -> Callable:
    """`train(key, params, learning_rate, knob) -> curves`, pure.

    Args:
      algorithm: that learns.
      setting: held equal.
      reward: (task, rollout, key) -> [B], what the algorithm is paid; None: the task's score.

    Returns: a function whose curves are arrays `[evaluations + 1]`: `exact`, the share of right
    completions; `score`; `tokens`, sampled so far.
    """
    reward = reward or (lambda task, rollout, key: task.score(rollout))
    lm = model(setting)
    policy = algorithm.policy(lm, setting)
    every = setting.steps // setting.evaluations

    def train(key, params, learning_rate, knob):
        run_key, start_key = jax.random.split(key)
        optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
        update = algorithm.make_update(policy, optimizer, setting, knob)
        params, context = algorithm.start(params, start_key, setting)
        state = init_state(params, optimizer, start_key, context)
        behaviours = jax.tree.map(
            lambda x: jnp.broadcast_to(x, (setting.staleness + 1, *x.shape)), state.params
        )

        def step(carry, number):
            state, behaviours = carry
            # The oldest one samples; with a staleness of 0 that is the policy itself.
            behaviours = jax.tree.map(
                lambda old, new: jnp.concatenate([old[1:], new[None]]), behaviours, state.params
            )
            behaviour = jax.tree.map(lambda x: x[0], behaviours)
            keys = jax.random.split(jax.random.fold_in(run_key, number), 4)
            prompts = setting.task.prompts(keys[0], setting.prompts)
            rollout = algorithm.sample(setting, policy, state, behaviour, prompts, keys[1])
            rewards = reward(setting.task, rollout, keys[2])
            state, _ = update(state, rollout, rewards, keys[3])
            return (state, behaviours), rollout.mask.sum()

        def evaluated(state, tokens):
            return {**evaluate(setting, policy, state, jax.random.fold_in(run_key, EVALUATION)), "tokens": tokens}

        def part(carry, numbers):
            state, behaviours, tokens = carry
            (state, behaviours), sampled = jax.lax.scan(step, (state, behaviours), numbers)
            tokens = tokens + sampled.sum()
            return (state, behaviours, tokens), evaluated(state, tokens)

        none = jnp.zeros((), jnp.int32)
        numbers = jnp.arange(every * setting.evaluations).reshape(setting.evaluations, every)
        first = evaluated(state, none)
        _, later = jax.lax.scan(part, (state, behaviours, none), numbers)
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)

    return train


def evaluate(setting: Setting, policy: Policy, state: TrainState, key: Array) -> dict[str, Array]:
    """Of one completion of each held-out prompt: the share that is right, and the mean score."""
    prompt_key, sample_key = jax.random.split(key)
    prompts = setting.task.prompts(prompt_key, setting.eval_prompts)
    params = policy.lm_params(state.params, state.context)
    rollout = sample(setting, policy.lm, params, prompts, sample_key)
    return {
        "exact": setting.task.exact(rollout).mean(),
        "score": setting.task.score(rollout).mean(),
    }
