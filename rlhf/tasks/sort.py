"""Sorting digits: the completion of `3141=` is `1134`."""

from functools import cache

import jax.numpy as jnp

from rlhf.rollouts.types import Array
from rlhf.tasks import characters
from rlhf.tasks.characters import DIGITS, PAD
from rlhf.tasks.task import Task, answer_task, check_level

HARDEST = 8


@cache
def task(level: int = 1) -> Task:
    """2 to `4 · level` digits.

    Raises: ValueError for a level outside 1 to 8.

    >>> from rlhf.tasks import demonstrations
    >>> demonstrations(task(), 1, seed=1)
    [{'prompt': '5057=', 'completion': '0557'}]
    """
    check_level("sort", level, HARDEST)
    longest = 4 * level

    def prompts(key, number):
        return characters.as_prompts(
            *characters.after(*characters.words(key, number, DIGITS, longest), "=")
        )

    return answer_task(
        "sort", level, prompts=prompts, answer=_sorted, alphabet=DIGITS, longest=longest
    )


def _sorted(problems: Array) -> Array:
    is_digit = (problems >= DIGITS.start) & (problems < DIGITS.stop)
    # What is no digit becomes larger than all of them, so that it sorts behind.
    digits = jnp.sort(jnp.where(is_digit, problems, DIGITS.stop), axis=1)
    return jnp.where(digits < DIGITS.stop, digits, PAD)
