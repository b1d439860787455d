"""Generated tasks: data without a download, and reward functions that know the truth.

A task's module has `task(level) -> Task`; the functions of `offline` make rows of data sets of it.
"""

from collections.abc import Callable
from difflib import get_close_matches

from rlhf.tasks import bandit, countdown, letters, positive_reviews, reverse, sort, sums, walks
from rlhf.tasks.offline import Row
from rlhf.tasks.offline import demonstrations as demonstrations
from rlhf.tasks.offline import preferences as preferences
from rlhf.tasks.offline import prompts as prompts
from rlhf.tasks.offline import stepwise as stepwise
from rlhf.tasks.offline import trajectories as trajectories
from rlhf.tasks.offline import unpaired as unpaired
from rlhf.tasks.task import Task as Task
from rlhf.tasks.task import answer_task as answer_task
from rlhf.tasks.task import as_rollout as as_rollout

TASKS: dict[str, Callable[[int], Task]] = {
    "bandit": bandit.task,
    "countdown": countdown.task,
    "letters": letters.task,
    "reverse": reverse.task,
    "reviews": positive_reviews.task,
    "sort": sort.task,
    "sums": sums.task,
    "walks": walks.task,
}
# Before a task's name where a path or a name on the Hub could stand.
PREFIX = "task:"


def find(name: str) -> Task:
    """The task that a text names: `task:reverse`, or `task:reverse:3` for level 3.

    Raises: ValueError for a text of another form, an unknown task or a level that it does not have.

    >>> find("task:reverse:3").level
    3
    """
    known = ", ".join(TASKS)
    # Unpacked below: the level that was given, or "1" for the easiest.
    prefix, *rest = name.split(":")
    if (
        f"{prefix}:" != PREFIX
        or len(rest) not in (1, 2)
        or not (level := [*rest, "1"][1]).isdecimal()
    ):
        raise ValueError(
            f"{name!r} names no task; write task:NAME or task:NAME:LEVEL, such as task:reverse:3; "
            f"there are {known}"
        )
    if rest[0] not in TASKS:
        near = get_close_matches(rest[0], TASKS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no task {rest[0]!r}; did you mean {near}? there are {known}")
    return TASKS[rest[0]](int(level))


def load(
    name: str, kind: Callable[..., list[Row]], number: int, *, seed: int = 0, **options
) -> list[Row]:
    """Rows of a data set from the text that names a task.

    Args:
      name: as in `find`.
      kind: `prompts`, `demonstrations`, `preferences`, `unpaired`, `stepwise` or `trajectories`.
      number: of rows.
      seed: any integer.
      options: of the kind: `accuracy`.

    Raises: ValueError for an unknown task or level, less than one row, or an accuracy out of range.

    >>> load("task:sums", unpaired, 2)
    [{'prompt': '9-2=', 'completion': '8', 'label': False}, {'prompt': '5-0=', 'completion': '5', 'label': True}]
    """
    return kind(find(name), number, seed=seed, **options)
