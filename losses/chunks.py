"""Any per-position function of logits, without the logits of all positions at once."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array


def chunked(
    fn: Callable,
    hidden: Array,
    unembed: Callable,
    *per_token: Array,
    chunk_size: int = 64,
    needed: Array | None = None,
    parts: int = 1,
) -> Any:
    """`fn(unembed(hidden), *per_token)`, computed and differentiated at most `chunk_size` columns
    at a time.

    The logits `[B, T, V]` exist in neither the value nor the gradient: each chunk's are made, used
    and dropped, and made again on the way back (a rematerialised scan along T, so that a sharded B
    stays where it is).

    Args:
      fn: `(logits [B, C, V], *chunks [B, C, ...]) -> pytree of [B, C, ...]`; must treat each
        position by itself.
      hidden: `[B, T, D]`; gradients flow through it, and through whatever `unembed` closes over.
      unembed: `[..., D] -> [..., V]`, with its soft cap, bias and temperature.
      per_token: arrays `[B, T, ...]` that go along, for example target tokens.
      chunk_size: the most columns of a chunk; `B * chunk_size * V` numbers exist at a time.
      needed: `[B, T]` bool, the positions whose result is needed: a chunk without any is not computed,
        and is 0; None: all.
      parts: equal parts of the columns that lie on different devices: each has its chunks then,
        computed side by side.  Without effect where T does not divide.

    Returns: what `fn` returns, `[B, T, ...]`.

    Raises: ValueError where a per-token array or `needed` is not `[B, T, ...]`, or what `fn`
    returns not `[B, C, ...]`.

    >>> from rlhf.losses import logits
    >>> h, w, tokens = jnp.ones((1, 6, 2)), jnp.ones((2, 4)), jnp.zeros((1, 6), jnp.int32)
    >>> chunked(logits.token_logprob, h, lambda h: h @ w, tokens, chunk_size=4).shape
    (1, 6)
    """
    batch, length = hidden.shape[:2]
    for x in per_token if needed is None else (*per_token, needed):
        if x.shape[:2] != (batch, length):
            raise ValueError(
                f"per-token array {list(x.shape)} but hidden {list(hidden.shape)}: they differ in "
                "B or T"
            )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")

    if parts > 1 and length % parts == 0:
        # A part's columns as rows of their own: a scan along T would have one device after another
        # compute, or gather what it walks along.
        def fold(x):  # [B, T, ...] -> [parts * B, T / parts, ...]
            x = jnp.moveaxis(x.reshape(batch, parts, -1, *x.shape[2:]), 1, 0)
            return x.reshape(parts * batch, *x.shape[2:])

        def unfold(x):
            x = jnp.moveaxis(x.reshape(parts, batch, *x.shape[1:]), 0, 1)
            return x.reshape(batch, length, *x.shape[3:])

        folded = jax.tree.map(fold, (hidden, *per_token))
        needed = None if needed is None else fold(needed)
        out = chunked(fn, folded[0], unembed, *folded[1:], chunk_size=chunk_size, needed=needed)
        return jax.tree.map(unfold, out)

    def piece(hidden, *per_token):
        out = fn(unembed(hidden), *per_token)
        for x in jax.tree.leaves(out):
            if x.shape[:2] != hidden.shape[:2]:
                raise ValueError(
                    f"fn must return [B, C, ...] = {list(hidden.shape[:2])}, but returned "
                    f"{list(x.shape)}"
                )
        return out

    def piece_if_needed(needed, *arrays):
        if needed is None:
            return piece(*arrays)
        # Zeros of the shapes that `piece` would return; `eval_shape` computes nothing.
        nothing = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(piece, *arrays)
        )
        # A cond runs one branch alone, except under vmap, where it becomes a select of both.
        return jax.lax.cond(needed.any(), piece, lambda *arrays: nothing, *arrays)

    if length <= chunk_size:
        # One chunk still drops its logits after the forward pass: they are the largest array.
        return jax.checkpoint(piece_if_needed)(needed, hidden, *per_token)

    number = -(-length // chunk_size)
    # As few chunks as there can be, of equal size: 130 columns are 3 chunks of 44 (2 columns of
    # padding), where 64, 64 and 2 would be padded to 192.
    size = -(-length // number)

    def split(x):  # [B, T, ...] -> [number, B, C, ...]
        x = jnp.pad(x, [(0, 0), (0, number * size - length)] + [(0, 0)] * (x.ndim - 2))
        # A scan walks along the leading axis. B stays an axis of its own, so that it stays sharded.
        return jnp.moveaxis(x.reshape(batch, number, size, *x.shape[2:]), 1, 0)

    def join(x):  # [number, B, C, ...] -> [B, T, ...]
        return jnp.moveaxis(x, 0, 1).reshape(batch, number * size, *x.shape[3:])[:, :length]

    # Inside a scan, XLA cannot merge the recomputation with the forward pass anyway: the barrier
    # against it (`prevent_cse`) would only cost.
    step = jax.checkpoint(lambda _, xs: (None, piece_if_needed(*xs)), prevent_cse=False)
    _, out = jax.lax.scan(step, None, jax.tree.map(split, (needed, hidden, *per_token)))
    return jax.tree.map(join, out)
