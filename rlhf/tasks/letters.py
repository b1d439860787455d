"""Counting a letter in a word: the completion of `abacad:a=` is `3`."""

from functools import cache

import jax
import jax.numpy as jnp

from rlhf.rollouts.types import Array
from rlhf.tasks import characters
from rlhf.tasks.characters import DIGITS, IDS, LETTERS
from rlhf.tasks.task import Task, answer_task, check_level

ALPHABET = LETTERS[:4]  # few letters, so that most counts are above 0
HARDEST = 8


@cache
def task(level: int = 1) -> Task:
    """Words of 2 to `4 · level` letters out of `a` to `d`.

    Raises: ValueError for a level outside 1 to 8.

    >>> from rlhf.tasks import demonstrations
    >>> demonstrations(task(), 1)
    [{'prompt': 'bcd:b=', 'completion': '1'}]
    """
    check_level("letters", level, HARDEST)
    longest = 4 * level

    def prompts(key, number):
        word_key, letter_key = jax.random.split(key)
        tokens, keep = characters.after(*characters.words(word_key, number, ALPHABET, longest), ":")
        letter = jax.random.randint(
            letter_key, (number, 1), ALPHABET.start, ALPHABET.stop, jnp.int32
        )
        tokens = jnp.concatenate([tokens, letter], axis=1)
        keep = jnp.pad(keep, ((0, 0), (0, 1)), constant_values=True)
        return characters.as_prompts(*characters.after(tokens, keep, "="))

    return answer_task(
        "letters",
        level,
        prompts=prompts,
        answer=_counted,
        alphabet=DIGITS,
        longest=len(str(longest)),
    )


def _counted(problems: Array) -> Array:
    # The word stands before the colon, the letter right after it.
    before = jnp.cumsum(problems == IDS[":"], axis=1) == 0
    letter_at = before.sum(axis=1, keepdims=True) + 1
    # Limited, for prompts without a colon, which others may give: no index may leave the row.
    letter = jnp.take_along_axis(problems, jnp.minimum(letter_at, problems.shape[1] - 1), axis=1)
    count = (before & (problems == letter)).sum(axis=1)
    return characters.aligned(*characters.decimals(count, 2))
