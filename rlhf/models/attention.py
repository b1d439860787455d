"""Attention: one function, and the fastest exact way to compute it where it runs."""

from functools import partial

import jax
import jax.numpy as jnp

from rlhf.lm import SharedPrefix
from rlhf.models.linear import in_float32

Array = jax.Array
SCORES = partial(jnp.einsum, "bkth,bksh->bkts")


def attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    positions: Array,
    segment_ids: Array,
    kv_positions: Array | None = None,
    kv_segment_ids: Array | None = None,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    scale: float,
    kernel: str | None = None,
    last: bool = False,
) -> Array:
    """`softmax(scale q kᵀ + bias + mask) v`, within a segment, grouped queries  (arXiv:1706.03762, eq. 1; arXiv:2305.13245).

    A causal query sees the keys of its own segment whose position is not after its own and, with a window, less than `window`
    before.  Others see all of their segment.

    Args:
      q: `[B, N, T, H]`.  k, v: `[B, K, S, H]`; N is a multiple of K, query heads `n K / N` share a key head.
      positions, segment_ids: `[B, T]` int32 of the queries; segment 0 is padding, which no query sees.
      kv_positions, kv_segment_ids: `[B, S]` of the keys; None: those of the queries.
      window: tokens a query sees, itself included; None: all.
      softcap: c in `c tanh(score / c)`, before the mask  (Gemma 2).
      bias: `[B, N, T, S]`, added to the scores; a leading axis of 1 serves every row.
      scale: on the scores, usually `H ** -0.5`.
      kernel: "xla" (anywhere), "cudnn" (GPU) or "splash" (TPU); None: the device's fused one where it can serve, else "xla".
        Without a cache, positions must grow along the columns of a segment: kernels leave out the keys of later columns.
      last: there is no cache, and the queries are those of the keys' last columns.

    Returns: `[B, N, T, H]` in the dtype of `q`; finite at padding, but without meaning.

    Raises: ValueError where shapes do not fit, or the kernel asked for cannot serve the request; it says why.
    """
    kv_positions = positions if kv_positions is None else kv_positions
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    _check(q, k, v, positions, segment_ids, kv_positions, kv_segment_ids)
    whole = kv_positions is positions and kv_segment_ids is segment_ids
    here = {"gpu": "cudnn", "tpu": "splash"}.get(jax.default_backend(), "xla")
    kernel = "xla" if q.shape[2] == 1 else kernel  # a single query has nothing to fuse
    refused = _refused(kernel or here, q, causal, window, softcap, bias, whole or last)
    if kernel and refused:
        raise ValueError(f"{kernel} attention cannot serve this: {'; '.join(refused)}; give kernel='xla' or None")
    chosen = "xla" if refused else kernel or here
    if chosen == "splash":
        from rlhf.models.splash import splash

        return splash(q * scale, k, v, segment_ids, kv_segment_ids, window=window, softcap=softcap)
    mask = visible(positions, segment_ids, kv_positions, kv_segment_ids, causal, window)
    if chosen == "cudnn":
        return _cudnn(q, k, v, mask, scale)
    xla = _in_halves if whole and causal and q.shape[2] >= 128 else _xla
    return xla(q, k, v, mask, softcap, bias, scale)


def attention_once(shared: SharedPrefix, q, k, v, *, positions, segment_ids, bias, kv_positions, kv_segment_ids, **knobs):
    """`attention` of rows that share a prefix, which sees itself once a group; what is returned has it once too.

    Args:
      q, k, v, positions, segment_ids, bias, knobs: as `attention`, of whole rows; `kv_...` are the queries' own.

    Returns: `[B / rows, N, T - own + rows · own, H]`.
    """
    start = q.shape[2] - shared.own
    first = lambda x: x.reshape(-1, shared.rows, *x.shape[1:])[:, 0]  # row of each group
    of_prefix = dict(positions=first(positions)[:, :start], segment_ids=first(segment_ids)[:, :start])
    of_own = dict(positions=positions[:, start:], segment_ids=segment_ids[:, start:])
    of_own |= dict(kv_positions=kv_positions, kv_segment_ids=kv_segment_ids)
    if bias is not None:
        of_prefix["bias"] = (first(bias) if len(bias) > 1 else bias)[:, :, :start, :start]
        of_own["bias"] = bias[:, :, start:]
    start_of = lambda x: first(x)[:, :, :start]
    prefix = attention(start_of(q), start_of(k), start_of(v), **of_prefix, **knobs)
    own = attention(q[:, :, start:], k, v, **of_own, last=True, **knobs)  # [B, N, own, H]
    own = jnp.moveaxis(own.reshape(-1, shared.rows, *own.shape[1:]), 1, 2)
    return jnp.concatenate([prefix, own.reshape(*own.shape[:2], -1, own.shape[-1])], axis=2)


