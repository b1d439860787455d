"""What answers are worth: reward functions on texts, reward models, a generated task's own score."""

import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf import losses, rollouts, tasks
from rlhf.data.types import Row
from rlhf.fields import documented
from rlhf.interrupts import Stopped
from rlhf.ranges import at_least, between, check_fields
from rlhf.recipes import reward_models, setup
from rlhf.rollouts import Rollout, reward_functions, rewards
from rlhf.rollouts.rewards import Rewards
from rlhf.rollouts.workers import CallFailed, InWorker, Worker, in_worker

REWARDS = {
    "accuracy": reward_functions.numeric_accuracy,
    "exact": reward_functions.exact_accuracy,
    "reasoning_accuracy": reward_functions.reasoning_accuracy(),
    "think_format": reward_functions.think_format,
    "length": reward_functions.length,
}
MATH = "math"  # `reward_functions.math_accuracy`, in a process of its own
OURS = ("completion_ids", "finished")  # columns of every rollout
RECENT = 10  # steps


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What answers are worth.

    Args:
      reward: accuracy, exact, math (by math-verify), reasoning_accuracy, think_format, length, the folder of a reward model,
        which reads texts where its tokenizer is another than the policy's, or a function of your own as module:function; null
        for a generated task's own score.
      reward_weights: of each reward; null: 1 each.
      reward_clip: rewards are cut to ± this; null: they are not.
      missing_end_penalty: what an answer loses that was cut before its end.
      reward_timeout: seconds that a function of your own, or math, has for a step's answers; then its process is ended.
      max_reward_failures: the run stops where a reward fails on a larger share of the last 10 steps' answers.
    """

    reward: Annotated[list[str], at_least(1)] | None = None
    reward_weights: Annotated[list[Annotated[float, between(-1000, 1000)]], at_least(1)] | None = None
    reward_clip: Annotated[float, between(0, 1_000_000, above=True)] | None = None
    missing_end_penalty: Annotated[float, between(0, 1_000_000)] = 0.0
    reward_timeout: Annotated[float, between(0, 86_400, above=True)] = 60.0
    max_reward_failures: Annotated[float, between(0, 1)] = 0.5

    def __post_init__(self):
        check_fields(self)

    def judge(self, source: setup.Source, tokenizer: Any, *questions: Sequence[Row]) -> "Judge":
        """What judges answers to these questions; reward models are loaded once all is checked.

        Where something else rewards the answers to a generated task, its own score is the figure `task_score`.

        Raises: ValueError for a reward that is not known or cannot be imported, a column that it needs and the questions lack,
          and a model that is no reward model.
        """
        own: Any = jax.jit(_of_task(tasks.find(source.dataset))) if source.generated else None
        names = self.reward or []
        if not names and own is None:
            known = f"{', '.join([*REWARDS, MATH])}, the folder of a reward model, or module:function"
            raise ValueError(f"reward is not given; for files, and for several datasets, choose from {known}")
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"reward names {', '.join(twice)} twice; give it once, and a weight")
        weights = self.reward_weights or [1.0] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} rewards but {len(weights)} reward_weights; give one each")
        weighted = dict(zip(names, weights, strict=True))
        functions = {name: function(name, self.reward_timeout) for name in names if not is_model(name)}
        for name, reward in functions.items():
            _check(name, reward, questions)
        found = {name: reward_models.find(name, tokenizer) for name in names if is_model(name)}
        models = [(weighted[name], reward_models.judge(model)) for name, model in found.items()]
        texts = rewards.combine(functions, weights={name: weighted[name] for name in functions}) if functions else None
        return Judge(self, tokenizer, models, texts, own)


@documented
class Judged(NamedTuple):
    """What a batch of answers is worth.

    Attributes:
      rewards: [B] float32, NaN: could not be scored.
      figures: to be logged.
      reasons: B, what went wrong with an answer's rewards.
    """

    rewards: Any
    figures: dict[str, Any]
    reasons: list[str | None]


class Judge:
    """`(rollout, columns, samples a prompt) -> (rewards [B], figures)` for the answers of a step; `Scoring.judge` makes it.

    `columns` are those of the prompts' rows, their own `prompt` among them.  It says on stderr, once, where nothing is learnt
    because all rewards are equal.
    """

    def __init__(self, scoring: Scoring, tokenizer: Any, models: list, texts: rewards.Combination | None, own: Any):
        self._scoring, self._tokenizer = scoring, tokenizer
        self._models, self._texts, self._own = models, texts, own
        self._failed: deque[dict[str, tuple[int, int]]] = deque(maxlen=RECENT)  # name -> failed answers, answers
        self._totals: list = []  # of the steps since they were looked at, on the device
        self._told = False

    def __call__(self, rollout: Rollout, columns: Mapping[str, list], samples: int) -> tuple[Any, dict[str, Any]]:
        judged = self.explained(rollout, columns, samples)
        if not self._told:
            self._totals.append(judged.rewards)
            if len(self._totals) == RECENT:
                self._tell([np.asarray(total).reshape(-1, samples) for total in self._totals])
        return judged.rewards, judged.figures

    def explained(self, rollout: Rollout, columns: Mapping[str, list], samples: int) -> Judged:
        """The same, and why answers have no reward.

        Raises: Stopped where a reward fails on too many answers.
        """
        found = [(weight, *part(rollout, columns, samples)) for weight, part in self._models]
        reasons: list[str | None] = [None] * len(rollout.tokens)
        if self._texts is not None:
            scored = _scored(self._texts, self._tokenizer, rollout, columns, samples)
            self._count(scored)
            reasons = [_joined(scored.reasons, row) for row in range(len(reasons))]
            told = {name: value for name, value in rewards.metrics(scored).items() if name.startswith("rewards/")}
            found.append((1.0, scored.total, told))
        if not found:
            found = [(1.0, self._own(rollout), {})]
        scores = jnp.stack([jnp.asarray(values) for _, values, _ in found], axis=1)
        total = losses.groups.weighted_rewards(scores, jnp.array([weight for weight, _, _ in found]))
        if (clip := self._scoring.reward_clip) is not None:
            total = jnp.clip(total, -clip, clip)
        total = total - self._scoring.missing_end_penalty * ~rollout.finished
        figures = {"reward": jnp.nanmean(total)} | {k: v for *_, told in found for k, v in told.items()}
        if self._own and (self._models or self._texts):
            figures["task_score"] = self._own(rollout).mean()
        return Judged(total, figures, reasons)

    def _count(self, scored: Rewards) -> None:
        """Raises where a reward failed on more of the last steps' answers than it may."""
        rows = {name: sum(reason is not None for reason in reasons) for name, reasons in scored.reasons.items()}
        self._failed.append({name: (failed, len(scored.total)) for name, failed in rows.items()})
        for name, reasons in scored.reasons.items():
            failed, number = np.sum([step[name] for step in self._failed], axis=0)
            if failed > self._scoring.max_reward_failures * number:
                first = next((reason for reason in reasons if reason is not None), "see the samples")
                share = "every answer" if failed == number else f"{failed} of {number} answers"
                steps = f" in the last {len(self._failed)} steps" if len(self._failed) > 1 else ""
                bound = f"--max_reward_failures is {self._scoring.max_reward_failures:g}"
                raise Stopped(f"reward {name!r} failed on {share}{steps}: {first}; {bound}")

    def _tell(self, totals: list[np.ndarray]) -> None:
        self._totals.clear()
        scored = [group[~np.isnan(group)] for groups in totals for group in groups]
        values = np.concatenate(scored)
        groups = scored if totals[0].shape[1] > 1 else [values]
        if any(np.ptp(group) > 0 for group in groups if group.size):
            return
        self._told = True
        if not values.size:
            what = "no answer could be scored"
        elif np.ptp(values) == 0:
            what = f"every reward was {values[0]:g}"
        else:
            what = "all answers to a prompt had the same reward"
        print(f"{what} in the last {RECENT} steps: there is nothing to learn from that", file=sys.stderr)


