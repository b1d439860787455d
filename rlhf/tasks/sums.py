r"""Chains of sums, answered by their running totals: `3+14-5=` by `17\n12`.

A step is one running total, so that the line end is where a process reward model gives its verdict.
"""

from functools import cache

import jax
import jax.numpy as jnp

from rlhf.rollouts.types import Array
from rlhf.tasks import characters
from rlhf.tasks.characters import DIGITS, IDS
from rlhf.tasks.task import Task, answer_task, check_level

HARDEST = 8  # int32 holds its totals


@cache
def task(level: int = 1) -> Task:
    r"""2 to `level + 1` numbers of at most `level` digits, added and subtracted.

    Raises: ValueError for a level outside 1 to 8.

    >>> from rlhf.tasks import demonstrations
    >>> demonstrations(task(2), 1, seed=1)
    [{'prompt': '66-9-58=', 'completion': '57\n-1'}]
    """
    check_level("sums", level, HARDEST)
    digits = level + 1  # of a total: below (level + 1) · 10^level
    longest = level * (2 + digits) - 1

    def answer(questions):
        totals, is_total = _totals(questions)
        totals = characters.aligned(totals, is_total)[:, :level]
        there = jnp.arange(totals.shape[1])[None] < is_total.sum(axis=1, keepdims=True)
        tokens, keep = characters.decimals(totals, digits)
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (1, 0)), constant_values=IDS["\n"])
        keep = jnp.pad(keep, ((0, 0), (0, 0), (1, 0)), constant_values=True).at[:, 0, 0].set(False) & there[..., None]
        rows = lambda x: x.reshape(len(x), -1)
        return characters.aligned(rows(tokens), rows(keep))

    return answer_task(
        "sums", level, prompts=lambda key, number: _prompts(key, number, level), answer=answer, alphabet=DIGITS,
        longest=longest, step_separator="\n",
    )  # fmt: skip


def _prompts(key, number, level):
    length_key, digit_key, value_key, sign_key = jax.random.split(key, 4)
    terms = jax.random.randint(length_key, (number, 1), 2, level + 2)
    shape = (number, level + 1)
    values = jax.random.randint(value_key, shape, 0, 10 ** jax.random.randint(digit_key, shape, 1, level + 1))
    tokens, keep = characters.decimals(values, level)
    plus = jax.random.bernoulli(sign_key, 0.5, shape)
    tokens = tokens.at[..., 0].set(jnp.where(plus, IDS["+"], IDS["-"]))
    keep = keep.at[:, 1:, 0].set(True) & (jnp.arange(level + 1)[None] < terms)[..., None]
    rows = lambda x: x.reshape(number, -1)
    return characters.as_prompts(*characters.after(rows(tokens), rows(keep), "="))


def _totals(questions: Array) -> tuple[Array, Array]:
    """`[B, T]` totals of what stands before a column, and where that is a running total: at `=` and signs but the first."""
    is_digit = (questions >= DIGITS.start) & (questions < DIGITS.stop)
    ends = (questions == IDS["+"]) | (questions == IDS["-"]) | (questions == IDS["="])

    def read(carry, column):
        total, sign, value = carry
        token, digit, end = column
        total = jnp.where(end, total + sign * value, total)
        sign = jnp.where(end, jnp.where(token == IDS["-"], -1, 1), sign)
        value = jnp.where(end, 0, jnp.where(digit, 10 * value + token - DIGITS.start, value))
        return (total, sign, value), total

    zeros = jnp.zeros(len(questions), jnp.int32)
    _, totals = jax.lax.scan(read, (zeros, zeros + 1, zeros), (questions.T, is_digit.T, ends.T))
    return totals.T, ends & (jnp.cumsum(ends, axis=1) > 1)
