"""Rewards of texts: any number of reward functions over a batch, in which one failing call loses no completion.

A reward function is `f(prompts, completions, **columns) -> rewards`: lists of B strings, and columns of B entries each (a
dataset's, or those of `token_columns`), to B numbers.  None says that a row is not scorable.  A list in place of a number gives
a reward to every sampled token, or to every step.  It may be `async def`.  `rollouts.reward_functions` has a catalogue.
"""

import asyncio
import inspect
import math
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rlhf import losses
from rlhf.rollouts.calls import GRACE, in_thread
from rlhf.rollouts.types import Array, Rollout

RewardFunction = Callable[..., Any]
ROWS_AT_ONCE = 16  # awaited at a time, of an async function that is tried row by row
LARGEST = float(np.finfo(np.float32).max)


class Unreachable(ConnectionError):
    """Raised by a reward function when what it asks does not answer: no row is at fault, so rows are not tried one by one."""


class Failure(NamedTuple):
    """What went wrong in a reward function."""

    name: str
    row: int | None  # None: the call on the whole batch
    message: str


class Rewards(NamedTuple):
    """What `score_texts` returns, on the host."""

    values: np.ndarray  # [B, K] float32, NaN = not scorable; of per-token rewards the sum
    names: tuple[str, ...]  # K
    weights: np.ndarray  # [K] float32
    total: np.ndarray  # [B] float32, Σ weight · value over what is scorable; NaN where nothing is
    per_token: dict[str, list[np.ndarray | None]]  # name -> B of [sampled tokens] float32, for functions that return lists
    failures: list[Failure]


class Combination(NamedTuple):
    """Reward functions and their weights; itself a reward function, of the weighted sum."""

    functions: dict[str, RewardFunction]
    weights: dict[str, float]

    def __call__(self, prompts, completions, **columns) -> list[float | None]:
        total = score_texts(self, prompts, completions, columns=columns).total
        return [None if np.isnan(x) else float(x) for x in total]


def combine(functions: Mapping[str, RewardFunction], *, weights: Mapping[str, float] | None = None) -> Combination:
    """`Σ_k weight_k · f_k`, over the functions that can score a row.

    Args:
      functions: name -> reward function.
      weights: name -> weight; 1 where a name is left out.

    Returns: a reward function; `score_texts` keeps the value of each part.

    Raises: ValueError where there is no function, or a weight that is not finite or of no function.

    >>> short = lambda prompts, completions, **columns: [float(len(c) < 5) for c in completions]
    >>> polite = lambda prompts, completions, **columns: [float("please" in c) for c in completions]
    >>> combine({"short": short, "polite": polite}, weights={"polite": 0.5})(["", ""], ["yes", "yes please"])
    [1.0, 0.5]
    """
    weights = dict(weights or {})
    if not functions:
        raise ValueError("combine needs at least one reward function, but there are none")
    if unknown := [name for name in weights if name not in functions]:
        raise ValueError(f"weights name {unknown} but the functions are {list(functions)}")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of {name!r} must be finite, but is {weight}")
    return Combination(dict(functions), {name: float(weights.get(name, 1.0)) for name in functions})


def score_texts(
    rewards: Combination | RewardFunction,
    prompts: Sequence[str],
    completions: Sequence[str],
    *,
    columns: Mapping[str, Sequence] | None = None,
    timeout: float | None = None,
) -> Rewards:
    """The rewards of B completions.  All functions run at the same time: each in a thread, async ones on one event loop.

    No completion is lost when a reward function fails: the value is NaN, as for None, and `failures` says why.  A function that
    raises is called again row by row, so that only the bad rows are lost; it should therefore score every row by itself.  A
    function that returns anything but B entries has failed on all rows, an entry that is not a finite number (or list of them)
    on its row, and what is not there in time on the rows that are missing.

    Args:
      rewards: a reward function, or several from `combine`.
      prompts, completions: B texts each.
      columns: name -> B entries, passed on to every function.  Functions that return lists of numbers need `completion_ids`,
        the sampled tokens of a row, and get a reward per token; where a row of `step_ends` is as long as its list, it gives one
        per step: `[3, 7]` says that the steps are the sampled tokens 0 to 2 and 3 to 6, and each is rewarded at its last.
      timeout: seconds for the whole batch; None: no limit.  A thread cannot be ended: what hangs goes on in the background
        until the process ends, and what never lets go of Python's lock is waited for (put it behind `reward_server.serve`).

    Returns: `Rewards`.

    Raises: ValueError where the numbers of rows differ; RuntimeError where every function failed on every row.

    >>> def exact(prompts, completions, *, solution, **columns):
    ...     return [float(c == s) if s else None for c, s in zip(completions, solution)]
    >>> score_texts(exact, ["2+2?", "1+2?", "?"], ["4", "4", "4"], columns={"solution": ["4", "3", ""]}).total.tolist()
    [1.0, 0.0, nan]
    """
    if not isinstance(rewards, Combination):
        rewards = combine({getattr(rewards, "__name__", type(rewards).__name__): rewards})
    columns = dict(columns or {})
    for name, column in {"completions": completions, **columns}.items():
        if len(column) != len(prompts):
            raise ValueError(f"{name} has {len(column)} rows but prompts has {len(prompts)}; one entry a completion")

    outcomes: dict[str, list] = {name: [f"not there after {timeout} s"] * len(prompts) for name in rewards.functions}
    notes: list[Failure] = []

    async def run():
        scoring = [_score(n, f, prompts, completions, columns, outcomes[n], notes) for n, f in rewards.functions.items()]
        await asyncio.wait([asyncio.create_task(s) for s in scoring], timeout=timeout)  # what is left, asyncio.run cancels

    # a thread of its own: the caller may be inside an event loop, and an async function that blocks must not hold it for ever
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    thread.join(None if timeout is None else timeout + GRACE)
    return _collect(rewards, {name: list(rows) for name, rows in outcomes.items()}, list(notes))


