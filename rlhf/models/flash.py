"""Flash attention for GPUs, compiled by Triton.  Imported where it is used only.

Tested in Pallas' interpreter, and compiled ahead of time for H200; not run on a GPU yet.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from rlhf.fields import documented
from rlhf.models.visible import visible

Array = jax.Array
# Columns of a tile.  Compiled for Hopper with heads 128 wide, these neither spill registers nor leave a
# product to the slower instructions, as other sizes did.
QUERIES = 128
KEYS = 64
STEP = 64  # queries that a tile of keys reads at a time
LOWEST = -1e30  # of a score that no query has


@documented
class Options(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
      causal: whether a query sees no key after its own position.
      window: tokens a query sees, itself included; None: all.
      softcap: c in `c tanh(score / c)`; None: there is none.
      scale: on the scores.
      interpret: whether it runs without a GPU, slowly; for tests.
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float = 1.0
    interpret: bool = False


@documented
class Columns(NamedTuple):
    """What columns hold.

    Attributes:
      positions: [B, T] int32.
      segment_ids: [B, T] int32; 0 is padding.
    """

    positions: Array
    segment_ids: Array


def flash(
    q: Array,
    k: Array,
    v: Array,
    positions: Array,
    segment_ids: Array,
    kv_positions: Array,
    kv_segment_ids: Array,
    options: Options,
) -> Array:
    """Attention as `attention` defines it, by tiles; never the `[T, S]` scores  (arXiv:2307.08691,
    algorithms 1 and 2).

    Tiles in which no query sees a key are left out.

    Args:
      q: `[B, N, T, H]`.  k, v: `[B, K, S, H]`; N is a multiple of K.
      positions, segment_ids: `[B, T]` int32 of the queries, in any order; segment 0 is padding.
      kv_positions, kv_segment_ids: `[B, S]` of the keys.
      options: `interpret` runs without a GPU, slowly; for tests.

    Returns: `[B, N, T, H]` in the dtype of q, 0 where a query sees nothing.  Gradients flow to q, k
    and v.
    """
    length, width = q.shape[2:]
    # Triton's arrays have powers of two as sizes; columns that are added are padding.
    wide = max(16, pl.next_power_of_2(width))

    def padded(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % QUERIES), (0, wide - width)))

    def padded_columns(*columns):
        return Columns(*(jnp.pad(x, ((0, 0), (0, -x.shape[1] % QUERIES))) for x in columns))

    q, k, v = (padded(x) for x in (q, k, v))
    queries = padded_columns(positions, segment_ids)
    keys = padded_columns(kv_positions, kv_segment_ids)
    out = _flash(q, k, v, queries, keys, options)
    return out[:, :, :length, :width]


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _flash(q, k, v, queries, keys, options):
    return _forward(q, k, v, queries, keys, options)[0]


def _flash_forward(q, k, v, queries, keys, options):
    out, lse = _forward(q, k, v, queries, keys, options)
    return out, (q, k, v, queries, keys, out, lse)


def _flash_backward(options, residuals, d_out):
    q, k, v, queries, keys, out, lse = residuals
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1)
    given = q, k, v, d_out, lse, delta, queries, keys
    d_k, d_v = _backward_of_keys(*given, options)
    return _backward_of_queries(*given, options), d_k, d_v, None, None


_flash.defvjp(_flash_forward, _flash_backward)


def _forward(q, k, v, queries, keys, options):
    """Results `[B, N, T, H]`, and the logarithms `[B, N, T]` of the sums that softmax divides by."""
    rows, heads, length, _ = q.shape
    group = heads // k.shape[1]
    bounds = _bounds(queries, keys, options)
    of_query = _tile(q, QUERIES)
    return _call(
        _forward_kernel,
        "flash_forward",
        (rows, heads, length // QUERIES),
        (q, k, v, *queries, *keys, *bounds),
        (
            of_query,
            *[_all_columns(k, group)] * 2,
            *[_columns_tile(QUERIES)] * 2,
            *[_columns(keys)] * 2,
            *[_bound()] * 2,
        ),
        (q, jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)),
        (of_query, _numbers_tile()),
        options,
    )


def _backward_of_queries(q, k, v, d_out, lse, delta, queries, keys, options):
    rows, heads, length, _ = q.shape
    group = heads // k.shape[1]
    bounds = _bounds(queries, keys, options)
    of_query = _tile(q, QUERIES)
    (d_q,) = _call(
        _queries_kernel,
        "flash_dq",
        (rows, heads, length // QUERIES),
        (q, k, v, d_out, lse, delta, *queries, *keys, *bounds),
        (
            of_query,
            *[_all_columns(k, group)] * 2,
            of_query,
            *[_numbers_tile()] * 2,
            *[_columns_tile(QUERIES)] * 2,
            *[_columns(keys)] * 2,
            *[_bound()] * 2,
        ),
        (q,),
        (of_query,),
        options,
    )
    return d_q


def _backward_of_keys(q, k, v, d_out, lse, delta, queries, keys, options):
    rows, key_heads, length, _ = k.shape
    group = q.shape[1] // key_heads
    bounds = _bounds(queries, keys, options, of_keys=True)
    of_key = _tile(k, KEYS)
    all_queries = pl.BlockSpec((None, group, *q.shape[2:]), lambda b, n, i: (b, n, 0, 0))
    numbers = pl.BlockSpec((None, group, q.shape[2]), lambda b, n, i: (b, n, 0))
    return _call(
        partial(_keys_kernel, group=group),
        "flash_dkv",
        (rows, key_heads, length // KEYS),
        (q, k, v, d_out, lse, delta, *queries, *keys, *bounds),
        (
            all_queries,
            *[of_key] * 2,
            all_queries,
            *[numbers] * 2,
            *[_columns(queries)] * 2,
            *[_columns_tile(KEYS)] * 2,
            *[_bound()] * 2,
        ),
        (k, v),
        (of_key, of_key),
        options,
    )


def _call(kernel, name, grid, operands, in_specs, results, out_specs, options):
    """Runs a kernel for each row, head and tile."""
    return pl.pallas_call(
        partial(kernel, options=options),
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in results],
        # Four warps would not have the registers for a tile's sums.
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2),
        interpret=options.interpret,
        name=name,
    )(*operands)


# Parts of arrays that a program of the grid (row, head, tile) is given.


def _tile(x, size):
    return pl.BlockSpec((None, None, size, x.shape[3]), lambda b, n, i: (b, n, i, 0))


def _numbers_tile():
    return pl.BlockSpec((None, None, QUERIES), lambda b, n, i: (b, n, i))


def _all_columns(x, group):
    return pl.BlockSpec((None, None, *x.shape[2:]), lambda b, n, i: (b, n // group, 0, 0))


def _columns_tile(size):
    return pl.BlockSpec((None, size), lambda b, n, i: (b, i))


def _columns(columns):
    return pl.BlockSpec((None, columns.positions.shape[1]), lambda b, n, i: (b, 0))


def _bound():
    return pl.BlockSpec((None, 1), lambda b, n, i: (b, i))


def _bounds(queries, keys, options, of_keys=False):
    """First step and end, `[B, tiles]` each, of what a tile of queries sees, or a tile of keys is
    seen by.
    """
    size = STEP if of_keys else QUERIES
    meets = _may_see(_extremes(queries, size), _extremes(keys, KEYS), options)
    meets = jnp.swapaxes(meets, 1, 2) if of_keys else meets
    steps = jnp.arange(meets.shape[2], dtype=jnp.int32)
    end = jnp.max(jnp.where(meets, steps + 1, 0), axis=2)
    first = jnp.min(jnp.where(meets, steps, meets.shape[2]), axis=2)
    # Of a tile that sees nothing both are 0.
    return jnp.minimum(first, end), end


class _Extremes(NamedTuple):
    """Of tiles of columns, `[B, tiles]`, padding left out."""

    lowest_segment: Array
    highest_segment: Array
    lowest_position: Array
    highest_position: Array
    has_padding: Array


def _extremes(columns, size):
    positions, ids = (x.reshape(len(x), -1, size) for x in columns)
    real = ids != 0
    most = jnp.iinfo(jnp.int32).max
    return _Extremes(
        jnp.min(jnp.where(real, ids, most), axis=2),
        jnp.max(jnp.where(real, ids, -most), axis=2),
        jnp.min(jnp.where(real, positions, most), axis=2),
        jnp.max(jnp.where(real, positions, -most), axis=2),
        jnp.any(~real, axis=2),
    )


def _may_see(queries, keys, options):
    """`[B, tiles of queries, tiles of keys]`: False where no query sees a key."""
    q = _Extremes(*(x[:, :, None] for x in queries))
    k = _Extremes(*(x[:, None, :] for x in keys))
    same = (q.lowest_segment <= k.highest_segment) & (k.lowest_segment <= q.highest_segment)
    if not options.causal:
        # There padding sees every real key.
        return same | (q.has_padding & (k.lowest_segment <= k.highest_segment))
    same &= q.highest_position >= k.lowest_position
    if options.window is not None:
        same &= q.lowest_position < k.highest_position + options.window
    return same


# The kernels.  `at` are positions, `ids` segments; arrays end in `_ref` as long as they lie in memory.


def _forward_kernel(
    q_ref, k_ref, v_ref, at_ref, ids_ref, kv_at_ref, kv_ids_ref, first_ref, end_ref,
    out_ref, lse_ref, *, options,
):  # fmt: skip
    q = q_ref[...]
    queries = Columns(at_ref[...], ids_ref[...])

    def body(step, carry):
        out, highest, total = carry
        part = pl.ds(step * KEYS, KEYS)
        keys = Columns(kv_at_ref[part], kv_ids_ref[part])
        scores, mask = _scores(q, k_ref[part, :], queries, keys, options)
        now_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights = jnp.where(mask, jnp.exp(scores - now_highest[:, None]), 0.0)
        shrinks = jnp.exp(highest - now_highest)
        out = out * shrinks[:, None] + _product(weights, v_ref[part, :])
        return out, now_highest, total * shrinks + jnp.sum(weights, axis=1)

    size = q.shape[0]
    start = (
        jnp.zeros(q.shape, jnp.float32),
        jnp.full((size,), LOWEST, jnp.float32),
        jnp.zeros((size,), jnp.float32),
    )
    out, highest, total = jax.lax.fori_loop(first_ref[0], end_ref[0], body, start)
    # A query that sees nothing has a sum of 0.
    total = jnp.where(total == 0.0, 1.0, total)
    out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
    lse_ref[...] = highest + jnp.log(total)


def _queries_kernel(
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, at_ref, ids_ref, kv_at_ref, kv_ids_ref,
    first_ref, end_ref, d_q_ref, *, options,
):  # fmt: skip
    q = q_ref[...]
    d_out = d_out_ref[...]
    lse = lse_ref[...]
    delta = delta_ref[...]
    queries = Columns(at_ref[...], ids_ref[...])

    def body(step, d_q):
        part = pl.ds(step * KEYS, KEYS)
        keys = Columns(kv_at_ref[part], kv_ids_ref[part])
        k = k_ref[part, :]
        _, d_scores = _gradients(q, k, v_ref[part, :], d_out, lse, delta, queries, keys, options)
        return d_q + _product(d_scores, k)

    start = jnp.zeros(q.shape, jnp.float32)
    d_q = jax.lax.fori_loop(first_ref[0], end_ref[0], body, start)
    d_q_ref[...] = d_q.astype(d_q_ref.dtype)


def _keys_kernel(
    q_ref, k_ref, v_ref, d_out_ref, lse_ref, delta_ref, at_ref, ids_ref, kv_at_ref, kv_ids_ref,
    first_ref, end_ref, d_k_ref, d_v_ref, *, options, group,
):  # fmt: skip
    k = k_ref[...]
    v = v_ref[...]
    keys = Columns(kv_at_ref[...], kv_ids_ref[...])

    # The query heads of a group share the key head.
    def of_head(head, carry):
        def body(step, carry):
            d_k, d_v = carry
            part = pl.ds(step * STEP, STEP)
            queries = Columns(at_ref[part], ids_ref[part])
            q = q_ref[head, part, :]
            d_out = d_out_ref[head, part, :]
            lse = lse_ref[head, part]
            delta = delta_ref[head, part]
            weights, d_scores = _gradients(q, k, v, d_out, lse, delta, queries, keys, options)
            return d_k + _product(d_scores.T, q), d_v + _product(weights.T, d_out)

        return jax.lax.fori_loop(first_ref[0], end_ref[0], body, carry)

    zeros = jnp.zeros(k.shape, jnp.float32)
    d_k, d_v = jax.lax.fori_loop(0, group, of_head, (zeros, zeros))
    d_k_ref[...] = d_k.astype(d_k_ref.dtype)
    d_v_ref[...] = d_v.astype(d_v_ref.dtype)


def _scores(q, k, queries, keys, options):
    """Scores `[T, S]` in float32, and which of them count."""
    scores = options.scale * _product(q, k.T)
    if options.softcap is not None:
        scores = options.softcap * jnp.tanh(scores / options.softcap)
    mask = visible(*queries, *keys, options.causal, options.window)
    return jnp.where(mask, scores, LOWEST), mask


def _gradients(q, k, v, d_out, lse, delta, queries, keys, options):
    """Softmax `[T, S]`, and the gradient of `q kᵀ`."""
    scores, mask = _scores(q, k, queries, keys, options)
    weights = jnp.where(mask, jnp.exp(scores - lse[:, None]), 0.0)
    d_scores = weights * (_product(d_out, v.T) - delta[:, None])
    if options.softcap is not None:
        d_scores *= 1.0 - jnp.where(mask, scores / options.softcap, 0.0) ** 2
    return weights, options.scale * d_scores


def _product(a, b):
    """`a b` with sums in float32, of operands in the dtype of b, which tensor cores read."""
    return jnp.dot(a.astype(b.dtype), b, preferred_element_type=jnp.float32)
