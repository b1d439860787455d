"""Mixture of experts: each token goes through a few of many MLPs."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf.fields import documented
from rlhf.models.config import Experts
from rlhf.models.linear import rows as as_rows
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


@documented
class Routed(NamedTuple):
    """What a layer's router did.

    Attributes:
      routing: summed over each row.
      chosen: [B, T, k] int32, each token's experts, the best first.
    """

    routing: Routing
    chosen: Array


@documented
class Router(NamedTuple):
    """What chooses experts.

    Attributes:
      weight: [D, E].
      bias: [E]; or None.
      correction: [E], added to the scores for the choice alone; or None.
      scale: [E], of the weights, at last; or None.
    """

    weight: Any
    bias: Array | None = None
    correction: Array | None = None
    scale: Array | None = None


@documented
class Weights(NamedTuple):
    """Of experts, stacked; biases may be None.

    Attributes:
      gate: [E, D, F].
      up: [E, D, F].
      down: [E, F, D].
      gate_bias: [E, F].
      up_bias: [E, F].
      down_bias: [E, D].
    """

    gate: Any
    up: Any
    down: Any
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None


def experts(
    x: Array,
    router: Router,
    weights: Weights,
    real: Array,
    config: Experts,
    activate: Callable,
    *,
    cached: bool = False,
    router_input: Array | None = None,
    chosen: Array | None = None,
) -> tuple[Array, Routed]:
    """`Σ_{e chosen} w_e down_e(act(gate_e x) · up_e x)`, weights and choice by `route`
    (arXiv:2101.03961; arXiv:2401.04088).

    Tokens are sorted by expert, so that each expert is one dense product of the rows that chose it
    (`jax.lax.ragged_dot`).  No token is dropped.  On a mesh with an axis `expert` each device has
    some of the experts, and gathers the tokens that the devices of this axis have.

    Args:
      x: `[B, T, D]`.
      router: meets x in at least float32.
      weights: of the experts.
      real: `[B, T]` bool; other tokens are left out of the statistics.
      config: of the layer.
      activate: act.
      cached: a loop of decoding steps, of which a mesh splits the rows alone.
      router_input: `[B, T, D]`, what the router reads; None: x.
      chosen: `[B, T, k]` int32, experts to take in place of the router's choice, such as those of
        the policy that sampled; the weights are the router's.

    Returns: `[B, T, D]` in the dtype of x, and `Routed`.  Gradients flow through x, the experts
    and the weights; not through the choice.
    """
    local = partial(_local, config=config, activate=activate)
    router_input = x if router_input is None else router_input
    # Elsewhere XLA places tokens and experts by itself.
    if ways("expert") * ways("sequence") == 1:
        return local(x, router_input, router, weights, real, chosen)
    names = ("decoded", None) if cached else ("batch", "sequence")
    rows, columns = of_tokens = fitting(names, real.shape)
    inner = fitting(("expert", None, "mlp"), weights.gate.shape)
    outer = PartitionSpec(inner[0], inner[2], None)
    of_bias = PartitionSpec(inner[0], inner[2])
    specs = (
        *(_specs(w, spec) for w, spec in zip(weights[:3], (inner, inner, outer), strict=True)),
        *(of_bias, of_bias, PartitionSpec(inner[0], None)),
    )
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
        in_specs=(
            of_tokens,
            of_tokens,
            PartitionSpec(),
            Weights._make(specs),
            of_tokens,
            of_tokens,
        ),
        out_specs=(of_tokens, Routed._make((PartitionSpec(rows), of_tokens))),
    )
    return local(x, router_input, router, weights, real, chosen)


def _specs(w: Any, spec: PartitionSpec) -> Any:
    """Of a stack of matrices, or of one with an adapter."""
    return w.specs(spec) if hasattr(w, "specs") else spec


def route(
    logits: Array, correction: Array | None, config: Experts, replayed: Array | None = None
) -> tuple[Array, Array, Array]:
    """Which experts a token goes to, and with which weights.

    Args:
      logits: `[N, E]`.
      correction: `[E]`, or None.
      config: scores s of the logits, and how weights w follow from the chosen ones.
      replayed: `[N, k]` int32, the choice, where it is made already.

    Returns: w `[N, k]`; the experts chosen `[N, k]` int32; and probabilities `[N, E]` for a
    balance loss: s, over its sum where it has none.
    """
    if config.scores == "sparsemixer":
        return _sparsemixer(logits, config.per_token, replayed)
    probs = jax.nn.softmax(logits, axis=-1)
    scores = probs
    if config.scores == "sigmoid":
        scores = jax.nn.sigmoid(logits)
        probs = scores / scores.sum(-1, keepdims=True)
    ranked = scores if correction is None else scores + as_rows(correction, scores)
    if replayed is None:
        _, chosen = jax.lax.top_k(_in_best_groups(ranked, config), config.per_token)
    else:
        chosen = replayed
    weights = jnp.take_along_axis(logits if config.scores == "chosen" else scores, chosen, axis=-1)
    if config.scores == "chosen":
        weights = jax.nn.softmax(weights, axis=-1)
    elif config.renormalise:
        weights = weights / (weights.sum(-1, keepdims=True) + TINY)
    return weights * config.scale, chosen, probs


TINY = 1e-20  # beside a sum of scores


def _in_best_groups(ranked: Array, config: Experts) -> Array:
    """Scores `[N, E]`, -inf outside the best groups of each token  (arXiv:2405.04434, sec. 2.2.2)."""
    if config.groups == 1:
        return ranked
    groups = ranked.reshape(len(ranked), config.groups, -1)
    of_group = jax.lax.top_k(groups, config.group_best)[0].sum(-1)
    _, best = jax.lax.top_k(of_group, config.groups_per_token)
    allowed = jax.nn.one_hot(best, config.groups, dtype=jnp.int32).sum(1) > 0
    return jnp.where(allowed[:, :, None], groups, -jnp.inf).reshape(ranked.shape)


JITTER = 0.01


def _sparsemixer(logits: Array, number: int, replayed: Array | None) -> tuple[Array, Array, Array]:
    """One expert after another: the best of those left, with its softmax among those whose logits
    are near its own  (arXiv:2310.00811).
    """
    weights = []
    chosen = []
    left = logits
    for i in range(number):
        best = left.argmax(-1, keepdims=True) if replayed is None else replayed[:, i : i + 1]
        most = left.max(-1, keepdims=True)
        far = (most - logits) / jnp.maximum(jnp.abs(logits), most) > 2 * JITTER
        near = jax.nn.softmax(jnp.where(far, -jnp.inf, left), axis=-1)
        weights.append(jnp.take_along_axis(near, best, axis=-1))
        chosen.append(best)
        left = jnp.where(jnp.arange(logits.shape[-1])[None] == best, -jnp.inf, left)
    probs = jax.nn.softmax(logits, axis=-1)
    return jnp.concatenate(weights, -1), jnp.concatenate(chosen, -1).astype(jnp.int32), probs


def _local(
    x,
    router_input,
    router,
    weights,
    real,
    replayed,
    *,
    config,
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
    number = config.number
    flat = x.reshape(-1, size)
    # The router computes in float32 whatever the dtype of the rest: rounding would choose other
    # experts, in training than in sampling.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.matmul(
        router_input.reshape(-1, size).astype(wide), router.weight.astype(wide), precision="highest"
    )
    logits = logits if router.bias is None else logits + as_rows(router.bias, logits)
    replayed = None if replayed is None else replayed.reshape(len(flat), -1)
    shares, chosen, probs = route(logits, router.correction, config, replayed)
    if router.scale is not None:
        shares = shares * router.scale.astype(wide)[chosen]

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

    routed = flat, shares, chosen
    if gathers:
        # Every device computes what its experts make of the tokens of all, and gets the sums of its
        # own.
        routed = (jax.lax.all_gather(z, experts_axis, tiled=True) for z in routed)
    first = jax.lax.axis_index(experts_axis) * weights.gate.shape[0] if experts_axis else None
    if inner_axis and weights.down_bias is not None:
        # Devices add up what they make: one of them adds the bias.
        is_first = jax.lax.axis_index(inner_axis) == 0
        weights = weights._replace(down_bias=weights.down_bias * is_first)
    y = _mixed(weights, partial(_glu, config.clamp, activate), config, *routed, first)
    if gathers:
        y = jax.lax.psum_scatter(y, experts_axis, tiled=True)
    y = jax.lax.psum(y, tuple(filter(None, (None if gathers else experts_axis, inner_axis))))
    chosen = chosen.reshape(batch, length, -1).astype(jnp.int32)
    return y.astype(x.dtype).reshape(x.shape), Routed(routing, chosen)


def _glu(clamp: tuple[float, float] | None, activate: Callable, gate: Array, up: Array) -> Array:
    if clamp is None:
        return activate(gate) * up
    alpha, limit = clamp
    gate = jnp.minimum(gate, limit)
    return (jnp.clip(up, -limit, limit) + 1) * gate * jax.nn.sigmoid(alpha * gate)


def _mixed(weights: Weights, glu: Callable, config: Experts, flat, shares, chosen, first):
    """`[N, D]`, added up in float32, what these experts add to tokens `[N, D]` that chose `[N, k]`.

    Args:
      first: these are the experts from this one on, and others are elsewhere; None: they are all.
    """
    number = weights.gate.shape[0]
    expert = chosen.reshape(-1)
    if first is not None:
        # Other devices' experts come last, in no group.
        expert = jnp.where((expert >= first) & (expert < first + number), expert - first, number)
    # `ragged_dot` wants the rows of each expert side by side.  Each token stands there k times, and
    # `order // k` is the token that a sorted row came from.
    order = jnp.argsort(expert, stable=True)
    sizes = jnp.bincount(expert, length=number).astype(jnp.int32)
    of_token = order // chosen.shape[1]

    sorted_expert = expert[order]

    def plain(rows, w):
        return jax.lax.ragged_dot(rows, w.astype(rows.dtype), sizes)

    def product(rows, w, bias):
        y = (
            w.grouped_matmul(rows, plain, sorted_expert)
            if hasattr(w, "grouped_matmul")
            else plain(rows, w)
        )
        # Rows in no group have no bias either.
        return (
            y
            if bias is None
            else y + bias.astype(y.dtype).at[sorted_expert].get(mode="fill", fill_value=0)
        )

    def in_groups(rows):
        # What `ragged_dot` makes of rows in no group is undefined, and so is their gradient.
        if first is None:
            return rows
        return jnp.where((jnp.arange(len(rows)) < sizes.sum())[:, None], rows, 0)

    rows = in_groups(flat[of_token])
    sorted_shares = shares.reshape(-1)[order][:, None]
    if config.weighs_input:
        rows = (rows * sorted_shares).astype(rows.dtype)
    w = weights
    h = glu(product(rows, w.gate, w.gate_bias), product(rows, w.up, w.up_bias))
    out = in_groups(product(h, w.down, w.down_bias)).astype(shares.dtype)
    out = out if config.weighs_input else out * sorted_shares
    # Back at the tokens' places.
    return jnp.zeros(flat.shape, shares.dtype).at[of_token].add(out)
