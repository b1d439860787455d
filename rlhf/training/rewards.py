"""Rewards of completions: reward functions on texts, reward models, a generated task's own
score.
"""

import ast
import inspect
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import hosts, losses, rollouts, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.rollouts import Rollout, reward_functions, rewards
from rlhf.rollouts.rewards import Rewards
from rlhf.rollouts.workers import CallFailed, InWorker, Worker, in_worker
from rlhf.training import datasets, reward_models
from rlhf.training.interrupts import Stopped
from rlhf.training.options import RewardOptions, SourceOptions

REWARDS = {
    "accuracy": reward_functions.numeric_accuracy,
    "exact": reward_functions.exact_accuracy,
    "reasoning_accuracy": reward_functions.reasoning_accuracy(),
    "think_format": reward_functions.think_format,
    "length": reward_functions.length,
}
MAKERS = {  # written with their arguments, as in soft_overlong(max_length=256, cache=64)
    "soft_overlong": reward_functions.soft_overlong,
    "repetition_penalty": reward_functions.repetition_penalty,
    "cosine_scaled": reward_functions.cosine_scaled,
    "regex_format": reward_functions.regex_format,
    "missing_end": reward_functions.missing_end,
}
MATH = "math"  # `reward_functions.math_accuracy`, in a process of its own
# Columns that every rollout gives to reward functions, beside those of the rows.
OURS = ("completion_ids", "finished")
# Steps over which failures and equal rewards are counted: one bad batch alone ends no run.
RECENT = 10


def load(
    options: RewardOptions, source: SourceOptions, tokenizer: Any, *prompt_rows: Sequence[Row]
) -> "RewardScorer":
    """What scores completions of these prompts; reward models are loaded once all is checked.

    Where something else rewards the completions of a generated task, its own score is the metric
    `task_score`.

    Args:
      options: the rewards.
      source: of the prompts.
      tokenizer: the policy's.
      prompt_rows: rows to train on and held-out rows, whose columns the rewards read.

    Raises: ValueError for a reward that is not known or cannot be imported, a column that it needs
    and the rows lack, and a
      model that is no reward model.
    """
    task_score: Any = jax.jit(_score_of(tasks.find(source.task))) if source.task else None
    given = options.named()
    if not given and task_score is None:
        known = f"{', '.join([*REWARDS, MATH])}, the folder of a reward model, or module:function"
        raise ValueError(
            f"reward is not given; for files, and for several datasets, choose from {known}"
        )
    weights = dict(zip(given, options.reward_weights or [1.0] * len(given), strict=True))
    models = {
        name
        for name, one in given.items()
        if isinstance(one, tuple) or (isinstance(one, str) and is_model(one))
    }
    functions = {
        name: function(one, options.reward_timeout)
        for name, one in given.items()
        if name not in models
    }
    # Functions before reward models: those load for minutes, and a wrong name is found at once.
    for name, reward in functions.items():
        _check(name, reward, prompt_rows)
        # Named functions are ours, or run in a worker that checks what they return.
        if not isinstance(given[name], str):
            _try(name, reward, prompt_rows[0], options.reward_timeout)
    found = {name: reward_models.find(given[name], tokenizer) for name in given if name in models}
    of_models = [(weights[name], reward_models.load(model)) for name, model in found.items()]
    of_texts = (
        rewards.combine(functions, weights={name: weights[name] for name in functions})
        if functions
        else None
    )
    return RewardScorer(options, tokenizer, of_models, of_texts, task_score)


@documented
class Rewarded(NamedTuple):
    """The rewards of a batch of completions.

    Attributes:
      rewards: [B] float32, NaN: could not be scored.
      metrics: to be logged.
      reasons: B, what went wrong with a completion's rewards; None: nothing.
    """

    rewards: Any
    metrics: dict[str, Any]
    reasons: list[str | None]


