"""Countdown: digits are made into a target, each used once: the completion of `257:17=` is `2x5+7`.

The game of TinyZero and others, whose numbers and operations are few here: all expressions of a
problem fit in a table.  They are read from left to right, as a pocket calculator does: `2+5x7` is
49.  Any that is worth the target is right.
"""

from functools import cache
from itertools import permutations, product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.fields import documented
from rlhf.rollouts.types import Array
from rlhf.tasks import characters
from rlhf.tasks.characters import DIGITS, IDS
from rlhf.tasks.task import Task, check_level, problems, symbols

HARDEST = 3  # 648 expressions
OPERATIONS = tuple(IDS[sign] for sign in "+-x")
TARGETS = 100  # from 0 on
WELL_FORMED = 0.1  # the score of an expression of these digits that is worth something else


@documented
class Expressions(NamedTuple):
    """All expressions of problems.

    Attributes:
      tokens: [B, E, 2 n - 1] int32, for n digits.
      right: [B, E] bool, worth the target.
    """

    tokens: Array
    right: Array


@cache
def task(level: int = 1) -> Task:
    """`level + 1` digits from 1 to 9, and a target from 0 to 99; the score is 1 for an expression
    worth the target, 0.1 for another one of the same digits.

    The weak policy's wrong completions are expressions worth something else.

    Raises: ValueError for a level outside 1 to 3.

    >>> from rlhf.tasks import demonstrations
    >>> demonstrations(task(2), 1)
    [{'prompt': '835:39=', 'completion': '8+5x3'}]
    """
    check_level("countdown", level, HARDEST)
    number_of_digits = level + 1
    longest = 2 * number_of_digits - 1

    def expressions(rows):
        written = problems(rows)
        digits = written[:, :number_of_digits] - DIGITS.start
        return _expressions(digits, _target(written))

    def matches(rollout):
        place = symbols(rollout)
        sampled = characters.aligned(rollout.tokens, place)[:, None, :longest]
        found = expressions(rollout)
        same = (sampled == found.tokens).all(axis=2) & (place.sum(axis=1) == longest)[:, None]
        return same, found.right

    def score(rollout):
        same, right = matches(rollout)
        partial = jnp.where(same.any(axis=1), WELL_FORMED, 0.0)
        return jnp.where((same & right).any(axis=1), 1.0, partial).astype(jnp.float32)

    def exact(rollout):
        same, right = matches(rollout)
        return (same & right).any(axis=1).astype(jnp.float32)

    def right_so_far(rollout):
        place = symbols(rollout)
        found = expressions(rollout)
        index = jnp.cumsum(place, axis=1) - 1
        sampled = characters.aligned(rollout.tokens, place)[:, None, :longest]
        is_prefix = jnp.cumsum(sampled != found.tokens, axis=2) == 0
        is_right = (is_prefix & found.right[..., None]).any(axis=1)
        # Nothing that is longer is right.
        is_right = jnp.pad(is_right, ((0, 0), (0, 1)))
        return place & jnp.take_along_axis(is_right, jnp.clip(index, 0, longest), axis=1)

    def attempts(key, prompts, accuracy):
        right_key, choice_key = jax.random.split(key)
        found = expressions(prompts)
        is_right = jax.random.bernoulli(right_key, accuracy, (len(found.right), 1))
        allowed = jnp.where(found.right == is_right, 0.0, -jnp.inf)
        chosen = jax.random.categorical(choice_key, allowed)
        return jnp.take_along_axis(found.tokens, chosen[:, None, None], axis=1)[:, 0]

    return Task(
        name="countdown",
        level=level,
        max_new_tokens=longest + 1,
        tokenizer=characters.tokenizer,
        prompts=lambda key, number: _prompts(key, number, number_of_digits),
        score=score,
        exact=exact,
        right_so_far=right_so_far,
        attempts=attempts,
    )


def _prompts(key, number, number_of_digits):
    digit_key, choice_key = jax.random.split(key)
    digits = jax.random.randint(digit_key, (number, number_of_digits), 1, 10, jnp.int32)
    values = _values(digits)
    # Sums of digits are always in the range, so that there is one to choose.
    allowed = jnp.where((values >= 0) & (values < TARGETS), 0.0, -jnp.inf)
    chosen = jax.random.categorical(choice_key, allowed)
    target = jnp.take_along_axis(values, chosen[:, None], axis=1)[:, 0]
    tokens, keep = characters.after(DIGITS.start + digits, jnp.ones(digits.shape, bool), ":")
    of_target, keep_target = characters.decimals(target, len(str(TARGETS - 1)))
    tokens = jnp.concatenate([tokens, of_target], axis=1)
    keep = jnp.concatenate([keep, keep_target], axis=1)
    return characters.as_prompts(*characters.after(tokens, keep, "="))


def _target(written: Array) -> Array:
    """The number between `:` and `=`: `[B, T]` -> `[B]`."""
    behind = jnp.cumsum(written == IDS[":"], axis=1) > 0
    is_digit = behind & (written >= DIGITS.start) & (written < DIGITS.stop)

    def read(value, column):
        token, digit = column
        return jnp.where(digit, 10 * value + token - DIGITS.start, value), None

    zeros = jnp.zeros(len(written), jnp.int32)
    return jax.lax.scan(read, zeros, (written.T, is_digit.T))[0]


@cache
def _table(number_of_digits: int) -> tuple[np.ndarray, np.ndarray]:
    """Orders of the digits, `[E, n]`, and operations between them, `[E, n - 1]`."""
    orders = list(permutations(range(number_of_digits)))
    signs = list(product(range(len(OPERATIONS)), repeat=number_of_digits - 1))
    both = list(product(orders, signs))
    return np.array([order for order, _ in both]), np.array([sign for _, sign in both])


def _values(digits: Array) -> Array:
    """What expressions are worth: `[B, n]` -> `[B, E]`."""
    orders, signs = _table(digits.shape[1])
    digits = digits[:, orders]
    value = digits[..., 0]
    for i in range(signs.shape[1]):
        next_digit = digits[..., i + 1]
        results = [value + next_digit, value - next_digit, value * next_digit]
        value = jnp.select([signs[:, i][None] == sign for sign in range(3)], results)
    return value


def _expressions(digits: Array, target: Array) -> Expressions:
    orders, signs = _table(digits.shape[1])
    tokens = jnp.zeros((len(digits), len(orders), 2 * digits.shape[1] - 1), jnp.int32)
    tokens = tokens.at[..., ::2].set(DIGITS.start + digits[:, orders])
    tokens = tokens.at[..., 1::2].set(jnp.array(OPERATIONS)[signs][None])
    return Expressions(tokens, _values(digits) == target[:, None])