def _of_task(task: Any) -> Callable:
    """A task's score, which reads prompts beside the answers, also where an encoder has read them."""
    return lambda rollout: task.score(rollouts.joined(rollout))


def is_model(name: str) -> bool:
    """Whether a reward's name is a folder's or the Hub's."""
    return ":" not in name and ("/" in name or Path(name).is_dir())


def function(name: str, timeout: float) -> Callable:
    """A reward of `REWARDS`, or in a process of its own math checking, or one of yours as module:function.

    Raises: ValueError for one that is not there.
    """
    if name == MATH:
        try:
            return in_worker(reward_functions.math_accuracy(), timeout=timeout)
        except ImportError as error:
            raise ValueError(f"reward {name}: {error}") from None
    module, colon, inside = name.partition(":")
    if not colon and name not in REWARDS and "." in name:
        module, _, inside = name.rpartition(".")
        raise ValueError(
            f"reward {name!r} is not known; a function of your own is module:function, so that here: {module}:{inside}"
        )
    if not colon:
        return setup.named(name, dict.fromkeys([*REWARDS, MATH]) | REWARDS, "reward")
    if not (module.strip() and inside.strip()):
        raise ValueError(f"reward {name!r} names no function; write module:function")
    return in_worker(name, timeout=timeout)


def preference(name: str, timeout: float) -> Callable:
    """`(prompts, answers, other answers) -> [B]` float, who wins, by a function module:function in a process of its own.

    Raises: ValueError for one that is not there; where called, for what it raises, and returns beside B numbers from 0 to 1.
    """
    if not all(name.rpartition(":")[::2]):
        raise ValueError(f"judge {name!r} names no function; write module:function")
    worker = Worker(name)
    try:
        worker.signature()
    except ValueError as error:
        raise ValueError(f"judge {error}") from None

    def prefer(*texts: list[str]) -> np.ndarray:
        number = len(texts[0])
        try:
            found = worker.call(number, timeout, texts)
        except CallFailed as failure:
            raise ValueError(f"judge {name}: {failure}") from None
        if not isinstance(found, list) or len(found) != number:
            raise ValueError(f"judge {name} returned {found!r:.80} for {number} answers; give a number each")
        for value in found:
            if value is not None and not (isinstance(value, int | float) and 0 <= value <= 1):
                raise ValueError(f"judge {name} returned {value!r:.80}, which is no number from 0 to 1")
        return np.array([np.nan if value is None else value for value in found], float)

    return prefer


