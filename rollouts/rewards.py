"""Rewards of texts: any number of reward functions over a batch, in which one failing call loses no
completion.

A reward function is called by keyword, as TRL calls it:
`f(prompts=…, completions=…, **columns) -> rewards`, with lists of B entries each, the columns a
dataset's or those of `token_columns`.  One without `**columns` gets those that it names.  Prompts
and completions are texts; the recipes give, where a dataset's prompts are conversations, lists of
messages, completions as `[{"role": "assistant", "content": text}]`.  It returns B numbers.  None
says that a row is not scorable.  A list in place of a number gives a reward to every sampled token,
or to every step.  It may be `async def`.  `rollouts.reward_functions` has a catalogue;
`rollouts.workers.in_worker` runs one in a process of its own, which can be ended where it hangs.
"""

import asyncio
import inspect
import math
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlhf import losses
from rlhf.fields import documented
from rlhf.rollouts.calls import GRACE, cancelled_from_outside, in_thread
from rlhf.rollouts.reward_worker import describe, listed, shown, taken
from rlhf.rollouts.types import Array, Rollout

RewardFunction = Callable[..., Any]
CONCURRENT_ROWS = 16  # awaited at a time, of an async function that is tried row by row
LARGEST = float(np.finfo(np.float32).max)
LATE = "not there after"  # how the reason of a row begins whose time was up


class Unreachable(ConnectionError):
    """Raised by a reward function when the service behind it does not respond: no row is at fault, so rows
    are not tried one by one.
    """


@documented
class Failure(NamedTuple):
    """What went wrong in a reward function.

    Attributes:
      name: of the reward.
      row: None: the call on the whole batch.
      message: what went wrong.
    """

    name: str
    row: int | None
    message: str


@documented
class Failed(NamedTuple):
    """What a reward function may return in the place of a reward that it could not make, where it
    knows why.

    Attributes:
      reason: why there is no reward.
    """

    reason: str


@documented
class Rewards(NamedTuple):
    """What `score_texts` returns, on the host.

    Attributes:
      values: [B, K] float32, NaN = not scorable; of per-token rewards the sum.
      names: K.
      weights: [K] float32.
      total: [B] float32, Σ weight · value over what is scorable; NaN where nothing is.
      per_token: name -> B of [sampled tokens] float32, for functions that return lists.
      failures: of rewards on rows.
      reasons: name -> B, what went wrong on the row; None where nothing did.
    """

    values: np.ndarray
    names: tuple[str, ...]
    weights: np.ndarray
    total: np.ndarray
    per_token: dict[str, list[np.ndarray | None]]
    failures: list[Failure]
    reasons: dict[str, list[str | None]]


@documented
class Combination(NamedTuple):
    """Reward functions and their weights; itself a reward function, of the weighted sum.

    Attributes:
      functions: name -> reward function.
      weights: name -> weight.
    """

    functions: dict[str, RewardFunction]
    weights: dict[str, float]

    def __call__(self, /, prompts, completions, **columns) -> list[float | None]:
        total = score_texts(self, prompts, completions, columns=columns).total
        return [None if np.isnan(x) else float(x) for x in total]


def combine(
    functions: Mapping[str, RewardFunction], *, weights: Mapping[str, float] | None = None
) -> Combination:
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


def missing(function: RewardFunction, given: Collection[str]) -> list[str]:
    """The parameters that a reward function needs and is not given.

    Args:
      function: a reward function, or several from `combine`.
      given: names of all that it is called with.

    >>> missing(lambda completions, solution, weight=1.0, **columns: [], ["prompts", "completions"])
    ['solution']
    """
    if isinstance(function, Combination):
        return list(
            dict.fromkeys(
                name for part in function.functions.values() for name in missing(part, given)
            )
        )
    signature = _signature(function)
    parameters = signature.parameters.values() if signature else ()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    needed = [p for p in parameters if p.default is p.empty and p.kind not in variable]
    return [p.name for p in needed if p.name not in given or p.kind is p.POSITIONAL_ONLY]