def visible(positions, segment_ids, kv_positions, kv_segment_ids, causal=True, window=None) -> Array:
    """Which keys a query sees.  `[B, T]`, `[B, S]` -> `[B, T, S]` bool.

    Padding sees nothing where attention is causal, and every real token where it is not: heads of encoders read column 0,
    padding or not, as transformers has them.
    """
    own, of_keys = segment_ids[:, :, None], kv_segment_ids[:, None, :]
    if not causal:
        return ((own == of_keys) | (own == 0)) & (of_keys != 0)
    distance = positions[:, :, None] - kv_positions[:, None, :]
    seen = (own == of_keys) & (own != 0) & (distance >= 0)
    return seen if window is None else seen & (distance < window)


def _in_halves(q, k, v, mask, softcap, bias, scale):
    """`_xla`, where the first half of the queries cannot see the second half of the keys: three quarters of the work."""
    length, half = q.shape[2], q.shape[2] // 2

    def part(rows, end):
        own = None if bias is None else bias[:, :, rows, :end]
        return _xla(q[:, :, rows], k[:, :, :end], v[:, :, :end], mask[:, rows, :end], softcap, own, scale)

    return jnp.concatenate([part(slice(0, half), half), part(slice(half, length), length)], axis=2)


def _xla(q, k, v, mask, softcap, bias, scale):
    """Plain batched matrix products, the queries of a group side by side; scores and softmax in at least float32."""
    batch, heads, length, width = q.shape
    groups = heads // k.shape[1]
    q = (q * scale).reshape(batch, k.shape[1], groups * length, width)
    scores = _products(q, k, one_by_one=length == 1 and jax.default_backend() == "cpu")
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = scores.reshape(batch, k.shape[1], groups, length, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype).reshape(-1, k.shape[1], groups, *bias.shape[2:])
    scores = jnp.where(mask[:, None, None], scores, -0.7 * jnp.finfo(scores.dtype).max)  # finite: no NaN at padding
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, k.shape[1], groups * length, -1)
    return jnp.matmul(probs, v).reshape(batch, heads, length, width)


def _products(q, k, one_by_one: bool):
    """`q kᵀ`, `[B, K, T, H]` -> `[B, K, T, S]`.  XLA on CPU would transpose all keys for a matmul, and multiplies a few queries
    slower together than one by one."""
    parts = jnp.split(q, q.shape[2], axis=2) if one_by_one else [q]
    return jnp.concatenate([in_float32(SCORES, part, k) for part in parts], axis=2)


def _cudnn(q, k, v, mask, scale):
    """cuDNN's fused kernel through JAX's own function; it never chooses it by itself."""
    btnh = lambda x: jnp.swapaxes(x, 1, 2)
    out = jax.nn.dot_product_attention(btnh(q), btnh(k), btnh(v), mask=mask[:, None], scale=scale, implementation="cudnn")
    return btnh(out)


def _refused(kernel, q, causal, window, softcap, bias, whole) -> list[str]:
    """Why a kernel cannot serve; nothing if it can."""
    if kernel == "xla":
        return []
    if kernel not in ("cudnn", "splash"):
        return [f"it is not known; known are 'xla', 'cudnn' and 'splash', but not {kernel!r}"]
    why = {"a bias on the scores": bias is not None}
    if kernel == "cudnn":
        why |= {
            f"{q.dtype}, where it wants bfloat16 or float16": q.dtype not in (jnp.bfloat16, jnp.float16),
            f"heads {q.shape[3]} wide, where it wants a multiple of 8 up to 128": q.shape[3] % 8 != 0 or q.shape[3] > 128,
            "a soft cap": softcap is not None,
        }
    else:
        why |= {"attention that is not causal": not causal, "keys of a cache, beside the queries' own": not whole}
    return [reason for reason, holds in why.items() if holds]


def _check(q, k, v, positions, segment_ids, kv_positions, kv_segment_ids) -> None:
    if k.shape != v.shape:
        raise ValueError(f"k {list(k.shape)} but v {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"q [B, N, T, H] = {list(q.shape)} but k [B, K, S, H] = {list(k.shape)}; K must divide N")
    for name, x, length in (
        ("positions", positions, q.shape[2]),
        ("segment_ids", segment_ids, q.shape[2]),
        ("kv_positions", kv_positions, k.shape[2]),
        ("kv_segment_ids", kv_segment_ids, k.shape[2]),
    ):
        if x.shape != (q.shape[0], length):
            raise ValueError(f"{name} {list(x.shape)} but expected {[q.shape[0], length]}")
