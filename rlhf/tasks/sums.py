r"""Chains of sums, completed by their running totals: `3+14-5=` by `17\n12`.

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

    def answer(problems):
        totals, is_total = _totals(problems)
        totals = characters.aligned(totals, is_total)[:, :level]
        there = jnp.arange(totals.shape[1])[None] < is_total.sum(axis=1, keepdims=True)
        tokens, keep = characters.decimals(totals, digits)
        tokens = jnp.pad(tokens, ((0, 0), (0, 0), (1, 0)), constant_values=IDS["\n"])
        # A line end before every total but the first: it separates steps.
        keep = (
            jnp.pad(keep, ((0, 0), (0, 0), (1, 0)), constant_values=True).at[:, 0, 0].set(False)
            & there[..., None]
        )
        # [B, totals, symbols] -> [B, A]
        number = len(tokens)
        return characters.aligned(tokens.reshape(number, -1), keep.reshape(number, -1))

    return answer_task(
        "sums",
        level,
        prompts=lambda key, number: _prompts(key, number, level),
        answer=answer,
        alphabet=DIGITS,
        longest=longest,
        step_separator="\n",
    )


def _prompts(key, number, level):
    length_key, digit_key, value_key, sign_key = jax.random.split(key, 4)
    terms = jax.random.randint(length_key, (number, 1), 2, level + 2)
    shape = (number, level + 1)
    # The number of digits is uniform, not the number: else nearly all would have the most digits.
    values = jax.random.randint(
        value_key, shape, 0, 10 ** jax.random.randint(digit_key, shape, 1, level + 1)
    )
    tokens, keep = characters.decimals(values, level)
    plus = jax.random.bernoulli(sign_key, 0.5, shape)
    # `decimals` leaves column 0 for a minus sign: here it holds each term's sign, but for the
    # first.
    tokens = tokens.at[..., 0].set(jnp.where(plus, IDS["+"], IDS["-"]))
    keep = keep.at[:, 1:, 0].set(True) & (jnp.arange(level + 1)[None] < terms)[..., None]
    tokens, keep = characters.after(tokens.reshape(number, -1), keep.reshape(number, -1), "=")
    return characters.as_prompts(tokens, keep)


def _totals(problems: Array) -> tuple[Array, Array]:
    """`[B, T]` totals of what stands before a column, and where that is a running total: at `=` and
    signs but the first.
    """
    is_digit = (problems >= DIGITS.start) & (problems < DIGITS.stop)
    ends = (problems == IDS["+"]) | (problems == IDS["-"]) | (problems == IDS["="])

    def read(carry, column):
        # A pocket calculator: digits enter a number, and a sign adds it to the total.
        total, sign, value = carry
        token, digit, end = column
        total = jnp.where(end, total + sign * value, total)
        sign = jnp.where(end, jnp.where(token == IDS["-"], -1, 1), sign)
        value = jnp.where(end, 0, jnp.where(digit, 10 * value + token - DIGITS.start, value))
        return (total, sign, value), total

    zeros = jnp.zeros(len(problems), jnp.int32)
    _, totals = jax.lax.scan(read, (zeros, zeros + 1, zeros), (problems.T, is_digit.T, ends.T))
    return totals.T, ends & (jnp.cumsum(ends, axis=1) > 1)
