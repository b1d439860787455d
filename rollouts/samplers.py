"""Samplers: a temperature and a composition of logit transforms.

A transform is a function `(logits [B, V], step) -> logits [B, V]`, minus infinity where a token may
not be sampled; `step` says what has been sampled so far, and from which hidden states the logits
were made.  The ones here are `jax.tree_util.Partial`s of module functions, so that their settings
are arrays: changing one compiles nothing.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from rlhf import ranges
from rlhf.fields import documented

Array = jax.Array
BLOCK = 32  # probabilities that are summed at a time when a token is drawn


@documented
class Sampler(NamedTuple):
    """How the next token is drawn from logits.

    Attributes:
      temperature: [] float, divides the logits.
      transforms: applied in order, after the temperature.
    """

    temperature: Any = 1.0
    transforms: tuple[Callable, ...] = ()


@documented
class Step(NamedTuple):
    """What a transform may look at beside the logits of the next token.

    Attributes:
      tokens: [B, T] int32, prompts and what was sampled so far.
      here: [B, T] bool, which of them are there yet, and no padding.
      sampled: [B, T] bool, which of those were sampled.
      column: [B] int32, where the next token will stand.
      new: [B] int32, tokens sampled so far.
      hidden: [B, D], what the logits were made from.
      temperature: [], that the logits were divided by.
    """

    tokens: Array
    here: Array
    sampled: Array
    column: Array
    new: Array
    hidden: Array
    temperature: Array


def sampler(*transforms: Callable, temperature=1.0) -> Sampler:
    """`transforms` in order, of logits divided by `temperature`.

    A transform of your own is any function `(logits [B, V], step) -> logits [B, V]`: ILQL's shift
    is `logits + beta * (Q - V)` of `step.hidden`.

    Raises: ValueError where the temperature is not above 0 (for the likeliest token use
    `greedy()`); TypeError where a transform does not take logits and step.

    >>> s = sampler(top_k(2), temperature=0.5)
    >>> apply(s, jnp.array([0., 1., 2.]))[1].tolist()
    [-inf, 2.0, 4.0]
    """
    if isinstance(temperature, int | float) and temperature not in ranges.between(
        0, 1e6, above=True
    ):
        raise ValueError(
            f"temperature must be above 0, but is {temperature}; for the likeliest token use "
            "greedy()"
        )
    for transform in transforms:
        try:
            inspect.signature(transform).bind(None, None)
        except TypeError as error:
            raise TypeError(
                f"a transform takes (logits, step), but {transform} does not: {error}"
            ) from None
    return Sampler(
        temperature, tuple(t if isinstance(t, Partial) else Partial(t) for t in transforms)
    )


def greedy() -> Sampler:
    """The likeliest token, the first one on ties: `[..., V]` logits with all others at minus
    infinity.

    >>> apply(greedy(), jnp.array([0.0, 2.0, 2.0]))[1].tolist()
    [-inf, 2.0, -inf]
    """
    return Sampler(1.0, (Partial(_only_first_best),))


def apply(sampler: Sampler, logits: Array, step: Step | None = None) -> tuple[Array, Array]:
    """Logits after the temperature, and after the transforms too.  `[B, V]` -> two of `[B, V]`."""
    # In the dtype of the logits: a float32 temperature would promote bfloat16.
    tempered = logits / jnp.asarray(sampler.temperature, logits.dtype)
    filtered = tempered
    for transform in sampler.transforms:
        filtered = transform(filtered, step)
        if filtered.shape != logits.shape:
            raise ValueError(
                f"a logit transform must keep the shape {list(logits.shape)}, but returned "
                f"{list(filtered.shape)}"
            )
    return tempered, filtered


def draw(u: Array, logits: Array) -> Array:
    """One token a row, from softmax(logits), by inverting the cumulative distribution: one random
    number a row.

    Args:
      u: `[B]`, uniform in [0, 1).  logits: `[B, V]`.

    Returns: `[B]` int32; never a token of probability 0.

    >>> draw(jnp.array([0.2, 0.3]), jnp.log(jnp.array([[0.25, 0.75], [0.25, 0.75]]))).tolist()
    [0, 1]
    """
    levels = [jnp.exp(logits - logits.max(-1, keepdims=True))]
    # Sums of blocks, then sums of those sums: a running sum over all tokens would cost more.
    while levels[-1].shape[1] > BLOCK:
        levels.append(_blocks(levels[-1]).sum(-1))
    index = jnp.zeros_like(u, jnp.int32)
    target = u.astype(logits.dtype) * levels[-1].sum(-1)
    # From the top level down, each look-up narrows the choice to one block of the next.
    for level in reversed(levels):
        block = jnp.take_along_axis(_blocks(level), index[:, None, None], axis=1)[:, 0]
        place, target = _invert(block, target)
        index = index * BLOCK + place
    return index


def _blocks(weights: Array) -> Array:
    """`[B, N]` -> `[B, N / BLOCK, BLOCK]`, zeros at the end."""
    return jnp.pad(weights, ((0, 0), (0, -weights.shape[1] % BLOCK))).reshape(
        weights.shape[0], -1, BLOCK
    )


def _invert(weights: Array, target: Array) -> tuple[Array, Array]:
    """The first index at which the running sum of weights `[B, N]` passes the target `[B]`, and
    what is left of the target.
    """
    size = weights.shape[1]
    # A running sum of 32 numbers as a product with a triangular matrix. "highest", since the
    # default precision of accelerators would round probabilities.
    upto = jnp.dot(weights, jnp.triu(jnp.ones((size, size), weights.dtype)), precision="highest")
    # Only tokens of probability above 0 may be chosen. A product may add up two neighbours in
    # different orders, so that a sum seems to rise where the weight is 0.
    places = jnp.arange(size)[None, :]
    there = weights > 0
    # The last possible token, where rounding takes the target beyond the total.
    last = jnp.max(jnp.where(there, places, 0), axis=-1, keepdims=True)
    index = jnp.min(jnp.where(there & (upto > target[:, None]), places, last), axis=-1)
    before = jnp.take_along_axis(upto - weights, index[:, None], axis=-1)[:, 0]
    # Below 0 the next level would take its first token, even one of weight 0.
    return index, jnp.maximum(target - before, 0)


def top_k(k) -> Partial:
    """The `k` likeliest tokens, and whatever ties with the last of them  (Fan et al.,
    arXiv:1805.04833).

    Args:
      k: a number of tokens, or a `[]` int32 array.

    Returns: a transform of logits `[..., V]`.

    Raises: ValueError where k is below 1.

    >>> top_k(1)(jnp.array([0.0, 2.0, 1.0])).tolist()
    [-inf, 2.0, -inf]
    """
    if isinstance(k, int | float) and not (isinstance(k, int) and k >= 1):
        raise ValueError(f"k must be at least 1, but is {k}; leave the transform out for no limit")
    return Partial(_top_k, k=k)


def top_p(p) -> Partial:
    """The smallest set of likeliest tokens whose probabilities sum to at least `p`  (nucleus,
    arXiv:1904.09751).

    Args:
      p: a probability, or a `[]` float array; 1 keeps every token.

    Returns: a transform of logits `[..., V]`; whatever ties with the least likely token kept stays
    too.

    Raises: ValueError where p is outside (0, 1].

    >>> top_p(0.5)(jnp.log(jnp.array([0.3, 0.6, 0.1]))).tolist()
    [-inf, -0.5108, -inf]
    """
    if isinstance(p, int | float) and not 0 < p <= 1:
        raise ValueError(f"p is a probability, 0 < p <= 1, but it is {p}")
    return Partial(_top_p, p=p)


def min_p(p) -> Partial:
    """Tokens at least `p` times as likely as the likeliest  (arXiv:2407.01082).

    Args:
      p: a share of the likeliest token's probability, or a `[]` float array; 0 keeps every token.

    Returns: a transform of logits `[..., V]`.

    Raises: ValueError where p is outside [0, 1].

    >>> min_p(0.5)(jnp.log(jnp.array([0.3, 0.6, 0.1]))).tolist()
    [-1.204, -0.5108, -inf]
    """
    if isinstance(p, int | float) and not 0 <= p <= 1:
        raise ValueError(
            f"p is a share of the likeliest token's probability, 0 <= p <= 1, but it is {p}"
        )
    return Partial(_min_p, p=p)


def repetition_penalty(penalty) -> Partial:
    """`l / penalty` where l > 0, else `l penalty`, for tokens of the prompt and the completion
    (CTRL, arXiv:1909.05858).

    Args:
      penalty: above 1 to discourage; 1 changes nothing.

    Returns: a transform of logits `[B, V]`.

    Raises: ValueError where the penalty is not above 0.
    """
    if isinstance(penalty, int | float) and penalty not in ranges.between(0, 1000, above=True):
        raise ValueError(
            f"the repetition penalty divides logits and must be above 0, but is {penalty}; 1 "
            "changes nothing"
        )
    return Partial(_repetition_penalty, penalty=penalty)


def presence_penalty(penalty) -> Partial:
    """`l - penalty / temperature` for tokens that were sampled before, once each: the logits lose
    `penalty`, as vLLM has it.

    Args:
      penalty: in units of logits; below 0 to encourage.

    Returns: a transform of logits `[B, V]`.
    """
    return Partial(_count_penalty, penalty=_subtracted(penalty), most=1)


def frequency_penalty(penalty) -> Partial:
    """`l - n penalty / temperature` for tokens that were sampled n times before: as
    `presence_penalty`, for each time.
    """
    return Partial(_count_penalty, penalty=_subtracted(penalty), most=jnp.iinfo(jnp.int32).max)


def banned(words: Sequence[Sequence[int]]) -> Partial:
    """No word is completed: its last token gets minus infinity where the tokens before it stand
    there already.

    Args:
      words: token sequences; `[[7]]` bans token 7.

    Returns: a transform of logits `[B, V]`.

    Raises: ValueError where a word is empty or has a token below 0, or there is none.  One beyond
    the vocabulary makes NaN.
    """
    if not words or not all(len(word) for word in words):
        raise ValueError(
            "banned words have at least one token, for example [[7], [3, 4]], but got "
            f"{list(map(list, words))}"
        )
    _check_tokens("banned words", [token for word in words for token in word])
    longest = max(map(len, words))
    # Short words are padded on the left with -1, which matches anything.
    padded = np.full((len(words), longest), -1, np.int32)
    for row, word in zip(padded, words, strict=True):
        row[longest - len(word) :] = word
    return Partial(_banned, words=jnp.asarray(padded))


def allowed(tokens) -> Partial:
    """Only these tokens.

    Args:
      tokens: `[N]` int32 ids, or a mask `[V]` or `[B, V]` bool.

    Returns: a transform of logits `[B, V]`; NaN where one of them is beyond the vocabulary.

    Raises: ValueError where a token is below 0.
    """
    _check_tokens("allowed tokens", tokens)
    return Partial(_allowed, tokens=jnp.asarray(tokens))


def min_new_tokens(n, eos_ids: Sequence[int]) -> Partial:
    """No end token before `n` tokens were sampled.

    Args:
      n: tokens, a number or a `[]` int32 array.  eos_ids: as `generate` has them.

    Returns: a transform of logits `[B, V]`; NaN where an end token is beyond the vocabulary.

    Raises: ValueError where an end token is below 0.
    """
    _check_tokens("eos_ids", eos_ids)
    return Partial(_min_new_tokens, n=n, eos_ids=jnp.asarray(eos_ids, jnp.int32))


def _top_k(logits, step=None, *, k):
    ascending = jnp.sort(logits, axis=-1)
    # `k` may be traced: `top_k` would need a number that is known when it is compiled.
    index = jnp.maximum(logits.shape[-1] - k, 0)
    return _keep(logits, logits >= jax.lax.dynamic_index_in_dim(ascending, index, axis=-1))


def _top_p(logits, step=None, *, p):
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    # The mass of likelier tokens: 0 for the likeliest, which therefore always stays.
    before = jnp.cumsum(probs, axis=-1) - probs
    least = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return _keep(logits, logits >= least)


def _min_p(logits, step=None, *, p):
    return _keep(
        logits, logits >= logits.max(-1, keepdims=True) + jnp.log(jnp.asarray(p, logits.dtype))
    )


def _only_first_best(logits, step=None):
    return _keep(logits, jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool))


def _repetition_penalty(logits, step, *, penalty):
    there = _times(logits, step.tokens, step.here) > 0
    return jnp.where(there, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def _count_penalty(logits, step, *, penalty, most):
    times = jnp.minimum(_times(logits, step.tokens, step.sampled), most)
    # The logits were divided by the temperature already: so is the penalty, as vLLM's comes first.
    return logits - (times * penalty / step.temperature).astype(logits.dtype)


def _subtracted(penalty):
    """The penalty.  Raises: ValueError where a Python number is no finite one; traced values are
    trusted.
    """
    if isinstance(penalty, int | float) and penalty not in ranges.between(-1000, 1000):
        raise ValueError(
            f"a penalty must be a number at least -1,000 and at most 1,000, but is {penalty}"
        )
    return penalty


def _times(logits, tokens, where):
    """How often each token of the vocabulary stands in a row, `[B, V]` int32."""
    rows = jnp.arange(tokens.shape[0])[:, None]
    return jnp.zeros(logits.shape, jnp.int32).at[rows, tokens].add(where.astype(jnp.int32))


def _banned(logits, step, *, words):
    before = (
        step.column[:, None] - jnp.arange(words.shape[1] - 1, 0, -1)[None, :]
    )  # [B, n - 1] columns
    at = jnp.maximum(before, 0)
    last = jnp.take_along_axis(step.tokens, at, axis=1)
    here = jnp.take_along_axis(step.here, at, axis=1) & (before >= 0)
    same = here[:, None] & (last[:, None] == words[None, :, :-1])
    completes = (same | (words[None, :, :-1] < 0)).all(-1)  # [B, W]
    rows = jnp.arange(logits.shape[0])[:, None]
    logits = _if_known(logits, words)
    # `min` with infinity changes nothing: words that are not completed here leave their token
    # alone.
    return logits.at[rows, words[None, :, -1]].min(
        jnp.where(completes, -jnp.inf, jnp.inf).astype(logits.dtype)
    )


def _allowed(logits, step=None, *, tokens):
    if tokens.dtype == jnp.bool_:
        return _keep(logits, jnp.broadcast_to(tokens, logits.shape))
    return _keep(_if_known(logits, tokens), jnp.zeros(logits.shape, bool).at[:, tokens].set(True))


def _min_new_tokens(logits, step, *, n, eos_ids):
    logits = _if_known(logits, eos_ids)
    early = logits.at[:, eos_ids].set(-jnp.inf)
    return jnp.where((step.new < n)[:, None], early, logits)


def _keep(logits, where):
    return jnp.where(where, logits, -jnp.inf)


def _if_known(logits, tokens):
    """Logits, NaN where a token is beyond their vocabulary."""
    return jnp.where((tokens < logits.shape[-1]).all(), logits, jnp.nan)


def _check_tokens(name: str, tokens) -> None:
    """Raises where one is below 0; traced ones are not looked at."""
    if isinstance(tokens, jax.core.Tracer) or np.asarray(tokens).dtype == bool:
        return
    if below := [int(token) for token in np.asarray(tokens).reshape(-1) if token < 0]:
        raise ValueError(f"{name} have token {below[0]}, but tokens count from 0")