class RewardScorer:
    """`(rollout, columns, num_samples) -> Rewarded` for the completions of a step; `load` makes it.

    `columns` are those of the prompts' rows, their own `prompt` among them.

    Raises: when called, Stopped where a reward fails on too many completions.
    """

    def __init__(
        self,
        options: RewardOptions,
        tokenizer: Any,
        models: list,
        texts: rewards.Combination | None,
        task_score: Callable | None,
    ):
        self._options = options
        self._tokenizer = tokenizer
        self._models = models
        self._texts = texts
        self._task_score = task_score
        # A step: name -> completions that failed, all completions.
        self._failed: deque[dict[str, tuple[int, int]]] = deque(maxlen=RECENT)

    def __call__(self, rollout: Rollout, columns: Mapping[str, list], num_samples: int) -> Rewarded:
        found = [(weight, *model(rollout, columns, num_samples)) for weight, model in self._models]
        reasons: list[str | None] = [None] * len(rollout.tokens)
        if self._texts is not None:
            timeout = _timeout(self._options, self._texts.functions)
            scored = _scored(self._texts, self._tokenizer, rollout, columns, num_samples, timeout)
            self._count_failures(scored)
            reasons = [_joined(scored.reasons, row) for row in range(len(reasons))]
            of_texts = {
                name: value
                for name, value in rewards.metrics(scored).items()
                if name.startswith("rewards/")
            }
            found.append((1.0, scored.total, of_texts))
        if self._task_score is not None and not found:
            # No weight and no metrics: it is the only reward, which is logged as `reward`.
            found = [(1.0, self._task_score(rollout), {})]
        # `[B, rewards]`; a completion that one of them could not score has no total (NaN).
        # On the host from here on: small numbers, and on a mesh every operation by itself would be a
        # program with collectives of its own.
        scores = jnp.stack([np.asarray(hosts.fetch(values)) for _, values, _ in found], axis=1)
        total = losses.groups.weighted_rewards(
            scores, jnp.array([weight for weight, _, _ in found])
        )
        if (clip := self._options.reward_clip) is not None:
            total = jnp.clip(total, -clip, clip)
        # After clipping: a penalty beyond the bound still counts.
        total = total - self._options.missing_end_penalty * ~np.asarray(rollout.finished)
        metrics = {"reward": jnp.nanmean(total)}
        for _, _, of_part in found:
            metrics |= of_part
        if self._task_score and (self._models or self._texts):
            metrics["task_score"] = np.asarray(hosts.fetch(self._task_score(rollout))).mean()
        return Rewarded(total, metrics, reasons)

    def _count_failures(self, scored: Rewards) -> None:
        """Raises where a reward failed on more of the last steps' completions than it may."""
        rows = {
            name: sum(reason is not None for reason in reasons)
            for name, reasons in scored.reasons.items()
        }
        self._failed.append({name: (failed, len(scored.total)) for name, failed in rows.items()})
        for name, reasons in scored.reasons.items():
            # Counted over the last steps together, not step by step: small batches vary.
            failed, number = np.sum([step[name] for step in self._failed], axis=0)
            if failed > self._options.max_reward_failures * number:
                first = next(
                    (reason for reason in reasons if reason is not None), "see the samples"
                )
                share = (
                    "every completion" if failed == number else f"{failed} of {number} completions"
                )
                steps = f" in the last {len(self._failed)} steps" if len(self._failed) > 1 else ""
                bound = f"--max_reward_failures is {self._options.max_reward_failures:g}"
                raise Stopped(f"reward {name!r} failed on {share}{steps}: {first}; {bound}")


class EqualRewards:
    """Says on stderr, once, where nothing can be learned since the rewards of the last steps are all
    equal; called with every step's.
    """

    def __init__(self) -> None:
        # Left on the device: fetching each would make the host wait at every step.
        self._recent: list[Any] = []
        self._has_warned = False

    def __call__(self, scores: Any, num_samples: int) -> None:
        """Takes the rewards of a step, `[B]`, a prompt's contiguous."""
        if self._has_warned:
            return
        self._recent.append(scores)
        if len(self._recent) == RECENT:
            self._warn_if_equal(
                [np.asarray(of_step).reshape(-1, num_samples) for of_step in self._recent]
            )

    def _warn_if_equal(self, recent: list[np.ndarray]) -> None:
        self._recent.clear()
        scored = [group[~np.isnan(group)] for groups in recent for group in groups]
        values = np.concatenate(scored)
        # With one sample a prompt, completions of different prompts are compared with each other.
        groups = scored if recent[0].shape[1] > 1 else [values]
        if any(np.ptp(group) > 0 for group in groups if group.size):
            return
        self._has_warned = True
        if not hosts.is_first():
            return
        if not values.size:
            what = "no completion could be scored"
        elif np.ptp(values) == 0:
            what = f"every reward was {values[0]:g}"
        else:
            what = "all completions of a prompt had the same reward"
        print(
            f"{what} in the last {RECENT} steps: there is nothing to learn from that",
            file=sys.stderr,
        )


