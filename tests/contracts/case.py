"""What the contract suite must know of a function: its arrays, its knobs, and what is promised of it."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from rlhf import losses

ROWS, COLUMNS, VOCABULARY, SAMPLES = 8, 6, 7, 4
EMPTY = 3  # the row that nothing is trained of
NONE: dict = {}


class Case(NamedTuple):
    """A function and what is promised of it."""

    inputs: Callable  # (rng) -> its arrays by name, `[ROWS, COLUMNS, ...]` where they are per token
    flow: tuple = ()  # the arrays that gradients flow through
    knobs: dict = NONE  # Python numbers, which may be arrays as well
    static: dict = NONE  # Python numbers that make shapes
    couples: bool = False  # a row's result depends on the other rows
    per: str = "token"  # what an output has one entry for: token, row or batch
    empty: float = 0.0  # the result where nothing is trained
    fn: Callable | None = None  # stands for a function whose arguments are not all arrays
    untrained: bool = False  # untrained tokens of a sequence have results too
    apart: tuple = ()  # arrays whose shape is not that of the others, and is checked in a test of its own
    per_sequence: tuple = ()  # arrays with one number a sequence
    moves: bool = False  # only moves numbers: they keep their dtype
    refuses: tuple = ()  # pairs (knobs, message): what is out of range, and the error


def normal(*names, shape=(ROWS, COLUMNS)):
    """Builds normal arrays, each a little away from the first, so that ratios of their exponentials fall on all sides of 1."""

    def inputs(rng):
        first = rng.normal(size=shape)
        return {
            name: first + 0.4 * rng.normal(size=shape) if i else first
            for i, name in enumerate(names)
        }

    return inputs


def masked(*names):
    """`normal`, and a mask with gaps, one full row and one empty one."""

    def inputs(rng):
        mask = rng.random((ROWS, COLUMNS)) < 0.7
        mask[0], mask[EMPTY], mask[2, :2], mask[4, 0] = True, False, (False, True), True
        return {**normal(*names)(rng), "mask": mask}

    return inputs


def also(inputs, **more):
    return lambda rng: inputs(rng) | {name: make(rng) for name, make in more.items()}


def some_weights(rng):
    return rng.normal(size=(ROWS, COLUMNS)) * (rng.random((ROWS, COLUMNS)) < 0.7)


def packed_ids(rng):
    lengths = rng.integers(1, COLUMNS - 2, size=(ROWS, 1))
    return {
        "segment_ids": np.where(
            np.arange(COLUMNS) < COLUMNS - 1, 1 + (np.arange(COLUMNS) >= lengths), 0
        ).astype(np.int32)
    }


def chunked_logprob(hidden, weight, tokens):
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    unembed = lambda h: h.astype(wide) @ weight.astype(wide)
    return losses.chunked(losses.logits.token_logprob, hidden, unembed, tokens, chunk_size=4)


def chunked_nll(hidden, weight, tokens):
    wide = jnp.promote_types(hidden.dtype, jnp.float32)
    unembed = lambda h: h.astype(wide) @ weight.astype(wide)
    nll = lambda logits, tokens: (-losses.logits.token_logprob(logits, tokens), None)
    weights = jnp.ones(tokens.shape)
    return losses.chunked_sum(nll, hidden, unembed, weights, tokens, chunk_size=4)[0]


def grouped(*names, shape=(ROWS, SAMPLES)):
    """`[P, G]` arrays, the first with samples that could not be scored."""

    def inputs(rng):
        arrays = normal(*names, shape=shape)(rng)
        first = arrays[names[0]]
        first[1, 2], first[4, 1:] = np.nan, np.nan  # one sample left out, a group of one
        return arrays

    return inputs


vector = lambda rng: rng.normal(size=ROWS)
token_ids = lambda rng: rng.integers(VOCABULARY, size=(ROWS, COLUMNS)).astype(np.int32)
logit_array = lambda rng: rng.normal(size=(ROWS, COLUMNS, VOCABULARY))
pairs = normal("chosen", "rejected", "ref_chosen", "ref_rejected", shape=(ROWS,))
