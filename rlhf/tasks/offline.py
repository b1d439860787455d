"""Rows of data sets from tasks: what a weak policy wrote, which is right as often as you say, and
what the task says of it.

Rows are dictionaries with the columns of the usual data set types, like the lines of a JSONL file.
The seed decides them.  All kinds have the same prompts for a seed, but for `preferences`, which
passes over prompts whose two completions are equally good.
"""

from functools import partial
from itertools import count
from typing import Any, NamedTuple

import jax
import numpy as np

from rlhf.fields import documented
from rlhf.rollouts import text
from rlhf.rollouts.types import Array, Rollout
from rlhf.tasks.task import Task, as_rollout

Row = dict[str, Any]


@documented
class Scored(NamedTuple):
    """Completions of the weak policy, and what the task says of them.

    Attributes:
      rollout: prompts and completions.
      score: [B] float32.
      exact: [B] float32.
      right_so_far: [B, T] bool.
    """

    rollout: Rollout
    score: Array
    exact: Array
    right_so_far: Array


def prompts(task: Task, number: int, *, seed: int = 0) -> list[Row]:
    """Prompts alone: rows `prompt`.

    Args:
      task: of `tasks.find`, or of a task's own module.
      number: of rows.
      seed: any integer.

    Raises: ValueError for less than one row.

    >>> from rlhf.tasks import reverse
    >>> prompts(reverse.task(), 1)
    [{'prompt': 'dgi='}]
    """
    return [{"prompt": row["prompt"]} for row in demonstrations(task, number, seed=seed)]


def demonstrations(task: Task, number: int, *, seed: int = 0, accuracy: float = 1.0) -> list[Row]:
    """Completions to imitate: rows `prompt`, `completion`.

    Args:
      task, number, seed: as in `prompts`.
      accuracy: how often the policy is right, in [0, 1].

    Raises: ValueError for less than one row, or an accuracy outside [0, 1].

    >>> from rlhf.tasks import reverse
    >>> demonstrations(reverse.task(), 1)
    [{'prompt': 'dgi=', 'completion': 'igd'}]
    """
    return _rows(task, _sample(task, number, seed, accuracy))


def unpaired(task: Task, number: int, *, seed: int = 0, accuracy: float = 0.5) -> list[Row]:
    """Completions with a verdict: rows `prompt`, `completion`, `label`, which is True for a right
    one.

    Args:
      task: of `tasks.find`, or of a task's module.
      number: of rows.
      seed: any integer.
      accuracy: how often the policy is right, in [0, 1].

    Raises: ValueError for less than one row, or an accuracy outside [0, 1].

    >>> from rlhf.tasks import reverse
    >>> unpaired(reverse.task(), 1)
    [{'prompt': 'dgi=', 'completion': 'iid', 'label': False}]
    """
    scored = _sample(task, number, seed, accuracy)
    return [
        row | {"label": bool(right)}
        for row, right in zip(_rows(task, scored), scored.exact, strict=True)
    ]


def trajectories(task: Task, number: int, *, seed: int = 0, accuracy: float = 0.5) -> list[Row]:
    """Logged completions for offline reinforcement learning: rows `prompt`, `completion`, `reward`,
    which is the task's score.

    Args:
      task: of `tasks.find`, or of a task's module.
      number: of rows.
      seed: any integer.
      accuracy: how often the policy is right, in [0, 1].

    Raises: ValueError for less than one row, or an accuracy outside [0, 1].

    >>> from rlhf.tasks import walks
    >>> trajectories(walks.task(4), 1, seed=2)
    [{'prompt': 'q', 'completion': 'pinba', 'reward': 0.57}]
    """
    scored = _sample(task, number, seed, accuracy)
    return [
        row | {"reward": float(score)}
        for row, score in zip(_rows(task, scored), scored.score, strict=True)
    ]


def preferences(task: Task, number: int, *, seed: int = 0, accuracy: float = 0.5) -> list[Row]:
    """Two completions of each prompt, of which the task scores `chosen` higher: rows `prompt`,
    `chosen`, `rejected`.

    Args:
      task, number, seed: as in `prompts`.
      accuracy: how often the policy is right, in [0.01, 0.99]: two completions must differ
        often enough.

    Raises: ValueError for less than one row, or an accuracy outside [0.01, 0.99].

    >>> from rlhf.tasks import reverse
    >>> preferences(reverse.task(), 1)
    [{'prompt': 'dgi=', 'chosen': 'igd', 'rejected': 'iid'}]
    """
    if not 0.01 <= accuracy <= 0.99:
        raise ValueError(
            "pairs need right and wrong completions, an accuracy from 0.01 to 0.99, but it is "
            f"{accuracy}"
        )
    rows: list[Row] = []
    rounds = count()
    # A pair of equal scores says nothing: another round of samples fills its place.
    while len(rows) < number:
        rows += _pairs(task, number, seed, accuracy, next(rounds))
    return rows[:number]