def call(function: RewardFunction, given: Mapping[str, Any]) -> Any:
    """Calls a reward function by keyword, with those of the given that it takes; all of them where
    it has `**columns`.

    >>> call(lambda completions: [len(c) for c in completions], {"prompts": ["", ""], "completions": ["a", "bc"]})
    [1, 2]
    """
    return function(**taken(_signature(function), dict(given)))


def score_texts(
    rewards: Combination | RewardFunction,
    prompts: Sequence,
    completions: Sequence,
    *,
    columns: Mapping[str, Sequence] | None = None,
    timeout: float | None = None,
) -> Rewards:
    """The rewards of B completions.  All functions run at the same time: each in a thread, async
    ones on one event loop.

    No completion is lost when a reward function fails: the value is NaN, as for None, and
    `failures` says why.  A function that raises is called again row by row, so that only the bad
    rows are lost; it should therefore score every row by itself.  A function that returns anything
    but B entries has failed on all rows, an entry that is not a finite number (or list of them) on
    its row, and what is not there in time on the rows that are missing.

    Args:
      rewards: a reward function, or several from `combine`.
      prompts, completions: B texts each, or B lists of messages.
      columns: name -> B entries, passed on by keyword to the functions that take them.  Functions
        that return lists of numbers need `completion_ids`, the sampled tokens of a row, and get a
        reward per token; where a row of `step_ends` is as long as
        its list, it gives one per step: `[3, 7]` says that the steps are the sampled tokens 0 to 2
          and 3 to 6, and each is
        rewarded at its last.
      timeout: seconds for the whole batch; None: no limit.  A thread cannot be ended: what hangs
        goes on in the background until the process ends, and what never lets go of Python's lock is
        waited for (use `workers.in_worker`).

    Returns: `Rewards`.

    Raises: ValueError where the numbers of rows differ, or a function needs what is not there;
    RuntimeError where every
      function failed on every row.

    >>> def exact(prompts, completions, *, solution, **columns):
    ...     return [float(c == s) if s else None for c, s in zip(completions, solution)]
    >>> score_texts(exact, ["2+2?", "1+2?", "?"], ["4", "4", "4"], columns={"solution": ["4", "3", ""]}).total.tolist()
    [1.0, 0.0, nan]
    """
    scores = try_texts(rewards, prompts, completions, columns=columns, timeout=timeout)
    if len(prompts) and all(None not in reasons for reasons in scores.reasons.values()):
        first = "; ".join(f"{name}: {reasons[0]}" for name, reasons in scores.reasons.items())
        raise RuntimeError(f"every reward function failed on every row; on the first, {first}")
    return scores


