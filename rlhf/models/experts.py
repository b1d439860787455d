"""Mixture of experts: each token goes through a few of many MLPs."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.fields import documented

Array = jax.Array


@documented
class Routing(NamedTuple):
    """What a router did with each row's real tokens, summed over them; `losses.router_balance`
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
) -> tuple[Array, Routing]:
    """`Σ_{e in top-k} p_e down_e(act(gate_e x) · up_e x)`, `p = softmax(router x)`
    (arXiv:2101.03961; arXiv:2401.04088).

    Tokens are sorted by expert, so that each expert is one dense product of the rows that chose it
    (`jax.lax.ragged_dot`).  No token is dropped.

    Args:
      x: `[B, T, D]`.  router: `[D, E]`, which meets x in at least float32.  gate, up: `[E, D, F]`.
        down: `[E, F, D]`.
      real: `[B, T]` bool; other tokens are left out of the statistics.
      per_token: k.  renormalise: divide the chosen p by their sum.

    Returns: `[B, T, D]` in the dtype of x, and `Routing`.  Gradients flow through x, the experts
    and p; not through the choice.
    """
    batch, length, size = x.shape
    number = gate.shape[0]
    flat = x.reshape(-1, size)
    # The router computes in float32 whatever the dtype of the rest: rounding would choose other
    # experts, in training than in sampling.
    wide = jnp.promote_types(x.dtype, jnp.float32)
    logits = jnp.matmul(flat.astype(wide), router.astype(wide), precision="highest")
    probs = jax.nn.softmax(logits, axis=-1)  # [N, E]
    weights, chosen = jax.lax.top_k(probs, per_token)  # [N, k]
    weights = weights / weights.sum(-1, keepdims=True) if renormalise else weights

    # `ragged_dot` wants the rows of each expert side by side.  Each token stands there k times, and
    # `order // k` is the token that a sorted row came from.
    order = jnp.argsort(chosen.reshape(-1), stable=True)
    sizes = jnp.bincount(chosen.reshape(-1), length=number).astype(jnp.int32)
    of_token = order // per_token

    def product(rows, w):
        return jax.lax.ragged_dot(rows, w.astype(rows.dtype), sizes)

    rows = flat[of_token]
    out = product(activate(product(rows, gate)) * product(rows, up), down)
    out = out.astype(wide) * weights.reshape(-1)[order][:, None]
    # Added up in float32, back at the tokens' places.
    y = jnp.zeros(flat.shape, wide).at[of_token].add(out).astype(x.dtype)

    # Sums by row, not a loss: it multiplies means over the whole batch, which no device has alone.
    counted = real.astype(probs.dtype)
    picked = jax.nn.one_hot(chosen, number, dtype=probs.dtype).sum(1).reshape(batch, length, number)

    def over_row(z):
        return jnp.einsum("bte,bt->be", z, counted)

    routing = Routing(
        over_row(probs.reshape(batch, length, number)), over_row(picked), counted.sum(1)
    )
    return y.reshape(x.shape), routing