def stepwise(task: Task, number: int, *, seed: int = 0, accuracy: float = 0.5) -> list[Row]:
    """Completions with a verdict on every step: rows `prompt`, `completions`, `labels`.

    A step is right as long as the completion can still become a right one; the last, if it has.
    `task.step_separator` joins the steps of a row to what the policy wrote; where it is not a token
    of the task, every token is a step.

    Args:
      task: of `tasks.find`, or of a task's module.
      number: of rows.
      seed: any integer.
      accuracy: how often the policy is right, in [0, 1].

    Raises: ValueError for less than one row, or an accuracy outside [0, 1].

    >>> from rlhf.tasks import sums
    >>> stepwise(sums.task(2), 1)
    [{'prompt': '9-2+5=', 'completions': ['7', '18'], 'labels': [True, False]}]
    """
    scored = _sample(task, number, seed, accuracy)
    tokenizer = task.tokenizer()
    separator = tokenizer.get_vocab().get(task.step_separator)

    def one(row, tokens, sampled, right, exact):
        tokens = tokens[sampled]
        right = right[sampled]
        ends = np.flatnonzero((tokens == separator) | (separator is None))
        steps = (
            row["completion"].split(task.step_separator)
            if task.step_separator
            else list(row["completion"])
        )
        # `right_so_far` cannot know that a last step is incomplete, so `exact` decides for it.
        labels = [*right[ends[: len(steps) - 1]].tolist(), bool(exact)]
        return {"prompt": row["prompt"], "completions": steps, "labels": labels}

    rollout = scored.rollout
    columns = (_rows(task, scored), rollout.tokens, rollout.mask, scored.right_so_far, scored.exact)
    return [one(*row) for row in zip(*columns, strict=True)]


def _pairs(task: Task, number: int, seed: int, accuracy: float, round: int) -> list[Row]:
    """At most `number` pairs: those of a round whose scores differ."""
    # Both attempts have the same prompts: only the key of the attempt differs.
    first, second = (
        _sample(task, number, seed, accuracy, round=round, attempt=attempt) for attempt in range(2)
    )
    rows = []
    for a, b, margin in zip(
        _rows(task, first), _rows(task, second), first.score - second.score, strict=True
    ):
        chosen, rejected = (a, b) if margin > 0 else (b, a)
        if margin != 0:
            rows.append(
                {
                    "prompt": a["prompt"],
                    "chosen": chosen["completion"],
                    "rejected": rejected["completion"],
                }
            )
    return rows


def _rows(task: Task, scored: Scored) -> list[Row]:
    tokenizer = task.tokenizer()
    starts = text.prompts(tokenizer, scored.rollout)
    completions = text.completions(tokenizer, scored.rollout)
    return [
        {"prompt": start, "completion": rest}
        for start, rest in zip(starts, completions, strict=True)
    ]


def _sample(
    task: Task, number: int, seed: int, accuracy: float, *, round: int = 0, attempt: int = 0
) -> Scored:
    if number < 1:
        raise ValueError(f"a data set of {number} rows is empty; ask for 1 or more")
    if not 0 <= accuracy <= 1:
        raise ValueError(f"accuracy is a probability, but {accuracy}")
    # One transfer for all arrays, which the loops over rows then read on the host.
    return jax.device_get(
        _score(task, number, jax.random.fold_in(jax.random.key(seed), round), attempt, accuracy)
    )


@partial(jax.jit, static_argnames=("task", "number"))
def _score(task: Task, number: int, key: Array, attempt, accuracy) -> Scored:
    # The attempt is folded in after the split, so that it does not change the prompts.
    prompt_key, attempt_key = jax.random.split(key)
    starts = task.prompts(prompt_key, number)
    rollout = as_rollout(
        starts, task.attempts(jax.random.fold_in(attempt_key, attempt), starts, accuracy)
    )
    return Scored(rollout, task.score(rollout), task.exact(rollout), task.right_so_far(rollout))