def try_texts(
    rewards: Combination | RewardFunction,
    prompts: Sequence,
    completions: Sequence,
    *,
    columns: Mapping[str, Sequence] | None = None,
    timeout: float | None = None,
) -> Rewards:
    """The rewards of B completions as `score_texts` gives them, but without its RuntimeError where
    every function failed on every row.

    Args:
      rewards: a reward function, or several from `combine`.
      prompts, completions: B texts each, or B lists of messages.
      columns: name -> B entries, passed on by keyword to the functions that take them.
      timeout: seconds for the whole batch; None: no limit.

    Returns: `Rewards`.

    Raises: ValueError where the numbers of rows differ, or a function needs what is not there.

    >>> try_texts(lambda completions: 1 / 0, ["2+2?"], ["4"]).total.tolist()
    [nan]
    """
    if not isinstance(rewards, Combination):
        rewards = combine({getattr(rewards, "__name__", type(rewards).__name__): rewards})
    columns = dict(columns or {})
    if reserved := {"prompts", "completions"} & columns.keys():
        raise ValueError(
            f"columns has {' and '.join(sorted(reserved))}, which are arguments of their own; give it "
            "another name"
        )
    given = {"prompts": prompts, "completions": completions, **columns}
    for name, column in given.items():
        if len(column) != len(prompts):
            raise ValueError(
                f"{name} has {len(column)} rows but prompts has {len(prompts)}; one entry a "
                "completion"
            )
    for name, function in rewards.functions.items():
        if lacking := missing(function, given):
            raise ValueError(
                f"reward {name!r} needs {', '.join(lacking)}, but there are {', '.join(given)}"
            )

    # Every row starts as late: what its function has not filled in by then stays so.
    outcomes: dict[str, list] = {
        name: [f"{LATE} {timeout} s"] * len(prompts) for name in rewards.functions
    }
    notes: list[Failure] = []

    async def run():
        scoring = [
            _score(name, function, given, outcomes[name], notes)
            for name, function in rewards.functions.items()
        ]
        # Returns at the time limit; what still runs, `asyncio.run` cancels.
        await asyncio.wait([asyncio.create_task(s) for s in scoring], timeout=timeout)

    # a thread of its own: the caller may be inside an event loop, and an async function that blocks
    # must not hold it for ever
    thread = threading.Thread(target=lambda: asyncio.run(run()), daemon=True)
    thread.start()
    thread.join(None if timeout is None else timeout + GRACE)
    # Copies, since a thread that is late may still write into the lists.
    return _collect(rewards, {name: list(rows) for name, rows in outcomes.items()}, list(notes))


def metrics(rewards: Rewards) -> dict[str, float]:
    """Mean and standard deviation (Bessel's) of what is scorable, and the share that is not: of the
    total and of every part.

    Of every part also `rewards/NAME/failures`, the rows on which something went wrong, and those of
    them whose time was up, `rewards/NAME/timeouts`.

    >>> silent = lambda prompts, completions, **columns: [1.0, None, 3.0, None]
    >>> metrics(score_texts(combine({"a": silent}), [""] * 4, [""] * 4))["rewards/a/mean"]
    2.0
    """
    parts = {"reward": rewards.total} | {
        f"rewards/{n}": v for n, v in zip(rewards.names, rewards.values.T, strict=True)
    }
    result = {"rewards/failures": float(len(rewards.failures))}
    for name, reasons in rewards.reasons.items():
        with_reason = [reason for reason in reasons if reason is not None]
        result[f"rewards/{name}/failures"] = float(len(with_reason))
        result[f"rewards/{name}/timeouts"] = float(
            sum(reason.startswith(LATE) for reason in with_reason)
        )
    for name, values in parts.items():
        scored = values[~np.isnan(values)].astype(np.float64)
        result[f"{name}/mean"] = float(scored.mean()) if scored.size else math.nan
        result[f"{name}/std"] = float(scored.std(ddof=1)) if scored.size > 1 else 0.0
        result[f"{name}/unscorable"] = 1.0 - scored.size / max(values.size, 1)
    return result


