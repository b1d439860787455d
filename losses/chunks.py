"""Any per-position function of logits, without the logits of all positions at once."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from rlhf.losses._common import Array
from rlhf.losses.weights import weighted_sum


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
    at a time; `chunked_sum` costs less where `fn` is a loss.

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
    _check(hidden, (*per_token, needed), chunk_size)
    chunks = _Chunks.of(hidden.shape[1], chunk_size, parts)
    piece = partial(_piece, fn, unembed)

    def piece_if_needed(needed, *arrays):
        return _if_needed(needed, piece, *arrays)

    arrays = chunks.split((needed, hidden, *per_token))
    if chunks.number == 1:
        # One chunk still drops its logits after the forward pass: they are the largest array.
        out = jax.checkpoint(piece_if_needed)(*jax.tree.map(lambda x: x[0], arrays))
        return chunks.join(jax.tree.map(lambda x: x[None], out))
    # Inside a scan, XLA cannot merge the recomputation with the forward pass anyway: the barrier
    # against it (`prevent_cse`) would only cost.
    step = jax.checkpoint(lambda _, xs: (None, piece_if_needed(*xs)), prevent_cse=False)
    _, out = jax.lax.scan(step, None, arrays)
    return chunks.join(out)


def chunked_sum(
    fn: Callable,
    hidden: Array,
    unembed: Callable,
    weights: Array,
    *per_token: Any,
    chunk_size: int = 64,
    needed: Array | None = None,
    parts: int = 1,
) -> tuple[Array, Any]:
    """`Σ w loss` and `aux` of `loss, aux = fn(unembed(hidden), *per_token)`, at most `chunk_size`
    columns at a time.

    The logits `[B, T, V]` never exist, and each chunk's are made once: its part of the gradient is
    taken with its part of the loss, and scaled on the way back.  `chunked`, which has to wait for
    the derivative of each result, makes them twice.

    Args:
      fn: `(logits [B, C, V], *chunks [B, C, ...]) -> (loss [B, C], aux)`, with `aux` a pytree of
        `[B, C, ...]`; must treat each position by itself.  No gradients flow to what it closes over.
      hidden: `[B, T, D]`; gradients flow from the sum through it, and through whatever `unembed`
        closes over, and none from `aux`.
      unembed: `[..., D] -> [..., V]`, with its soft cap, bias and temperature.
      weights: `[B, T]` w; where it is 0, the loss may be anything.
      per_token: pytrees of `[B, T, ...]` that go along; no gradients flow through them.
      chunk_size, needed, parts: as in `chunked`.

    Returns: the sum, a scalar in at least float32, and `aux`, of `[B, T, ...]`.

    Raises: as `chunked`.

    >>> from rlhf.losses import logits
    >>> h, w, tokens = jnp.ones((1, 6, 2)), jnp.ones((2, 4)), jnp.zeros((1, 6), jnp.int32)
    >>> nll = lambda x, tokens: (-logits.token_logprob(x, tokens), logits.is_top1(x, tokens))
    >>> total, right = chunked_sum(nll, h, lambda h: h @ w, jnp.ones((1, 6)), tokens, chunk_size=4)
    >>> total.item(), right.shape
    (8.318, (1, 6))
    """
    _check(hidden, (weights, *per_token, needed), chunk_size)
    chunks = _Chunks.of(hidden.shape[1], chunk_size, parts)
    example = jax.eval_shape(lambda: chunks.split(hidden)[0])
    # What `unembed` closes over, as arguments, since a derivative is taken of them by hand.
    unembed, parameters = jax.closure_convert(unembed, _zeros(example))

    def piece(hidden, parameters, weights, arrays):
        loss, aux = _piece(fn, lambda hidden: unembed(hidden, *parameters), hidden, *arrays)
        return weighted_sum(loss, weights), aux

    both = jax.value_and_grad(piece, argnums=(0, 1), has_aux=True)
    fixed, arrays = jax.lax.stop_gradient((parameters, (hidden, weights, per_token)))

    def step(sums, xs):
        needed, (hidden, weights, arrays) = xs
        (loss, aux), (of_hidden, of_parameters) = _if_needed(
            needed, both, hidden, fixed, weights, arrays
        )
        return jax.tree.map(jnp.add, sums, of_parameters), (loss, aux, of_hidden)

    # XLA drops the gradients of this loop where nobody asks for them: of frozen parameters, or all.
    # Columns that `split` adds have a weight of 0.
    of_parameters, (loss, aux, of_hidden) = jax.lax.scan(
        step, _zeros(fixed), chunks.split((needed, arrays))
    )
    gradient = chunks.join(of_hidden), of_parameters
    return _with_gradient(loss.sum(), gradient, (hidden, parameters)), chunks.join(aux)


@jax.custom_vjp
def _with_gradient(value: Array, gradient: Any, at: Any) -> Array:
    """`value`, whose gradient with respect to `at` is known."""
    return value


def _scaled(gradient: Any, cotangent: Array) -> tuple:
    return None, None, jax.tree.map(lambda x: (cotangent * x).astype(x.dtype), gradient)


_with_gradient.defvjp(lambda value, gradient, at: (value, gradient), _scaled)


class _Chunks(NamedTuple):
    """How columns are cut: as few chunks as there can be, of equal size.

    130 columns are 3 chunks of 44 (2 columns of padding), where 64, 64 and 2 would be padded to 192.
    """

    length: int
    parts: int
    number: int
    size: int

    @classmethod
    def of(cls, length: int, chunk_size: int, parts: int) -> "_Chunks":
        parts = parts if length % parts == 0 else 1
        number = max(-(-length // (parts * chunk_size)), 1)
        return cls(length, parts, number, -(-length // (parts * number)))

    def split(self, arrays: Any) -> Any:
        """`[B, T, ...]` to `[number, parts * B, C, ...]`."""

        def cut(x):
            batch, rest = x.shape[0], x.shape[2:]
            x = x.reshape(batch, self.parts, self.length // self.parts, *rest)
            more = self.number * self.size - x.shape[2]
            x = jnp.pad(x, [(0, 0), (0, 0), (0, more)] + [(0, 0)] * len(rest))
            x = x.reshape(batch, self.parts, self.number, self.size, *rest)
            # A scan walks along the leading axis.  A part's columns become rows of their own: a scan
            # along them would have one device after another compute.
            x = jnp.moveaxis(x, (2, 1), (0, 1))
            return x.reshape(self.number, self.parts * batch, self.size, *rest)

        return jax.tree.map(cut, arrays)

    def join(self, arrays: Any) -> Any:
        """The inverse."""

        def joined(x):
            batch, rest = x.shape[1] // self.parts, x.shape[3:]
            x = x.reshape(self.number, self.parts, batch, self.size, *rest)
            x = jnp.moveaxis(x, (0, 1), (2, 1))
            x = x.reshape(batch, self.parts, self.number * self.size, *rest)
            return x[:, :, : self.length // self.parts].reshape(batch, self.length, *rest)

        return jax.tree.map(joined, arrays)


def _piece(fn: Callable, unembed: Callable, hidden: Array, *per_token: Any) -> Any:
    """What `fn` says of a chunk."""
    out = fn(unembed(hidden), *per_token)
    for x in jax.tree.leaves(out):
        if x.shape[:2] != hidden.shape[:2]:
            raise ValueError(
                f"fn must return [B, C, ...] = {list(hidden.shape[:2])}, but returned "
                f"{list(x.shape)}"
            )
    return out


def _if_needed(needed: Array | None, fn: Callable, *arrays: Any) -> Any:
    """`fn(*arrays)`, or zeros where nothing is needed."""
    if needed is None:
        return fn(*arrays)
    # Of the shapes that `fn` would return; `eval_shape` computes nothing.
    nothing = _zeros(jax.eval_shape(fn, *arrays))
    # A cond runs one branch alone, except under vmap, where it becomes a select of both.
    return jax.lax.cond(needed.any(), fn, lambda *arrays: nothing, *arrays)


def _check(hidden: Array, per_token: Any, chunk_size: int) -> None:
    for x in jax.tree.leaves(per_token):
        if x.shape[:2] != hidden.shape[:2]:
            raise ValueError(
                f"per-token array {list(x.shape)} but hidden {list(hidden.shape)}: they differ in "
                "B or T"
            )
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, but is {chunk_size}")


def _zeros(like: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)
