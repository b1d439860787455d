"""Mixture of experts: each token goes through a few of many MLPs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf.fields import documented
from rlhf.sharding import fitting, ways

Array = jax.Array


@documented
class Routing(NamedTuple):
    """What a router did with each row's real tokens, summed over them; `losses.routing.balance`
    reads it.

    Attributes:
      probs: [B, E] float32, the router's probabilities.
      choices: [B, E] float32, tokens sent to each expert.
      tokens: [B] float32, tokens routed.
    """

    probs: Array
    choices: Array
    tokens: Array


def experts(
    x: Array,
    router: Any,
    gate: Array,
    up: Array,
    down: Array,
    real: Array,
    *,
    per_token: int,
    renormalise: bool,
    activate: Callable,
    cached: bool = False,
) -> tuple[Array, Routing]:
    """`Σ_{e in top-k} p_e down_e(act(gate_e x) · up_e x)`, `p = softmax(router x)`
    (arXiv:2101.03961; arXiv:2401.04088).

    Tokens are sorted by expert, so that each expert is one dense product of the rows that chose it
    (`jax.lax.ragged_dot`).  No token is dropped.  On a mesh with an axis `expert` each device has
    some of the experts, and gathers the tokens that the devices of this axis have.

    Args:
      x: `[B, T, D]`.  router: `[D, E]`, which meets x in at least float32.  gate, up: `[E, D, F]`.
        down: `[E, F, D]`.
      real: `[B, T]` bool; other tokens are left out of the statistics.
      per_token: k.  renormalise: divide the chosen p by their sum.
      cached: a loop of decoding steps, of which a mesh splits the rows alone.

    Returns: `[B, T, D]` in the dtype of x, and `Routing`.  Gradients flow through x, the experts
    and p; not through the choice.
    """
    local = partial(_local, per_token=per_token, renormalise=renormalise, activate=activate)
    # Elsewhere XLA places tokens and experts by itself.
    if ways("expert") * ways("sequence") == 1:
        return local(x, router, gate, up, down, real)
    names = ("decoded", None) if cached else ("batch", "sequence")
    rows, columns = of_tokens = fitting(names, real.shape)
    inner = fitting(("expert", None, "mlp"), gate.shape)
    outer = PartitionSpec(inner[0], inner[2], None)
    # Rows that this axis does not divide, such as a single prompt's, are on all of its devices.
    gathers = inner[0] in ((rows,) if isinstance(rows, str) else rows or ())
    local = jax.shard_map(
        partial(
            local,
            experts_axis=inner[0],
            gathers=gathers,
            inner_axis=inner[2],
            columns_axis=columns,
        ),
        in_specs=(of_tokens, PartitionSpec(), inner, inner, outer, of_tokens),
        out_specs=(of_tokens, PartitionSpec(rows)),
    )
    return local(x, router, gate, up, down, real)


def _local(
    x,
    router,
    gate,
    up,
    down,
    real,
    *,
    per_token,
    renormalise,
    activate,
    experts_axis=None,
    gathers=False,
    inner_axis=None,
    columns_axis=None,
):
    """`experts` of one device's tokens, by experts that stand in parts on the axes named.

    Args:
      gathers: tokens too stand in parts on the experts' axis.
    """
    batch, length, size = x.shape
    number = router.shape[1]
    flat = x.reshape(-1, size)
    # The router computes in float32 whatever the dtype of the rest: rounding would choose other
    # experts, in training than in sampling.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.matmul(flat.astype(wide), router.astype(wide), precision="highest")
    probs = jax.nn.softmax(logits, axis=-1)  # [N, E]
    weights, chosen = jax.lax.top_k(probs, per_token)  # [N, k]
    weights = weights / weights.sum(-1, keepdims=True) if renormalise else weights

    # Sums by row, not a loss: it multiplies means over the whole batch, which no device has alone.
    counted = real.astype(probs.dtype)
    picked = jax.nn.one_hot(chosen, number, dtype=probs.dtype).sum(1).reshape(batch, length, number)

    def over_row(z):
        return jnp.einsum("bte,bt->be", z, counted)

    routing = Routing(
        over_row(probs.reshape(batch, length, number)), over_row(picked), counted.sum(1)
    )
    if columns_axis:
        routing = jax.lax.psum(routing, columns_axis)

    routed = flat, weights, chosen
    if gathers:
        # Every device computes what its experts make of the tokens of all, and gets the sums of its
        # own.
        routed = (jax.lax.all_gather(z, experts_axis, tiled=True) for z in routed)
    first = jax.lax.axis_index(experts_axis) * gate.shape[0] if experts_axis else None
    y = _mixed(gate, up, down, activate, *routed, first=first)
    if gathers:
        y = jax.lax.psum_scatter(y, experts_axis, tiled=True)
    y = jax.lax.psum(y, tuple(filter(None, (None if gathers else experts_axis, inner_axis))))
    return y.astype(x.dtype).reshape(x.shape), routing


def _mixed(gate, up, down, activate, flat, weights, chosen, first=None):
    """`[N, D]`, added up in float32, what these experts add to tokens `[N, D]` that chose `[N, k]`.

    Args:
      first: these are the experts from this one on, and others are elsewhere; None: they are all.
    """
    number = gate.shape[0]
    expert = chosen.reshape(-1)
    if first is not None:
        # Other devices' experts come last, in no group.
        expert = jnp.where((expert >= first) & (expert < first + number), expert - first, number)
    # `ragged_dot` wants the rows of each expert side by side.  Each token stands there k times, and
    # `order // k` is the token that a sorted row came from.
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=number).astype(jnp.int32)
    of_token = order // chosen.shape[1]

    def product(rows, w):
        return jax.lax.ragged_dot(rows, w.astype(rows.dtype), sizes)

    def in_groups(rows):
        # What `ragged_dot` makes of rows in no group is undefined, and so is their gradient.
        if first is None:
            return rows
        return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], rows, 0)

    rows = in_groups(flat[of_token])
    out = in_groups(product(activate(product(rows, gate)) * product(rows, up), down))
    out = out.astype(weights.dtype) * weights.reshape(-1)[order][:, None]
    # Back at the tokens' places.
    return jnp.zeros(flat.shape, weights.dtype).at[of_token].add(out)