def _score_of(task: Any) -> Callable:
    """A task's score, which reads prompts beside the completions, also where an encoder has read
    them.
    """

    def score(rollout: Rollout) -> Any:
        return task.score(rollouts.joined(rollout))

    return score


def is_model(name: str) -> bool:
    """Whether a reward's name is a folder's or the Hub's."""
    # `module:function` and `maker(…)` are functions; all else with a slash is a path or a Hub name.
    return not name.endswith(")") and ":" not in name and ("/" in name or Path(name).is_dir())


def function(given: str | Callable, timeout: float) -> Callable:
    """A reward of `REWARDS`, or in a process of its own math checking, or one of yours as
    module:function or file.py:function.

    A function that is given as such runs in this process.

    Raises: ValueError for one that is not there.
    """
    if not isinstance(given, str):
        return given
    name = given
    if name == MATH:
        try:
            return in_worker(reward_functions.math_accuracy(), timeout=timeout)
        except ImportError as error:
            raise ValueError(f"reward {name}: {error}") from None
    if name.endswith(")"):
        return _from_call(name)
    module, colon, inside = name.partition(":")
    if not colon and name.endswith(".py"):
        raise ValueError(f"reward {name!r} names a file; write {name}:function")
    if not colon and name not in REWARDS and "." in name:
        # `package.module.function` is Python's own way to write it: the message shows ours.
        module, _, inside = name.rpartition(".")
        raise ValueError(
            f"reward {name!r} is not known; a function of your own is module:function, so that "
            f"here: {module}:{inside}"
        )
    if not colon:
        try:
            return datasets.named(name, dict.fromkeys([*REWARDS, MATH]) | REWARDS, "reward")
        except ValueError as error:
            raise ValueError(
                f"{error}; a function of your own is module:function or file.py:function"
            ) from None
    if not (module.strip() and inside.strip()):
        raise ValueError(f"reward {name!r} names no function; write module:function")
    return in_worker(name, timeout=timeout)


def _from_call(call: str) -> Callable:
    """The reward that a text such as `soft_overlong(max_length=256, cache=64)` describes.

    Raises: ValueError for a text of another form, one of `MAKERS` that is not there, and arguments
    that it refuses.
    """
    name, _, arguments = call.removesuffix(")").partition("(")
    maker = datasets.named(name, MAKERS, "reward")
    try:
        # Parsed and never evaluated: a config file must not run code.
        parsed = ast.parse(f"f({arguments})", mode="eval").body
        if not isinstance(parsed, ast.Call) or parsed.args:
            raise ValueError("arguments are written as name=value")
        given = {str(word.arg): ast.literal_eval(word.value) for word in parsed.keywords}
        return maker(**given)
    except (SyntaxError, TypeError, ValueError) as error:
        known = ", ".join(inspect.signature(maker).parameters)
        raise ValueError(f"reward {call!r}: {error}; arguments of {name} are {known}") from None


def preference(name: str, timeout: float) -> Callable:
    """`(prompts, completions, others) -> [B]` float, who wins, by a function module:function in a
    process of its own.

    Raises: ValueError for one that is not there; where called, for what it raises, and returns
    beside B numbers from 0 to 1.
    """
    if not all(name.rpartition(":")[::2]):
        raise ValueError(f"preference {name!r} names no function; write module:function")
    # In a process of its own: a user's function may hang, crash or print.
    worker = Worker(name)
    try:
        worker.signature()
    except ValueError as error:
        raise ValueError(f"preference {error}") from None

    def prefer(*texts: list[str]) -> np.ndarray:
        number = len(texts[0])
        try:
            found = worker.call(number, timeout, texts)
        except CallFailed as failure:
            raise ValueError(f"preference {name}: {failure}") from None
        if not isinstance(found, list) or len(found) != number:
            raise ValueError(
                f"preference {name} returned {found!r:.80} for {number} completions; give a number each"
            )
        for value in found:
            if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(
                    f"preference {name} returned {value!r:.80}, which is no number from 0 to 1"
                )
        return np.array([np.nan if value is None else value for value in found], float)

    return prefer


