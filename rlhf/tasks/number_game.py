"""Guessing a number in two turns: one of three neighbours, with a hint between the guesses.

    3:5=   4<eos>   +=   5<eos>      the numbers, a guess, "it is greater", a guess

Whoever guesses the middle first always finds it.  An environment for `rlhf.rollouts.simulate`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.rollouts.simulate import Reply
from rlhf.rollouts.types import Array, Batch, Prompts, unpacked_rows
from rlhf.tasks import characters
from rlhf.tasks.characters import DIGITS, EOS, IDS
from rlhf.tasks.task import check_level

HARDEST = 4
TURNS = 2


@documented
class Game(NamedTuple):
    """A game at one level of difficulty, in pure JAX.

    Attributes:
      level: digits of a number.
      max_turns: of a conversation.
      max_new_tokens: of a turn, its end token included.
      prompts: (key, number) -> Prompts [number, L], and what each conversation starts in; the key
        is consumed.
      step: (state, tokens, mask) -> Reply, for `simulate`; rewards of a conversation sum to 1 where
        the number was found, else 0.
      conversations: (key, number, accuracy) -> Batch [number, T], guesses in its mask, each the
        best one with probability `accuracy`, else any of the three.
    """

    level: int
    max_turns: int
    max_new_tokens: int
    prompts: Callable
    step: Callable
    conversations: Callable


@cache
def game(level: int = 1) -> Game:
    """Numbers of `level` digits.

    Raises: ValueError for a level outside 1 to 4.

    >>> prompts, hidden = game().prompts(jax.random.key(0), 1)
    >>> characters.tokenizer().decode(prompts.tokens[0], skip_special_tokens=True), int(hidden[0])
    ('7:9=', 9)
    """
    check_level("number_game", level, HARDEST)
    return Game(
        level=level,
        max_turns=TURNS,
        max_new_tokens=level + 1,
        prompts=partial(_prompts, level),
        step=partial(_step, level),
        conversations=partial(_conversations, level),
    )


def _prompts(level: int, key: Array, number: int) -> tuple[Prompts, Array]:
    lowest_key, hidden_key = jax.random.split(key)
    first = 0 if level == 1 else 10 ** (level - 1)
    lowest = jax.random.randint(lowest_key, (number,), first, 10**level - 2, jnp.int32)
    hidden = lowest + jax.random.randint(hidden_key, (number,), 0, 3, jnp.int32)
    written = [_written(lowest, level), _sign(":", number), _written(lowest + 2, level)]
    tokens = jnp.concatenate([*written, _sign("=", number)], axis=1)
    return characters.as_prompts(tokens, jnp.ones(tokens.shape, bool)), hidden


def _step(level: int, hidden: Array, tokens: Array, mask: Array) -> Reply:
    guess, is_number = _read(level, tokens, mask)
    found = is_number & (guess == hidden)
    return Reply(
        hidden,
        _hint(hidden, guess),
        jnp.ones(2, bool),
        reward=found.astype(jnp.float32),
        # What is no number ends the game.
        done=found | ~is_number,
    )


def _conversations(level: int, key: Array, number: int, accuracy) -> Batch:
    prompt_key, *guess_keys = jax.random.split(key, 1 + TURNS)
    prompts, hidden = _prompts(level, prompt_key, number)
    middle = jax.vmap(partial(_middle, level))(prompts.tokens)
    first = _guess(guess_keys[0], middle, middle, accuracy)
    second = _guess(guess_keys[1], middle + jnp.sign(hidden - first), middle, accuracy)
    parts = [
        prompts.tokens,
        _turn(first, level),
        jax.vmap(_hint)(hidden, first),
        _turn(second, level),
    ]
    sampled = [jnp.full(part.shape, i % 2 == 1) for i, part in enumerate(parts)]
    # A first guess that finds the number is the last one.
    goes_on = (first != hidden)[:, None]
    there = [jnp.ones(part.shape, bool) & (goes_on | (i < 2)) for i, part in enumerate(parts)]
    real = jnp.concatenate(there, axis=1)
    tokens = jnp.where(real, jnp.concatenate(parts, axis=1), characters.PAD)
    return unpacked_rows(tokens, real, real & jnp.concatenate(sampled, axis=1))


def _guess(key: Array, best: Array, middle: Array, accuracy) -> Array:
    best_key, other_key = jax.random.split(key)
    other = middle + jax.random.randint(other_key, middle.shape, -1, 2, jnp.int32)
    return jnp.where(jax.random.bernoulli(best_key, accuracy, best.shape), best, other)


def _middle(level: int, prompt: Array) -> Array:
    """Of a prompt's numbers, of which the first stands behind the start token."""
    return _number(prompt[1 : 1 + level]) + 1


def _read(level: int, tokens: Array, mask: Array) -> tuple[Array, Array]:
    """The number that a turn says, and whether it says one and then ends."""
    digits = tokens[:level]
    is_digit = (digits >= DIGITS.start) & (digits < DIGITS.stop)
    return _number(digits), is_digit.all() & mask.all() & (tokens[level] == EOS)


def _number(digits: Array) -> Array:
    return ((digits - DIGITS.start) * 10 ** jnp.arange(len(digits))[::-1]).sum()


def _hint(hidden: Array, guess: Array) -> Array:
    """`+=` where the hidden number is greater, else `-=`."""
    return jnp.stack([jnp.where(hidden > guess, IDS["+"], IDS["-"]), jnp.int32(IDS["="])])


def _turn(numbers: Array, level: int) -> Array:
    return jnp.pad(_written(numbers, level), ((0, 0), (0, 1)), constant_values=EOS)


def _written(numbers: Array, level: int) -> Array:
    """`[B]` -> `[B, level]`, all digits."""
    return characters.decimals(numbers, level)[0][:, 1:]


def _sign(character: str, number: int) -> Array:
    return jnp.full((number, 1), IDS[character], jnp.int32)
