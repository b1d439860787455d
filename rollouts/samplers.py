"""Samplers: a temperature and a composition of logit transforms.

A transform is a function `logits [..., V] -> logits [..., V]`, minus infinity where a token may not be sampled.  The ones here
are `jax.tree_util.Partial`s of module functions, so that their settings are arrays: changing one compiles nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

Array = jax.Array


class Sampler(NamedTuple):
    """How the next token is drawn from logits."""

    temperature: Any = 1.0  # [] float, divides the logits
    transforms: tuple[Callable, ...] = ()  # applied in order, after the temperature


def sampler(*transforms: Callable, temperature=1.0) -> Sampler:
    """`transforms` in order, of logits divided by `temperature`.

    Raises: ValueError where the temperature is not above 0 (for the likeliest token use `greedy()`).

    >>> s = sampler(top_k(2), temperature=0.5)
    >>> apply(s, jnp.array([0., 1., 2.]))[1].tolist()
    [-inf, 2.0, 4.0]
    """
    if isinstance(temperature, int | float) and not temperature > 0:
        raise ValueError(f"temperature must be above 0, but is {temperature}; for the likeliest token use greedy()")
    return Sampler(temperature, tuple(t if isinstance(t, Partial) else Partial(t) for t in transforms))


def greedy() -> Sampler:
    """The likeliest token, the first one on ties: `[..., V]` logits with all others at minus infinity.

    >>> apply(greedy(), jnp.array([0.0, 2.0, 2.0]))[1].tolist()
    [-inf, 2.0, -inf]
    """
    return Sampler(1.0, (Partial(_only_first_best),))


def apply(sampler: Sampler, logits: Array) -> tuple[Array, Array]:
    """Logits after the temperature, and after the transforms too.  `[..., V]` -> two of `[..., V]`."""
    tempered = logits / jnp.asarray(sampler.temperature, logits.dtype)
    filtered = tempered
    for transform in sampler.transforms:
        filtered = transform(filtered)
        if filtered.shape != logits.shape:
            raise ValueError(f"a logit transform must keep the shape {list(logits.shape)}, but returned {list(filtered.shape)}")
    return tempered, filtered


def draw(keys: Array, logits: Array) -> Array:
    """One token a row, from softmax(logits), by inverting the cumulative distribution: one random number a row.

    Args:
      keys: `[B]` keys, consumed.  logits: `[B, V]`.

    Returns: `[B]` int32; never a token of probability 0.
    """
    u = jax.vmap(lambda key: jax.random.uniform(key, (), logits.dtype))(keys)[:, None]
    cumulative = jnp.cumsum(jnp.exp(logits - logits.max(-1, keepdims=True)), axis=-1)
    return jnp.sum(cumulative <= u * cumulative[:, -1:], axis=-1, dtype=jnp.int32)


def top_k(k) -> Partial:
    """The `k` likeliest tokens, and whatever ties with the last of them  (Fan et al., arXiv:1805.04833).

    Args:
      k: a number of tokens, or a `[]` int32 array.

    Returns: a transform of logits `[..., V]`.

    Raises: ValueError where k is below 1.

    >>> top_k(1)(jnp.array([0.0, 2.0, 1.0])).tolist()
    [-inf, 2.0, -inf]
    """
    if isinstance(k, int) and k < 1:
        raise ValueError(f"k must be at least 1, but is {k}; leave the transform out for no limit")
    return Partial(_top_k, k=k)


def top_p(p) -> Partial:
    """The smallest set of likeliest tokens whose probabilities sum to at least `p`  (nucleus, arXiv:1904.09751).

    Args:
      p: a probability, or a `[]` float array; 1 keeps every token.

    Returns: a transform of logits `[..., V]`; whatever ties with the least likely token kept stays too.

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
        raise ValueError(f"p is a share of the likeliest token's probability, 0 <= p <= 1, but it is {p}")
    return Partial(_min_p, p=p)


def _top_k(logits, *, k):
    ascending = jnp.sort(logits, axis=-1)
    index = jnp.maximum(logits.shape[-1] - k, 0)
    return _keep(logits, logits >= jax.lax.dynamic_index_in_dim(ascending, index, axis=-1))


def _top_p(logits, *, p):
    descending = -jnp.sort(-logits, axis=-1)
    probs = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # the mass of likelier tokens; the likeliest always stays
    least = jnp.min(jnp.where(before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return _keep(logits, logits >= least)


def _min_p(logits, *, p):
    return _keep(logits, logits >= logits.max(-1, keepdims=True) + jnp.log(jnp.asarray(p, logits.dtype)))


def _only_first_best(logits):
    return _keep(logits, jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1], dtype=bool))


def _keep(logits, where):
    return jnp.where(where, logits, -jnp.inf)
