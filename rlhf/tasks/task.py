"""What a task is, and how one is made of a function that knows the answer to every problem."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.rollouts.types import Array, Prompts, Rollout, unpacked_rows
from rlhf.tasks import characters
from rlhf.tasks.characters import BOS, EOS, PAD, aligned


@documented
class Task(NamedTuple):
    """A generated task at one level of difficulty.  All but its tokenizer is pure JAX: full runs
    jit, and vmap over seeds.

    The reward functions read the problem from a rollout's prompts, and of each row what was sampled
    before the first end token.

    Attributes:
      name: of the task.
      level: of difficulty.
      max_new_tokens: of the longest right completion and its end token, where it has one.
      tokenizer: () -> a `transformers` tokenizer: 0 pads, 1 starts, 2 ends.
      prompts: (key, number) -> Prompts [number, L], padded on the left; the key is consumed.
      score: (rollout) -> [B] float32 in [0, 1], 1 for a right completion, with credit for a
        nearly right one.
      exact: (rollout) -> [B] float32, 1 for a right completion, else 0.
      right_so_far: (rollout) -> [B, T] bool, sampled tokens with which the completion can still
        become a right one.
      attempts: (key, prompts, accuracy) -> [P, A] int32, PAD behind: completions, right with
        probability `accuracy`.
      step_separator: stands between the steps of a completion.
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


def problems(prompts: Prompts | Rollout) -> Array:
    """What each row's prompt says, without its start token, from column 0 on: `[B, T]` int32, PAD
    behind.

    >>> problems(Prompts(jnp.array([[0, 1, 13]]), jnp.array([[False, True, True]]))).tolist()
    [[13, 0, 0]]
    """
    # `mask` marks real tokens in prompts, but sampled ones in a rollout.
    if isinstance(prompts, Prompts):
        real = prompts.mask
    else:
        real = (prompts.segment_ids != 0) & ~prompts.mask
    return aligned(prompts.tokens, real & (prompts.tokens != BOS))


def symbols(rollout: Rollout) -> Array:
    """`[B, T]` bool, what was sampled before the first end token.

    Raises: ValueError where the rollout is not one of rows.

    >>> prompts = Prompts(jnp.array([[1, 13]]), jnp.array([[True, True]]))
    >>> symbols(as_rollout(prompts, jnp.array([[14, EOS]]))).astype(int).tolist()
    [[0, 0, 1, 0]]
    """
    if rollout.tokens.ndim != 2:
        raise ValueError(
            f"a rollout's tokens are [B, T], but these are {list(rollout.tokens.shape)}; add the "
            "axis that lacks"
        )
    return rollout.mask & (jnp.cumsum(rollout.mask & (rollout.tokens == EOS), axis=1) == 0)


def as_rollout(prompts: Prompts, completions: Array) -> Rollout:
    """Prompts with completions that were not sampled, as a rollout that a task can score.

    Args:
      prompts: `[P, L]`.
      completions: `[P, A]` int32, PAD behind.

    Returns: a `Rollout` `[P, L + A]`, all finished; its log-probs are 0.

    Raises: ValueError where there are not as many completions as prompts.

    >>> prompts = Prompts(jnp.array([[0, 1, 13]]), jnp.array([[False, True, True]]))
    >>> as_rollout(prompts, jnp.array([[14, 15, 0]])).mask.astype(int).tolist()
    [[0, 0, 0, 1, 1, 0]]
    """
    if len(prompts.tokens) != len(completions):
        raise ValueError(
            f"{len(prompts.tokens)} prompts but {len(completions)} completions; one each"
        )
    tokens = jnp.concatenate([prompts.tokens, completions], axis=1)
    sampled = jnp.concatenate([jnp.zeros_like(prompts.mask), completions != PAD], axis=1)
    real = jnp.concatenate([prompts.mask, completions != PAD], axis=1)
    rows = unpacked_rows(tokens, real, sampled)
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    return Rollout(
        tokens=rows.tokens,
        mask=rows.mask,
        positions=rows.positions,
        segment_ids=rows.segment_ids,
        logprobs=zeros,
        sampling_logprobs=zeros,
        finished=jnp.ones(len(tokens), bool),
        temperature=jnp.float32(1.0),
    )


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
    """A task of characters whose problems have one right answer each.

    The score is `right / max(sampled, length of the answer)`, where a symbol is right in its own
    place.

    Args:
      prompts: as in `Task`.
      answer: (problems `[B, T]`, from column 0 on, PAD behind) -> the answers `[B, A]` in the same
        form.
      alphabet: ids that a slip of the weak policy writes.
      longest: symbols of the longest answer.
      step_separator: as in `Task`.

    >>> from rlhf.tasks import demonstrations
    >>> words = lambda key, number: characters.as_prompts(*characters.words(key, number, characters.LETTERS, 3))
    >>> options = dict(prompts=words, alphabet=characters.LETTERS, longest=3)
    >>> demonstrations(answer_task("copy", 1, answer=lambda problems: problems, **options), 1)
    [{'prompt': 'tec', 'completion': 'tec'}]
    """

    def compared(rollout):
        place = symbols(rollout)
        solutions = answer(problems(rollout))
        # A symbol's index among the sampled ones is its place in the answer: prompts differ in
        # length, so that its column is not.
        length = (solutions != PAD).sum(axis=1)
        index = jnp.cumsum(place, axis=1) - 1
        expected = jnp.take_along_axis(
            solutions, jnp.clip(index, 0, solutions.shape[1] - 1), axis=1
        )
        right = place & (index < length[:, None]) & (rollout.tokens == expected)
        # The longer of the two: neither stopping early nor going on pays.
        return place, right, jnp.maximum(place.sum(axis=1), length)

    def score(rollout):
        _, right, length = compared(rollout)
        return right.sum(axis=1).astype(jnp.float32) / length

    def exact(rollout):
        return (score(rollout) == 1).astype(jnp.float32)

    def right_so_far(rollout):
        place, right, _ = compared(rollout)
        # Until the first wrong symbol.
        return place & (jnp.cumsum(place & ~right, axis=1) == 0)

    def attempts(key, prompts, accuracy):
        right_key, slip_key = jax.random.split(key)
        solutions = answer(problems(prompts))[:, :longest]
        is_right = jax.random.bernoulli(right_key, accuracy, (len(solutions), 1))
        return jnp.where(is_right, solutions, slip(slip_key, solutions, alphabet))

    return Task(
        name=name,
        level=level,
        max_new_tokens=longest + 1,
        tokenizer=characters.tokenizer,
        prompts=prompts,
        score=score,
        exact=exact,
        right_so_far=right_so_far,
        attempts=attempts,
        step_separator=step_separator,
    )