def metrics(rewards: Rewards) -> dict[str, float]:
    """Mean and standard deviation (Bessel's) of what is scorable, and the share that is not: of the total and of every part.

    >>> silent = lambda prompts, completions, **columns: [1.0, None, 3.0, None]
    >>> metrics(score_texts(combine({"a": silent}), [""] * 4, [""] * 4))["rewards/a/mean"]
    2.0
    """
    parts = {"reward": rewards.total} | {f"rewards/{n}": v for n, v in zip(rewards.names, rewards.values.T, strict=True)}
    result = {"rewards/failures": float(len(rewards.failures))}
    for name, values in parts.items():
        scored = values[~np.isnan(values)].astype(np.float64)
        result[f"{name}/mean"] = float(scored.mean()) if scored.size else math.nan
        result[f"{name}/std"] = float(scored.std(ddof=1)) if scored.size > 1 else 0.0
        result[f"{name}/unscorable"] = 1.0 - scored.size / max(values.size, 1)
    return result


def token_columns(rollout: Rollout) -> dict[str, list]:
    """What rewards of lengths, tokens and endings read: the columns `completion_ids` and `finished` of a rollout's B rows."""
    tokens, mask = np.asarray(rollout.tokens), np.asarray(rollout.mask)
    ids = [row[sampled].tolist() for row, sampled in zip(tokens, mask, strict=True)]
    return {"completion_ids": ids, "finished": np.asarray(rollout.finished).tolist()}


def place(rollout: Rollout, rewards: Rewards) -> Array:
    """Rewards where they are earned: per-token ones on their tokens, all others on the row's last sampled token.

    Args:
      rollout: B rows of one sequence each.
      rewards: of these rows.

    Returns: `[B, T]` float32; a row sums to its total.  0 where `mask` is False; NaN on the sampled tokens of a row whose total
    is NaN, to be left out of training (`mask & ~isnan(total)[:, None]`).

    Raises: ValueError where the rows, or a row's sampled tokens, are not those that were scored.
    """
    mask = np.asarray(rollout.mask)
    if len(mask) != len(rewards.total):
        raise ValueError(f"rewards of {len(rewards.total)} rows but a rollout of {len(mask)}")
    along = np.where(np.isnan(rewards.total), np.nan, 0.0)[:, None] * np.ones(mask.shape)
    whole = np.zeros(len(mask))
    for name, weight, values in zip(rewards.names, rewards.weights, rewards.values.T, strict=True):
        for row, numbers in enumerate(rewards.per_token.get(name, [None] * len(mask))):
            if numbers is None:
                whole[row] += weight * np.nan_to_num(values[row])
            elif len(numbers) != mask[row].sum():
                raise ValueError(f"row {row}: {name!r} rewards {len(numbers)} tokens, but {mask[row].sum()} were sampled")
            else:
                along[row, mask[row]] += weight * numbers
    return losses.token_rewards(whole.astype(np.float32), -along.astype(np.float32), mask)