def _check(name: str, reward: Callable, questions: Sequence[Sequence[Row]]) -> None:
    """Raises what would be raised of every row, before a model is there."""
    if isinstance(reward, InWorker):
        try:
            reward.load()
        except ValueError as error:
            raise ValueError(f"reward {error}") from None
    for rows in filter(None, questions):
        columns = dict.fromkeys(key for row in rows for key in row if key not in ("prompt", "completion"))
        for taken in ("prompts", "completions", *OURS):
            if taken in columns:
                raise ValueError(
                    f"rewards are given {taken} of the sampled answers, but the rows have a column {taken} of their own; "
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


def _scored(
    functions: rewards.Combination, tokenizer: Any, rollout: Rollout, columns: Mapping[str, list], samples: int
) -> Rewards:
    """Rewards of texts; where prompts are conversations, of lists of messages, as TRL has it."""
    rows = reward_models.texts_of(tokenizer, rollout, columns, samples)
    prompts, completions = ([row[side] for row in rows] for side in ("prompt", "completion"))
    each = {name: [value for value in column for _ in range(samples)] for name, column in columns.items() if name != "prompt"}
    return rewards.try_texts(functions, prompts, completions, columns=each | rewards.token_columns(rollout))


def _joined(reasons: Mapping[str, Sequence[str | None]], row: int) -> str | None:
    told = [f"{name}: {rows[row]}" for name, rows in reasons.items() if rows[row] is not None]
    return "; ".join(told) or None
