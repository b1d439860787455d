"""What a task is, and how one is made of a function that knows the answer to every question."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.rollouts.types import Array, Prompts, Rollout, whole_rows
from rlhf.tasks import characters
from rlhf.tasks.characters import BOS, EOS, PAD, aligned


@documented
class Task(NamedTuple):
    """A generated task at one level of difficulty.  All but its tokenizer is pure JAX: whole runs jit, and vmap over seeds.

    The judges read the question from a rollout's own prompts, and of each row what was sampled before the first end token.

    Attributes:
      name: of the task.
      level: of difficulty.
      max_new_tokens: the longest right answer and its end token.
      tokenizer: () -> a `transformers` tokenizer: 0 pads, 1 starts, 2 ends.
      prompts: (key, number) -> Prompts [number, L], padded on the left; the key is consumed.
      score: (rollout) -> [B] float32 in [0, 1], 1 for a right answer, with credit for a nearly right one.
      exact: (rollout) -> [B] float32, 1 for a right answer, else 0.
      right_so_far: (rollout) -> [B, T] bool, sampled tokens with which the answer can still become a right one.
      attempts: (key, prompts, accuracy) -> [P, A] int32, PAD behind: answers, right with probability `accuracy`.
      step_separator: stands between the steps of an answer.
    """

    name: str
    level: int
    max_new_tokens: int
    tokenizer: Callable
    prompts: Callable
    score: Callable
    exact: Callable
    right_so_far: Callable
    attempts: Callable
    step_separator: str = ""


def questions(prompts: Prompts | Rollout) -> Array:
    """What each row's prompt asks, without its start token, from column 0 on: `[B, T]` int32, PAD behind.

    >>> questions(Prompts(jnp.array([[0, 1, 13]]), jnp.array([[False, True, True]]))).tolist()
    [[13, 0, 0]]
    """
    real = prompts.mask if isinstance(prompts, Prompts) else (prompts.segment_ids != 0) & ~prompts.mask
    return aligned(prompts.tokens, real & (prompts.tokens != BOS))


def symbols(rollout: Rollout) -> Array:
    """`[B, T]` bool, what was sampled before the first end token.

    Raises: ValueError where the rollout is not one of rows.

    >>> prompts = Prompts(jnp.array([[1, 13]]), jnp.array([[True, True]]))
    >>> symbols(answered(prompts, jnp.array([[14, EOS]]))).astype(int).tolist()
    [[0, 0, 1, 0]]
    """
    if rollout.tokens.ndim != 2:
        raise ValueError(f"a rollout's tokens are [B, T], but these are {list(rollout.tokens.shape)}; add the axis that lacks")
    return rollout.mask & (jnp.cumsum(rollout.mask & (rollout.tokens == EOS), axis=1) == 0)


def answered(prompts: Prompts, completions: Array) -> Rollout:
    """Prompts with answers that were not sampled, as a rollout that a task can judge.

    Args:
      prompts: `[P, L]`.
      completions: `[P, A]` int32, PAD behind.

    Returns: a `Rollout` `[P, L + A]`, all finished; its log-probs are 0.

    Raises: ValueError where there are not as many completions as prompts.

    >>> prompts = Prompts(jnp.array([[0, 1, 13]]), jnp.array([[False, True, True]]))
    >>> answered(prompts, jnp.array([[14, 15, 0]])).mask.astype(int).tolist()
    [[0, 0, 0, 1, 1, 0]]
    """
    if len(prompts.tokens) != len(completions):
        raise ValueError(f"{len(prompts.tokens)} prompts but {len(completions)} completions; one each")
    tokens = jnp.concatenate([prompts.tokens, completions], axis=1)
    sampled = jnp.concatenate([jnp.zeros_like(prompts.mask), completions != PAD], axis=1)
    real = jnp.concatenate([prompts.mask, completions != PAD], axis=1)
    rows = whole_rows(tokens, real, sampled)
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    return Rollout(*rows[:4], zeros, zeros, jnp.ones(len(tokens), bool), jnp.float32(1.0))


def answer_task(
    name: str,
    level: int,
    *,
    prompts: Callable,
    answer: Callable,
    alphabet: range,
    longest: int,
    step_separator: str = "",
) -> Task:
    """A task of characters whose questions have one right answer each.

    The score is `right / max(sampled, length of the answer)`, where a symbol is right in its own place.

    Args:
      prompts: as in `Task`.
      answer: (questions `[B, T]`, from column 0 on, PAD behind) -> the answers `[B, A]` in the same form.
      alphabet: ids that a slip of the weak policy writes.
      longest: symbols of the longest answer.
      step_separator: as in `Task`.

    >>> from rlhf.tasks import demonstrations
    >>> words = lambda key, number: characters.as_prompts(*characters.words(key, number, characters.LETTERS, 3))
    >>> knobs = dict(prompts=words, alphabet=characters.LETTERS, longest=3)
    >>> demonstrations(answer_task("copy", 1, answer=lambda questions: questions, **knobs), 1)
    [{'prompt': 'tec', 'completion': 'tec'}]
    """

    def compared(rollout):
        place = symbols(rollout)
        answers = answer(questions(rollout))
        length = (answers != PAD).sum(axis=1)
        index = jnp.cumsum(place, axis=1) - 1
        expected = jnp.take_along_axis(answers, jnp.clip(index, 0, answers.shape[1] - 1), axis=1)
        right = place & (index < length[:, None]) & (rollout.tokens == expected)
        return place, right, jnp.maximum(place.sum(axis=1), length)

    def score(rollout):
        _, right, length = compared(rollout)
        return right.sum(axis=1).astype(jnp.float32) / length

    def exact(rollout):
        return (score(rollout) == 1).astype(jnp.float32)

    def right_so_far(rollout):
        place, right, _ = compared(rollout)
        return place & (jnp.cumsum(place & ~right, axis=1) == 0)

    def attempts(key, prompts, accuracy):
        right_key, slip_key = jax.random.split(key)
        answers = answer(questions(prompts))[:, :longest]
        is_right = jax.random.bernoulli(right_key, accuracy, (len(answers), 1))
        return jnp.where(is_right, answers, slip(slip_key, answers, alphabet))

    return Task(
        name, level, longest + 1, characters.tokenizer, prompts, score, exact, right_so_far, attempts, step_separator
    )  # fmt: skip


def swap(answers: Array, place: Array) -> Array:
    """The same answers, each with one symbol and its right neighbour swapped; the last one's neighbour is the first.

    Args:
      answers: `[B, A]` int32, PAD behind.
      place: `[B]` int32, the symbol's column.

    Returns: `[B, A]`; as before where the two symbols are equal.

    >>> swap(jnp.array([[7, 8, 9, 0]]), jnp.array([1])).tolist()
    [[7, 9, 8, 0]]
    """
    rows, other = jnp.arange(len(answers)), (place + 1) % (answers != PAD).sum(axis=1)
    return answers.at[rows, place].set(answers[rows, other]).at[rows, other].set(answers[rows, place])


def slip(key: Array, answers: Array, alphabet: range) -> Array:
    """Answers with one mistake each: two neighbouring symbols of the alphabet swapped, or one replaced by another.

    Args:
      key: consumed.
      answers: `[B, A]` int32, PAD behind, with a symbol of the alphabet each; others stay as they are.
      alphabet: two ids or more.

    Returns: `[B, A]`, of the same lengths; every row differs.

    >>> slip(jax.random.key(0), jnp.array([[7, 0]]), range(7, 9)).tolist()
    [[8, 0]]
    """
    place_key, symbol_key, coin_key = jax.random.split(key, 3)
    writable = (answers >= alphabet.start) & (answers < alphabet.stop)
    place = jax.random.categorical(place_key, jnp.where(writable, 0.0, -jnp.inf))
    rows = jnp.arange(len(answers))
    new = jax.random.randint(symbol_key, rows.shape, alphabet.start, alphabet.stop - 1, jnp.int32)
    new = jnp.where(new == answers[rows, place], alphabet.stop - 1, new)
    replaced, swapped = answers.at[rows, place].set(new), swap(answers, place)
    can_swap = ((swapped != answers) <= writable).all(axis=1) & (swapped != answers).any(axis=1)
    do_swap = can_swap & jax.random.bernoulli(coin_key, 0.5, rows.shape)
    return jnp.where(do_swap[:, None], swapped, replaced)


def check_level(name: str, level: int, hardest: int) -> None:
    """Refuses a level that a task does not have.

    Raises: ValueError.

    >>> check_level("reverse", 8, hardest=8)
    """
    if not 1 <= level <= hardest:
        raise ValueError(f"{name} has no level {level}; it has 1 to {hardest}")