async def _score(name, function, prompts, completions, columns, outcomes, notes) -> None:
    """Fills `outcomes` in place, a row at a time where need be: what is there when the time is up counts.

    An outcome is a number, an array over the sampled tokens, None, or a string: why there is none.
    """
    one_thread, at_once = asyncio.Lock(), asyncio.Semaphore(ROWS_AT_ONCE)

    async def attempt(rows: slice) -> None:
        of_rows = {key: column[rows] for key, column in columns.items()}
        returned = await _call(function, prompts[rows], completions[rows], of_rows, one_thread)
        outcomes[rows] = _outcomes(returned, of_rows, len(prompts[rows]))

    async def alone(row: int) -> None:
        async with at_once:
            try:
                await attempt(slice(row, row + 1))
            except (Exception, SystemExit) as error:
                outcomes[row] = _describe(error)

    try:
        await attempt(slice(None))
    except (Exception, SystemExit) as error:
        if isinstance(error, Unreachable) or len(prompts) < 2:
            outcomes[:] = [_describe(error)] * len(prompts)
            return
        notes.append(Failure(name, None, f"{_describe(error)}; called again row by row"))
        await asyncio.gather(*(alone(row) for row in range(len(prompts))))


async def _call(function, prompts, completions, columns, one_thread: asyncio.Lock):
    async with one_thread:  # no function of the user's meets itself in another thread
        returned, error = await asyncio.wrap_future(in_thread(function, prompts, completions, **columns))
    if error is not None:
        raise error
    return await returned if inspect.isawaitable(returned) else returned


def _outcomes(returned, columns, number: int) -> list:
    try:
        returned = list(returned)
    except TypeError:
        return [f"returned {returned!r:.80}, not a list"] * number
    if len(returned) != number:
        return [f"returned {len(returned)} rewards for {number} completions"] * number
    nothing = [None] * number
    tokens, ends = columns.get("completion_ids", nothing), columns.get("step_ends", nothing)
    return [_outcome(*row) for row in zip(returned, tokens, ends, strict=True)]


def _outcome(reward, tokens, ends) -> float | np.ndarray | str | None:
    if reward is None:
        return None
    try:
        given = np.asarray(reward)
        # V: bfloat16; O: fractions and decimals; neither text nor complex numbers
        numbers = given.astype(np.float64) if given.dtype.kind in "biufVO" and given.ndim <= 1 else None
    except (TypeError, ValueError, OverflowError):
        numbers = None
    if numbers is None:
        return f"returned {reward!r:.80}, not a number or a list of numbers"
    if not (np.abs(numbers) <= LARGEST).all():
        return f"returned {reward!r:.80}, not finite"
    return float(numbers) if numbers.ndim == 0 else _along_tokens(numbers.astype(np.float32), tokens, ends)


def _along_tokens(numbers: np.ndarray, tokens, ends) -> np.ndarray | str:
    if tokens is None:
        return f"returned {len(numbers)} numbers for a row, but there is no column completion_ids to place them by"
    if ends is not None and len(ends) == len(numbers):
        last = np.asarray(ends, np.int64) - 1
        if (np.diff(last, prepend=-1) < 1).any() or (last >= len(tokens)).any():
            return f"step_ends {list(ends)} do not ascend within the {len(tokens)} sampled tokens"
        along = np.zeros(len(tokens), np.float32)
        along[last] = numbers
        return along
    if len(numbers) == len(tokens):
        return numbers
    steps = "" if ends is None else f" in {len(ends)} steps"
    return f"returned {len(numbers)} numbers for {len(tokens)} sampled tokens{steps}"


def _collect(rewards: Combination, outcomes: dict[str, list], notes: list[Failure]) -> Rewards:
    failed = {name: [(i, o) for i, o in enumerate(rows) if isinstance(o, str)] for name, rows in outcomes.items()}
    if all(rows and len(failed[name]) == len(rows) for name, rows in outcomes.items()):
        first = "; ".join(f"{name}: {rows[0]}" for name, rows in outcomes.items())
        raise RuntimeError(f"every reward function failed on every row; on the first, {first}")
    failures = list(notes)
    for name, rows in failed.items():
        alike = len(rows) == len(outcomes[name]) and len({message for _, message in rows}) == 1
        failures += [Failure(name, None, rows[0][1])] if alike else [Failure(name, i, message) for i, message in rows]
    number = lambda o: math.nan if o is None or isinstance(o, str) else float(np.sum(o))
    values = np.array([[number(o) for o in rows] for rows in outcomes.values()], np.float32).T
    weights = np.array(list(rewards.weights.values()), np.float32)
    arrays = {name: [o if isinstance(o, np.ndarray) else None for o in rows] for name, rows in outcomes.items()}
    per_token = {name: rows for name, rows in arrays.items() if any(row is not None for row in rows)}
    total = np.asarray(losses.groups.weighted_rewards(values, weights))
    return Rewards(values, tuple(outcomes), weights, total, per_token, failures)


def _describe(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{where}"