def _check(name: str, reward: Callable, prompt_rows: Sequence[Sequence[Row]]) -> None:
    """Raises what would be raised of every row, before a model is there."""
    if isinstance(reward, InWorker):
        try:
            reward.load()
        except ValueError as error:
            raise ValueError(f"reward {error}") from None
    for rows in filter(None, prompt_rows):
        columns = dict.fromkeys(
            key for row in rows for key in row if key not in ("prompt", "completion")
        )
        for taken in ("prompts", "completions", *OURS):
            # Reward functions get columns as keyword arguments: two of one name would be one lost.
            if taken in columns:
                raise ValueError(
                    f"rewards are given {taken} of the sampled completions, but the rows have a "
                    f"column {taken} of their own; "
                    f"rename it, as in --columns '{{{taken}: another}}'"
                )
        given = ["prompts", "completions", *OURS, *columns]
        if lacking := rewards.missing(reward, given):
            near = get_close_matches(lacking[0], columns, n=1)
            hint = near[0] if near else next(iter(columns), "COLUMN")
            raise ValueError(
                f"reward {name!r} needs {', '.join(lacking)}, but it is given {', '.join(given)}; "
                f"name a column so, as in --columns '{{{hint}: {lacking[0]}}}'"
            )


def _try(name: str, reward: Callable, rows: Sequence[Row], timeout: float) -> None:
    """Calls a function from Python on the first rows, so that one that returns too few or too many
    numbers is found before a model loads.

    What it raises there is no error: completions are empty, and it may have reason to refuse those.
    """
    # Two rows: a function that returns one number for all of them is found as well.
    tried = rows[:2]
    columns = {
        key: [row[key] for row in tried] for key in tried[0] if key not in ("prompt", "completion")
    }
    given = columns | {"completion_ids": [[]] * len(tried), "finished": [True] * len(tried)}
    prompts = [row["prompt"] for row in tried]
    empty = [
        "" if isinstance(prompt, str) else [{"role": "assistant", "content": ""}]
        for prompt in prompts
    ]
    scored = rewards.try_texts(
        rewards.combine({name: reward}), prompts, empty, columns=given, timeout=timeout
    )
    reason = scored.reasons[name][0]
    if reason is not None and reason.startswith("returned"):
        raise ValueError(f"reward {name!r} {reason}; give one number a completion")


def _scored(
    functions: rewards.Combination,
    tokenizer: Any,
    rollout: Rollout,
    columns: Mapping[str, list],
    num_samples: int,
    timeout: float | None,
) -> Rewards:
    """Rewards of texts; where prompts are conversations, of lists of messages, as TRL has it.

    Of several processes each judges its share of the prompts, all completions of a prompt together,
    and is told the others': no row is judged twice, which costs, and by chance gives two answers.
    """
    rows = reward_models.texts_of(tokenizer, rollout, columns, num_samples)
    prompts = [row["prompt"] for row in rows]
    completions = [row["completion"] for row in rows]
    repeated = {
        name: [value for value in column for _ in range(num_samples)]
        for name, column in columns.items()
        if name != "prompt"
    }
    given = repeated | rewards.token_columns(rollout)

    def of_share(which: slice) -> list[Rewards]:
        part = slice(which.start * num_samples, which.stop * num_samples)
        columns = {name: values[part] for name, values in given.items()}
        return [
            rewards.try_texts(
                functions, prompts[part], completions[part], columns=columns, timeout=timeout
            )
        ]

    return rewards.joined(hosts.shared(of_share, len(rows) // num_samples))


def _timeout(options: RewardOptions, functions: Mapping[str, Callable]) -> float | None:
    """Seconds for a step's completions where a function was given from Python; workers keep to
    their own.
    """
    # Functions by name run in workers, which have limits; those from Python run here.
    if all(isinstance(one, str) for one in options.named().values()):
        return None
    has_workers = any(isinstance(one, InWorker) for one in functions.values())
    # A worker tries a batch that failed again, row by row, each within its own limit.
    return options.reward_timeout * (3 if has_workers else 1)


def _joined(reasons: Mapping[str, Sequence[str | None]], row: int) -> str | None:
    known = [f"{name}: {rows[row]}" for name, rows in reasons.items() if rows[row] is not None]
    return "; ".join(known) or None
