"""Layers of several kinds: which parameters each has, where they lie in the stacks, what repeats."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from rlhf.from_flax import no_mesh
from rlhf.models.block import Block, Extra
from rlhf.models.config import Heads, LayerKind, TransformerConfig


def initial(c: TransformerConfig, kind: LayerKind, key: jax.Array) -> dict[str, Any]:
    """The parameters of one layer, with their axes."""
    one = jnp.ones((1, 1), jnp.int32)
    where = dict(positions=one, segment_ids=one)
    # `parent=None`: a block of its own, wherever it is asked for.
    return Block(c, parent=None).init(
        key,
        x=jnp.zeros((1, 1, c.hidden_size), c.dtype),
        kind=kind,
        rotations={},
        cached=None,
        attention_inputs=where,
        extra=Extra(cross=where, lent=nothing_lent(c, 1, 1)),
    )["params"]


def nothing_lent(
    c: TransformerConfig, batch: int, length: int
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Keys and values that later layers take, before there are any, by the name of their lender."""
    lenders = {kind.lends: kind.heads for kind in c.kinds if kind.lends is not None}
    out = {}
    for name, heads in lenders.items():
        heads = heads or Heads(c.width, c.kv_heads)
        zeros = jnp.zeros((batch, heads.kv_heads, length, heads.width), c.dtype)
        out[name] = zeros, zeros
    return out


@functools.cache
def leaves(c: TransformerConfig, kind: LayerKind) -> frozenset[str]:
    """The names of a layer's parameters."""
    with no_mesh():
        return frozenset(jax.eval_shape(lambda: initial(c, kind, jax.random.key(0))))


@functools.cache
def _ranks(c: TransformerConfig) -> dict[str, list[int]]:
    of_kinds = [leaves(c, c.kind(i)) for i in range(c.num_layers)]
    out = {name: [0] for name in frozenset().union(*of_kinds)}
    for here in of_kinds:
        for name, ranks in out.items():
            ranks.append(ranks[-1] + (name in here))
    return out


def all_leaves(c: TransformerConfig) -> frozenset[str]:
    """The names of the parameters of all layers."""
    return frozenset(_ranks(c))


def rank(c: TransformerConfig, name: str, i: int) -> int:
    """How many of the first i layers have this leaf: a leaf is stacked over those that have it.

    >>> from rlhf.models.config import Experts
    >>> kinds = LayerKind(), LayerKind(sparse=True)
    >>> c = TransformerConfig(8, 4, 4, 1, 8, kinds=kinds, experts=Experts(2, 1, 4))
    >>> rank(c, "q", 3), rank(c, "gate", 3), rank(c, "router", 3)
    (3, 2, 1)
    """
    ranks = _ranks(c)
    return ranks[name][i] if name in ranks else i


def runs(kinds: Sequence[LayerKind]) -> list[tuple[int, int]]:
    """`(pattern, times)` one after another: so many layers, which repeat so often.

    >>> a, b = LayerKind(), LayerKind(window=3)
    >>> runs([a, b, b, b, a]), runs([a, b, a, b, a])
    ([(1, 1), (1, 3), (1, 1)], [(2, 2), (1, 1)])
    """
    out = []
    start = 0
    while start < len(kinds):
        left = kinds[start:]
        # A scan compiles the pattern: of those that cover as many layers the shortest.
        best = max(range(1, len(left) // 2 + 1), key=lambda n: (_covered(left, n), -n), default=1)
        times = max(1, _covered(left, best) // best)
        out.append((best, times) if times > 1 else (1, 1))
        start += out[-1][0] * out[-1][1]
    return out


def _covered(kinds: Sequence[LayerKind], period: int) -> int:
    """Layers at the start that repeat the first `period`, all of it and more than once; else 0."""
    same = next((i for i in range(period, len(kinds)) if kinds[i] != kinds[i - period]), len(kinds))
    times = same // period
    return times * period if times > 1 else 0