def joined(parts: Sequence[Rewards]) -> Rewards:
    """The rewards of parts of a batch, by the same functions, as those of all its rows.

    >>> length = lambda completions: [float(len(c)) for c in completions]
    >>> joined([score_texts(length, ["?"], ["a"]), score_texts(length, ["?"], ["bc"])]).total.tolist()
    [1.0, 2.0]
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    sizes = [len(part.total) for part in parts]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    failures = [
        failure._replace(row=None if failure.row is None else failure.row + start)
        for part, start in zip(parts, starts, strict=True)
        for failure in part.failures
    ]
    per_token: dict[str, list[np.ndarray | None]] = {
        name: [
            row
            for part, size in zip(parts, sizes, strict=True)
            for row in part.per_token.get(name, [None] * size)
        ]
        for name in dict.fromkeys(name for part in parts for name in part.per_token)
    }
    return first._replace(
        values=np.concatenate([part.values for part in parts]),
        total=np.concatenate([part.total for part in parts]),
        per_token=per_token,
        failures=failures,
        reasons={name: [r for part in parts for r in part.reasons[name]] for name in first.reasons},
    )


def token_columns(rollout: Rollout) -> dict[str, list]:
    """What rewards of lengths, tokens and endings read: the columns `completion_ids` and `finished`
    of a rollout's B rows.
    """
    tokens = np.asarray(rollout.tokens)
    mask = np.asarray(rollout.mask)
    ids = [row[sampled].tolist() for row, sampled in zip(tokens, mask, strict=True)]
    return {"completion_ids": ids, "finished": np.asarray(rollout.finished).tolist()}


def place(rollout: Rollout, rewards: Rewards) -> Array:
    """Rewards where they are earned: per-token ones on their tokens, all others on the row's last
    sampled token.

    Args:
      rollout: B rows of one sequence each.
      rewards: of these rows.

    Returns: `[B, T]` float32; a row sums to its total.  0 where `mask` is False; NaN on the sampled
    tokens of a row whose total is NaN, to be left out of training
    (`mask & ~isnan(total)[:, None]`).

    Raises: ValueError where the rows, or a row's sampled tokens, are not those that were scored.
    """
    mask = np.asarray(rollout.mask)
    if len(mask) != len(rewards.total):
        raise ValueError(f"rewards of {len(rewards.total)} rows but a rollout of {len(mask)}")
    # NaN along a whole row that has no total: a mask must leave it out, 0 would train it.
    along = np.where(np.isnan(rewards.total), np.nan, 0.0)[:, None] * np.ones(mask.shape)
    on_last = np.zeros(len(mask))
    for name, weight, values in zip(rewards.names, rewards.weights, rewards.values.T, strict=True):
        for row, numbers in enumerate(rewards.per_token.get(name, [None] * len(mask))):
            if numbers is None:
                on_last[row] += weight * np.nan_to_num(values[row])
            elif len(numbers) != mask[row].sum():
                raise ValueError(
                    f"row {row}: {name!r} rewards {len(numbers)} tokens, but {mask[row].sum()} "
                    "were sampled"
                )
            else:
                along[row, mask[row]] += weight * numbers
    return losses.token_rewards(on_last.astype(np.float32), -along.astype(np.float32), mask)


class _Raised(Exception):
    """What a function raised, whatever it was: an exit or an exception of its own kind must not end
    the event loop.
    """

    def __init__(self, error: BaseException):
        super().__init__(describe(error))
        self.unreachable = isinstance(error, Unreachable)


async def _score(name, function, given, outcomes, notes) -> None:
    """Fills `outcomes` in place, a row at a time where need be: what is there when the time is up
    counts.

    An outcome is a number, an array over the sampled tokens, None, or a string: why there is none.
    """
    one_thread = asyncio.Lock()
    concurrent = asyncio.Semaphore(CONCURRENT_ROWS)

    async def attempt(rows: slice) -> None:
        of_rows = {key: column[rows] for key, column in given.items()}
        number = len(outcomes[rows])
        returned = await _call(function, of_rows, number, one_thread)
        try:
            outcomes[rows] = _outcomes(returned, of_rows, number)
        # Reading an entry may run code of a user's class, such as `__array__` or `__float__`.
        except BaseException as error:
            raise _Raised(error) from None

    async def alone(row: int) -> None:
        async with concurrent:
            try:
                await attempt(slice(row, row + 1))
            except _Raised as raised:
                outcomes[row] = str(raised)

    try:
        await attempt(slice(None))
    except _Raised as raised:
        # Row by row would ask an unreachable service once for each row, and a single row is tried
        # already.
        if raised.unreachable or len(outcomes) < 2:
            outcomes[:] = [str(raised)] * len(outcomes)
            return
        notes.append(Failure(name, None, f"{raised}; called again row by row"))
        await asyncio.gather(*(alone(row) for row in range(len(outcomes))))


async def _call(function, given, number: int, one_thread: asyncio.Lock):
    """What a function returns for `number` rows: a list, if it can be one."""

    def in_its_thread():
        returned = call(function, given)
        # A generator runs only when it is listed: in this thread, not on the event loop.
        return returned if inspect.isawaitable(returned) else listed(returned, number)

    # A function is never in two threads at a time: users do not write for that.
    async with one_thread:
        returned, error = await asyncio.wrap_future(in_thread(in_its_thread))
    if error is None:
        try:
            return listed(await returned, number) if inspect.isawaitable(returned) else returned
        except BaseException as raised:
            if cancelled_from_outside(raised):
                raise
            error = raised
    raise _Raised(error)


def _outcomes(returned, given, number: int) -> list:
    if not isinstance(returned, list):
        return [f"returned {shown(returned)}, not a list"] * number
    if len(returned) != number:
        many = f"more than {number}" if len(returned) > number else len(returned)
        return [f"returned {many} rewards for {number} completions"] * number
    nothing = [None] * number
    tokens = given.get("completion_ids", nothing)
    ends = given.get("step_ends", nothing)
    return [_outcome(*row) for row in zip(returned, tokens, ends, strict=True)]


def _outcome(reward, tokens, ends) -> float | np.ndarray | str | None:
    if reward is None:
        return None
    if isinstance(reward, Failed):
        return reward.reason
    try:
        given = np.asarray(reward)
        # V: bfloat16; O: fractions and decimals; neither text nor complex numbers
        numbers = (
            given.astype(np.float64) if given.dtype.kind in "biufVO" and given.ndim <= 1 else None
        )
    except (TypeError, ValueError, OverflowError):
        numbers = None
    if numbers is None:
        return f"returned {shown(reward)}, not a number or a list of numbers"
    # Not >, since a comparison with NaN is False: this catches NaN and infinity alike.
    if not (np.abs(numbers) <= LARGEST).all():
        return f"returned {shown(reward)}, not finite"
    return (
        float(numbers)
        if numbers.ndim == 0
        else _along_tokens(numbers.astype(np.float32), tokens, ends)
    )


def _along_tokens(numbers: np.ndarray, tokens, ends) -> np.ndarray | str:
    if tokens is None:
        return f"returned {len(numbers)} numbers for a row, but there is no column completion_ids to place them by"
    if ends is not None and len(ends) == len(numbers):
        # A step is rewarded at its last token.
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


def _signature(function: RewardFunction) -> inspect.Signature | None:
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        # Some functions that are written in C have no signature.
        return None


def _collect(rewards: Combination, outcomes: dict[str, list], notes: list[Failure]) -> Rewards:
    reasons = {
        name: [o if isinstance(o, str) else None for o in rows] for name, rows in outcomes.items()
    }
    failures = list(notes)
    for name, rows in reasons.items():
        with_reason = [
            Failure(name, row, reason) for row, reason in enumerate(rows) if reason is not None
        ]
        # One failure for the batch says more than the same one for each row.
        alike = len(with_reason) == len(rows) and len(set(rows)) == 1
        failures += [with_reason[0]._replace(row=None)] if alike else with_reason
    number = lambda o: math.nan if o is None or isinstance(o, str) else float(np.sum(o))
    values = np.array([[number(o) for o in rows] for rows in outcomes.values()], np.float32).T
    weights = np.array(list(rewards.weights.values()), np.float32)
    arrays = {
        name: [o if isinstance(o, np.ndarray) else None for o in rows]
        for name, rows in outcomes.items()
    }
    per_token = {
        name: rows for name, rows in arrays.items() if any(row is not None for row in rows)
    }
    total = np.asarray(losses.groups.weighted_rewards(values, weights))
    return Rewards(values, tuple(outcomes), weights, total, per_token, failures, reasons)
