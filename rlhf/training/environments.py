"""Environments by name: conversations of several turns in place of completions that are sampled once."""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rlhf import hosts, rollouts
from rlhf.rollouts import Rollout
from rlhf.rollouts.environment import Environment, EnvironmentFailed, play
from rlhf.rollouts.reward_worker import Refused, describe, find
from rlhf.train import TrainState
from rlhf.training import meshes
from rlhf.training.collecting import Collector, Completions, sample_shapes, trace_sample
from rlhf.training.interrupts import Stopped
from rlhf.training.loading import Loaded
from rlhf.training.options import EnvironmentOptions, RewardOptions, SamplingOptions
from rlhf.training.prompts import PromptBatch
from rlhf.training.sampling import StopCriteria, policy_sampler


def load(
    options: EnvironmentOptions, reward: RewardOptions, sampling: SamplingOptions
) -> Environment | None:
    """What the function of the options makes; None where no environment is asked for.

    Raises: ValueError for a function that is not there, what it raises, another return value, and
    options that an environment has no use for.
    """
    given = options.environment
    if given is None:
        return None
    if hosts.several():
        raise ValueError(
            f"environment {_name(given)} is talked to by one process, but this run has several: each "
            "would hear other answers; start one process"
        )
    if reward.reward:
        raise ValueError(
            f"environment {_name(given)} gives the rewards itself, but reward is {reward.reward}; leave "
            "one of them out"
        )
    if sampling.stop:
        raise ValueError(
            f"stop {sampling.stop} ends completions, but turns of an environment end with the end "
            "token; leave it out"
        )
    return given if isinstance(given, Environment) else _create(given)


def _create(given: str | Callable) -> Environment:
    if isinstance(given, str) and not all(given.rpartition(":")[::2]):
        raise ValueError(f"environment {given!r} names no function; write file.py:make")
    try:
        created = find(given)() if isinstance(given, str) else given()
    except Refused as error:
        raise ValueError(f"environment {given}: {error}") from None
    # Code of a user's may raise anything, also while it is imported.
    except Exception as error:
        raise ValueError(f"environment {_name(given)}: {describe(error)}") from None
    if not isinstance(created, Environment):
        raise ValueError(
            f"environment {_name(given)} created {created!r:.80}; it must return an "
            "rlhf.rollouts.environment.Environment, as tools.tool_environment does"
        )
    return created


def _name(given: Any) -> str:
    """What a message calls it; one that is given from Python may have no name."""
    return given if isinstance(given, str) else getattr(given, "__name__", "from Python")


def played(
    loaded: Loaded,
    environment: Environment,
    options: EnvironmentOptions,
    sampling: SamplingOptions,
    stop: StopCriteria,
    tokenizer: Any,
    num_samples: int,
    mesh: Mesh,
) -> Collector:
    """Conversations with an environment; a conversation's reward is the sum of its turns'.

    Args:
      loaded: the policy that is trained.
      environment: what it talks to; `reset` takes a prompt's row, as a dict.
      options: how long conversations are.
      sampling: of a turn.
      stop: what ends a turn.
      tokenizer: of the policy.
      num_samples: conversations a prompt.
      mesh: where the state is.
    """
    policy = loaded.policy
    longest = dataclasses.replace(
        sampling, max_new_tokens=options.max_conversation_tokens, min_new_tokens=0
    )
    # One turn that takes all of the room has the shapes of a whole conversation.
    one_turn = policy_sampler(loaded, longest, stop, num_samples)

    def generate(lm: Any, params: Any, prompts: Any, key: Any, **settings: Any) -> Rollout:
        return rollouts.generate(lm, params, meshes.place(prompts, mesh), key, **settings)

    def collect(state: TrainState, batch: PromptBatch) -> Completions:
        start = time.perf_counter()
        prompts = jax.tree.map(np.asarray, batch.prompts)
        names = list(batch.columns)
        rows = [
            dict(zip(names, values, strict=True))
            for values in zip(*batch.columns.values(), strict=True)
        ]
        try:
            found = play(
                policy.lm,
                policy.lm_params(state.params, state.context),
                tokenizer,
                environment,
                prompts,
                batch.key,
                max_turns=options.max_turns,
                max_new_tokens=sampling.max_new_tokens,
                max_tokens=prompts.tokens.shape[1] + options.max_conversation_tokens,
                rows=rows,
                num_samples=num_samples,
                sampler=sampling.sampler(stop.eos_ids),
                eos_ids=stop.eos_ids,
                render=partial(options.observation_template.replace, "{}"),
                turn_timeout=options.turn_timeout,
                generate=generate,
            )
        except EnvironmentFailed as error:
            raise Stopped(f"environment {_name(options.environment)}: {error}") from None
        # Failures of the environment's code; a policy's mistakes, which it tells of, are to be learned
        # from.
        if found.failures.sum() == found.turns.sum():
            raise Stopped(
                f"environment {_name(options.environment)} failed in every turn of a step: "
                f"{found.errors[0][0]}"
            )
        # NaN in a turn makes the sum NaN: such a conversation has no reward.
        rewards = found.rewards.sum(-1)
        errors = [len(of_row) for of_row in found.errors]
        metrics = {
            "reward": np.nanmean(rewards) if not np.isnan(rewards).all() else np.nan,
            "environment/turns": found.turns.mean(),
            "environment/errors": np.mean(errors),
        }
        return Completions(
            meshes.place(found.rollout, mesh),
            rewards,
            ["; ".join(of_row) or None for of_row in found.errors],
            num_samples,
            metrics,
            {"time/sampling": time.perf_counter() - start},
        )

    def shapes(state: TrainState, batch: PromptBatch) -> Rollout:
        return sample_shapes(one_turn, mesh, state, batch.prompts, batch.key)

    def trace(state: TrainState, batch: PromptBatch) -> dict[str, jax.stages.Traced]:
        # The longest of the programs that a conversation needs: turns after the first have longer
        # prompts, in widths of powers of two.
        return {"sample": trace_sample(one_turn, mesh, state, batch.prompts, batch.key)}

    return Collector(collect, shapes, trace)