def swap(completions: Array, place: Array) -> Array:
    """The same completions, each with one symbol and its right neighbour swapped; the last one's
    neighbour is the first.

    Args:
      completions: `[B, A]` int32, PAD behind.
      place: `[B]` int32, the symbol's column.

    Returns: `[B, A]`; as before where the two symbols are equal.

    >>> swap(jnp.array([[7, 8, 9, 0]]), jnp.array([1])).tolist()
    [[7, 9, 8, 0]]
    """
    rows = jnp.arange(len(completions))
    other = (place + 1) % (completions != PAD).sum(axis=1)
    return (
        completions.at[rows, place]
        .set(completions[rows, other])
        .at[rows, other]
        .set(completions[rows, place])
    )


def slip(key: Array, completions: Array, alphabet: range) -> Array:
    """Completions with one mistake each: two neighbouring symbols of the alphabet swapped, or one
    replaced by another.

    Args:
      key: consumed.
      completions: `[B, A]` int32, PAD behind, with a symbol of the alphabet each; others stay as
        they are.
      alphabet: two ids or more.

    Returns: `[B, A]`, of the same lengths; every row differs.

    >>> slip(jax.random.key(0), jnp.array([[7, 0]]), range(7, 9)).tolist()
    [[8, 0]]
    """
    place_key, symbol_key, coin_key = jax.random.split(key, 3)
    writable = (completions >= alphabet.start) & (completions < alphabet.stop)
    # Uniform over the columns that hold a symbol of the alphabet.
    place = jax.random.categorical(place_key, jnp.where(writable, 0.0, -jnp.inf))
    rows = jnp.arange(len(completions))
    new = jax.random.randint(symbol_key, rows.shape, alphabet.start, alphabet.stop - 1, jnp.int32)
    # Sampled from all ids but the last, which takes the place of the symbol itself: every other
    # symbol is equally likely, without sampling again.
    new = jnp.where(new == completions[rows, place], alphabet.stop - 1, new)
    replaced = completions.at[rows, place].set(new)
    swapped = swap(completions, place)
    # `<=` on booleans is "implies": a swap must change something, and only symbols of the alphabet.
    can_swap = ((swapped != completions) <= writable).all(axis=1) & (swapped != completions).any(
        axis=1
    )
    do_swap = can_swap & jax.random.bernoulli(coin_key, 0.5, rows.shape)
    return jnp.where(do_swap[:, None], swapped, replaced)


def check_level(name: str, level: int, hardest: int) -> None:
    """Refuses a level that a task does not have.

    Raises: ValueError.

    >>> check_level("reverse", 8, hardest=8)
    """
    if not 1 <= level <= hardest:
        raise ValueError(f"{name} has no level {level}; it has 1 to {hardest}")
