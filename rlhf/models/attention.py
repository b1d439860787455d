"""Attention: one function, and the fastest exact way to compute it where it runs."""

import jax
import jax.numpy as jnp

Array = jax.Array


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

    Returns: `[B, N, T, H]` in the dtype of `q`; finite at padding, but without meaning.

    Raises: ValueError where shapes do not fit.
    """
    kv_positions = positions if kv_positions is None else kv_positions
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    _check(q, k, v, positions, segment_ids, kv_positions, kv_segment_ids)
    mask = visible(positions, segment_ids, kv_positions, kv_segment_ids, causal, window)
    if bias is None and _cudnn_serves(q, softcap):
        btnh = lambda x: jnp.swapaxes(x, 1, 2)
        out = jax.nn.dot_product_attention(btnh(q), btnh(k), btnh(v), mask=mask[:, None], scale=scale, implementation="cudnn")
        return btnh(out)
    return _xla(q, k, v, mask, softcap, bias, scale)


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


def _xla(q, k, v, mask, softcap, bias, scale):
    """Plain batched matrix products, the queries of a group side by side; scores and softmax in at least float32."""
    batch, heads, length, width = q.shape
    groups = heads // k.shape[1]
    q = (q * scale).reshape(batch, k.shape[1], groups * length, width)
    scores = jnp.matmul(q, jnp.swapaxes(k, 2, 3))
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = scores.reshape(batch, k.shape[1], groups, length, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype).reshape(-1, k.shape[1], groups, *bias.shape[2:])
    scores = jnp.where(mask[:, None, None], scores, -0.7 * jnp.finfo(scores.dtype).max)  # finite: no NaN at padding
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(batch, k.shape[1], groups * length, -1)
    return jnp.matmul(probs, v).reshape(batch, heads, length, width)


def _cudnn_serves(q, softcap) -> bool:
    """cuDNN's fused kernel: half precision, widths that are multiples of 8 up to 128, no soft cap, more than one query."""
    return (
        jax.default_backend() == "gpu"
        and softcap is None
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= 128
        and q.shape[2] > 1
    )


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
