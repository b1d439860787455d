"""Reversing a word: the completion of `badge=` is `egdab`."""

from functools import cache

import jax.numpy as jnp

from rlhf.rollouts.types import Array
from rlhf.tasks import characters
from rlhf.tasks.characters import IDS, LETTERS, PAD
from rlhf.tasks.task import Task, answer_task, check_level

# Ten letters, so that small models have fewer tokens to tell apart.
ALPHABET = LETTERS[:10]
HARDEST = 8


@cache
def task(level: int = 1) -> Task:
    """Words of 2 to `4 · level` letters out of `a` to `j`.

    Raises: ValueError for a level outside 1 to 8.

    >>> from rlhf.tasks import demonstrations
    >>> demonstrations(task(), 1)
    [{'prompt': 'dgi=', 'completion': 'igd'}]
    """
    check_level("reverse", level, HARDEST)
    longest = 4 * level

    def prompts(key, number):
        return characters.as_prompts(
            *characters.after(*characters.words(key, number, ALPHABET, longest), "=")
        )

    return answer_task(
        "reverse", level, prompts=prompts, answer=_reversed, alphabet=ALPHABET, longest=longest
    )


def _reversed(problems: Array) -> Array:
    is_letter = (problems != PAD) & (problems != IDS["="])
    # Column i reads the letter as far from the end; below 0 the word is over.
    index = is_letter.sum(axis=1, keepdims=True) - 1 - jnp.arange(problems.shape[1])[None]
    return jnp.where(index >= 0, jnp.take_along_axis(problems, jnp.maximum(index, 0), axis=1), PAD)
