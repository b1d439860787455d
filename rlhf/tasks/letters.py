"""Counting a letter in a word: `abacad:a=` is answered by `3`."""

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
        letter = jax.random.randint(letter_key, (number, 1), ALPHABET.start, ALPHABET.stop, jnp.int32)
        tokens, keep = jnp.concatenate([tokens, letter], axis=1), jnp.pad(keep, ((0, 0), (0, 1)), constant_values=True)
        return characters.as_prompts(*characters.after(tokens, keep, "="))

    return answer_task("letters", level, prompts=prompts, answer=_counted, alphabet=DIGITS, longest=len(str(longest)))


def _counted(questions: Array) -> Array:
    before = jnp.cumsum(questions == IDS[":"], axis=1) == 0
    letter_at = before.sum(axis=1, keepdims=True) + 1
    letter = jnp.take_along_axis(questions, jnp.minimum(letter_at, questions.shape[1] - 1), axis=1)
    count = (before & (questions == letter)).sum(axis=1)
    return characters.aligned(*characters.decimals(count, 2))
