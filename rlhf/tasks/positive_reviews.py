"""Reviews as a task: a positive end for the start of a review.

The grammar of `reviews` once more, as arrays: `SLOTS` writes, and a finite automaton over tokens
reads.
"""

from collections.abc import Iterator, Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.rollouts.types import Array, Prompts, Rollout
from rlhf.tasks.characters import BOS, PAD, aligned, as_prompts
from rlhf.tasks.reviews import (
    ADJECTIVES,
    ASPECTS,
    DEGREES,
    FEELINGS,
    OPENINGS,
    VERBS,
    VOCABULARY,
    tokenizer,
)
from rlhf.tasks.task import Task, check_level, swap, symbols


def _either(words):
    """The same words for both sentiments."""
    return dict.fromkeys((False, True), words.split() if isinstance(words, str) else words)


SLOTS = (  # of a completion, as words of negative and of positive ones
    *(_either(VERBS), DEGREES, ADJECTIVES),
    *(_either("and"), _either("the"), _either(ASPECTS), _either(VERBS), DEGREES, ADJECTIVES),
    *(_either(","), _either("i"), FEELINGS, _either("it")),
    _either("."),
)
# The parts of `SLOTS` that a completion may leave out.
SECOND = slice(3, 9)
VERDICT = slice(9, 13)
# States of the automaton; DEAD is 0, in which a table starts, and is never left.
DEAD, START, END = range(3)


@cache
def task(level: int = 1) -> Task:
    """Starts of reviews, to be ended as positive ones; the score is 1 for a grammatical, positive
    review, else 0.

    Half of the weak policy's wrong completions are negative, in the others two neighbouring words
    are swapped.

    Raises: ValueError for any level but 1.

    >>> from rlhf.tasks import demonstrations
    >>> demonstrations(task(), 1, seed=3)
    [{'prompt': 'in short , the pacing', 'completion': 'looks truly moving , i loved it .'}]
    """
    check_level("reviews", level, 1)

    def score(rollout):
        return (_states(rollout)[:, -1] == END).astype(jnp.float32)

    def right_so_far(rollout):
        return symbols(rollout) & (_states(rollout) != DEAD)

    return Task(
        name="reviews",
        level=level,
        max_new_tokens=len(SLOTS) + 1,
        tokenizer=tokenizer,
        prompts=_prompts,
        score=score,
        exact=score,
        right_so_far=right_so_far,
        attempts=_attempts,
        step_separator=" ",
    )


def _ids(words: Sequence[str]) -> np.ndarray:
    """Token ids of words; PAD for the empty one."""
    return np.array([VOCABULARY.index(word or VOCABULARY[PAD]) for word in words], np.int32)


def _prompts(key: Array, number: int) -> Prompts:
    """`[number, 7]`, what `prompt` writes."""
    opening_key, aspect_key = jax.random.split(key)
    width = max(len(opening.split()) for opening in OPENINGS)
    openings = np.stack([_ids((opening.split() + [""] * width)[:width]) for opening in OPENINGS])
    opening = jnp.asarray(openings)[jax.random.randint(opening_key, (number,), 0, len(OPENINGS))]
    aspect = jax.random.choice(aspect_key, _ids(ASPECTS), (number, 1))
    tokens = jnp.concatenate(
        [opening, jnp.full_like(aspect, VOCABULARY.index("the")), aspect], axis=1
    )
    return as_prompts(tokens, tokens != PAD)


def _completions(key: Array, positive: Array) -> Array:
    """`[B, 14]`, what `completion` writes, for `positive [B]` bool."""
    key, second_key, verdict_key = jax.random.split(key, 3)

    def sample(key, words):
        table = jnp.asarray(np.stack([_ids(words[kind]) for kind in (False, True)]))
        return table[
            positive.astype(jnp.int32), jax.random.randint(key, positive.shape, 0, table.shape[1])
        ]

    # Every slot is filled, then parts are taken out: shapes must not depend on chance.
    keys = jax.random.split(key, len(SLOTS))
    tokens = jnp.stack([sample(key, words) for key, words in zip(keys, SLOTS, strict=True)], axis=1)
    keep = tokens != PAD
    for part, key in ((SECOND, second_key), (VERDICT, verdict_key)):
        keep = keep.at[:, part].set(
            keep[:, part] & jax.random.bernoulli(key, 0.75, (len(tokens), 1))
        )
    return aligned(tokens, keep)


def _attempts(key: Array, prompts: Prompts, accuracy) -> Array:
    right_key, kind_key, text_key, place_key = jax.random.split(key, 4)
    shape = prompts.tokens.shape[:1]
    right = jax.random.bernoulli(right_key, accuracy, shape)
    negative = jax.random.bernoulli(kind_key, 0.5, shape)
    tokens = _completions(text_key, right | ~negative)
    swapped = swap(tokens, jax.random.randint(place_key, shape, 0, (tokens != PAD).sum(axis=1)))
    return jnp.where((right | negative)[:, None], tokens, swapped)


def _states(rollout: Rollout) -> Array:
    """`[B, T]`, where the automaton of positive reviews is after each token."""
    read = symbols(rollout) | ((rollout.segment_ids != 0) & ~rollout.mask & (rollout.tokens != BOS))
    table = jnp.asarray(_automaton())

    def move(state, column):
        token, counts = column
        # Padding and what follows the end leave the state as it is.
        state = jnp.where(counts, table[state, token], state)
        return state, state

    start = jnp.full(len(rollout.tokens), START, jnp.int32)
    return jax.lax.scan(move, start, (rollout.tokens.T, read.T))[1].T


@cache
def _automaton() -> np.ndarray:
    """`[states, tokens]`, the state after a token: DEAD, START, END, and one for each place in a
    review.
    """
    number = {"dead": DEAD, "": START, str(len(SLOTS) - 1): END}
    moves = [
        (number.setdefault(a, len(number)), _ids(words), number.setdefault(b, len(number)))
        for a, words, b in _moves()
    ]
    table = np.full((len(number), len(VOCABULARY)), DEAD, np.int32)
    for state, words, then in moves:
        table[state, words] = then
    # The empty degree has the id of padding, but is no token that may be written.
    table[:, PAD] = DEAD
    return table


def _moves() -> Iterator[tuple[str, Sequence[str], str]]:
    """State, words, next state: the states of an opening are its words so far, the others their
    last word's slot.
    """
    for words in filter(None, (opening.split() for opening in OPENINGS)):
        for i, word in enumerate(words):
            yield (
                " ".join(words[:i]),
                [word],
                "opened" if i == len(words) - 1 else " ".join(words[: i + 1]),
            )
    yield "", ["the"], "the"
    yield "opened", ["the"], "the"
    yield "the", ASPECTS, "aspect"
    yield "aspect", VERBS, "0"
    # From a slot to those that may follow: a degree, the second opinion and the verdict may lack.
    skips = {0: (1, 2), 2: (3, 9, 13), 6: (7, 8), 8: (9, 13)}
    for i in range(len(SLOTS) - 1):
        for j in skips.get(i, (i + 1,)):
            yield str(i), SLOTS[j][True], str(j)
