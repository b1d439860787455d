"""Attention: one function, and the fastest exact way to compute it where it runs."""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rlhf.models.linear import in_float32
from rlhf.models.visible import visible
from rlhf.sharding import fitting, platform, ways
from rlhf.shared_prefix import SharedPrefix

Array = jax.Array
SCORES = partial(jnp.einsum, "bkth,bksh->bkts")
# Fused kernels of a platform, the fastest first.
KERNELS = {"gpu": ("cudnn", "triton"), "tpu": ("splash",)}


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
    chunk: int | None = None,
    softcap: float | None = None,
    bias: Array | None = None,
    sinks: Array | None = None,
    scale: float,
    kernel: str | None = None,
    last: bool = False,
    cached: bool = False,
) -> Array:
    """`softmax(scale q kᵀ + bias + mask) v`, within a segment, grouped queries  (arXiv:1706.03762,
    eq. 1; arXiv:2305.13245).

    A causal query sees the keys of its own segment whose position is not after its own and, with a
    window, less than `window` before; with chunks, not before the last multiple of `chunk`.  Others
    see all of their segment.

    Args:
      q: `[B, N, T, H]`.  k: `[B, K, S, H]`, v: `[B, K, S, V]`; N is a multiple of K, query heads
        `n K / N` share a key head.
      positions, segment_ids: `[B, T]` int32 of the queries; segment 0 is padding, which no query
        sees.
      kv_positions, kv_segment_ids: `[B, S]` of the keys; None: those of the queries.
      window: tokens a query sees, itself included; None: all.
      chunk: positions of a chunk, beyond whose start no query sees; None: there are none.
      softcap: c in `c tanh(score / c)`, before the mask  (Gemma 2).
      bias: `[B, N, T, S]`, added to the scores; a leading axis of 1 serves every row.
      sinks: `[N]`, a score a head that joins the softmax with no value, so that less than 1 is
        left for the keys  (GPT-OSS); None: there are none.
      scale: on the scores, usually `H ** -0.5`.
      kernel: "xla" (anywhere), "cudnn" or "triton" (GPU), or "splash" (TPU); None: the device's
        fastest fused one that can serve, else "xla".  Without a cache, positions must grow along
        the columns of a segment: kernels leave out the keys of later columns.  "cudnn" serves rows
        that hold one sequence, padded on either side; batches with other rows go to "triton" when
        the program runs.
      last: there is no cache, and the queries are those of the keys' last columns.
      cached: the keys are those of a cache, of which no mesh splits the columns.  Else, on a mesh
        with an axis `sequence`, each device computes its own queries and gathers all keys.

    Returns: `[B, N, T, V]` in the dtype of `q`; finite at padding, but without meaning.

    Raises: ValueError where shapes do not fit, or the kernel asked for cannot serve the request; it
    says why.
    """
    kv_positions = positions if kv_positions is None else kv_positions
    kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
    _check(q, k, v, positions, segment_ids, kv_positions, kv_segment_ids)
    # Compared by identity: values are not known while the program is traced.  Keys of the same
    # tokens allow shortcuts that a cache, padded and in another order, does not.
    same_tokens = kv_positions is positions and kv_segment_ids is segment_ids
    splits = not cached and ways("sequence") > 1 and q.shape[2] % ways("sequence") == 0

    def refused(kernel):
        return _refused(
            kernel, q, v, causal, window, chunk, softcap, bias, sinks, same_tokens or last, splits
        )

    # A single query has nothing to fuse.
    kernel = "xla" if q.shape[2] == 1 else kernel
    # A kernel that was named must serve or raise; one that we choose ourselves may give way.
    if kernel and (reasons := refused(kernel)):
        raise ValueError(
            f"{kernel} attention cannot serve this: {'; '.join(reasons)}; give kernel='xla' or None"
        )
    here = [one for one in KERNELS.get(platform(), ()) if not refused(one)]
    # cuDNN has as many queries as keys: where few of the columns are queries, more than half of
    # its work would be thrown away.
    if here[:1] == ["cudnn"] and 2 * q.shape[2] < k.shape[2]:
        here = here[1:]
    chosen = kernel or next(iter(here), "xla")
    k, v = (_one_a_device(x, q.shape[1]) for x in (k, v))
    where = positions, segment_ids, kv_positions, kv_segment_ids
    if chosen == "splash":
        # Imported where it is used only: no other device needs Pallas' kernels for TPUs.
        from rlhf.models.splash import splash

        # The kernel has no scale of its own, so the queries carry it.
        return splash(
            q * scale,
            k,
            v,
            segment_ids,
            kv_segment_ids,
            window=window,
            softcap=softcap,
            splits=splits,
        )

    def attend(q, k, v, bias, sinks, *where):
        if chosen in KERNELS["gpu"]:
            from rlhf.models.cudnn import by_lengths_or_tiles
            from rlhf.models.flash import Options, flash

            options = Options(causal, window, softcap, scale)
            return (by_lengths_or_tiles if chosen == "cudnn" else flash)(q, k, v, *where, options)
        mask = visible(*where, causal, window, chunk)
        # In two halves a layer of 256 tokens takes 64 ms on a CPU instead of 80; four parts were no
        # faster and compile longer.  Short rows have too little to save.
        halves = same_tokens and causal and q.shape[2] >= 128 and not splits
        return (_in_halves if halves else _xla)(q, k, v, mask, softcap, bias, sinks, scale)

    # XLA cannot split a kernel over devices by itself; each runs it on its own rows and heads.
    of_devices = chosen != "xla" and not jax.sharding.get_abstract_mesh().empty
    if splits or of_devices:
        attend = _on_devices(attend, q, k, bias, splits=splits, check=chosen == "xla")
    return attend(q, k, v, bias, sinks, *where)


def _one_a_device(x, heads):
    """Key heads `[B, K, S, H]` repeated where a mesh splits the query heads into more parts than
    there are: each device then has those of its queries.
    """
    parts = ways("heads")
    if x.shape[1] % parts == 0 or heads % parts:
        return x
    return jnp.repeat(x, math.lcm(x.shape[1], parts) // x.shape[1], axis=1)


def _on_devices(attend, q, k, bias, splits, check):
    """`attend`, each device for its own rows and heads, and where the mesh splits the columns for
    its own of the queries and all of the keys.

    XLA by itself would gather scores: the queries of a group are put beside each other for the
    product, after which their columns cannot lie apart.
    """
    split = "sequence" if splits else None
    queries, keys, biases = (
        None if x is None else fitting(("batch", "heads", split, None), x.shape)
        for x in (q, k, bias)
    )
    rows, _, columns, _ = queries

    def local(q, k, v, *others):
        if keys[2]:
            k, v = (jax.lax.all_gather(x, keys[2], axis=2, tiled=True) for x in (k, v))
        return attend(q, k, v, *others)

    of_queries, of_keys = PartitionSpec(rows, columns), PartitionSpec(rows, None)
    where = of_queries, of_queries, of_keys, of_keys
    of_heads = PartitionSpec(queries[1])
    specs = (queries, keys, keys, biases, of_heads, *where)
    # Kernels say nothing of the axes that their results vary over, as the check wants.
    return jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=check)


def shared_prefix_attention(
    shared: SharedPrefix,
    q,
    k,
    v,
    *,
    positions,
    segment_ids,
    bias,
    kv_positions,
    kv_segment_ids,
    **options,
):
    """`attention` of rows that share a prefix, computed once a group; so it is in what is returned.

    Args:
      shared: the group size G and the number S of columns that are not shared.
      q: `[B, N, T, H]`.  k, v: `[B, K, T, H]`, all rows with all columns, the prefix in each.
      positions, segment_ids: `[B, T]` int32; segment 0 is padding.
      bias: `[B, N, T, T]`, added to the scores, with a leading axis of 1 for all rows; or None.
      kv_positions, kv_segment_ids: `[B, T]`, those of the queries.
      options: `causal`, `window`, `chunk`, `softcap`, `scale` and `kernel` of `attention`.

    Returns: `[B / G, N, T - S + G * S, H]` for groups of G rows and suffixes of S columns.
    """
    start = q.shape[2] - shared.suffix

    def first_of_group(x):
        return x.reshape(-1, shared.group_size, *x.shape[1:])[:, 0]

    def prefix_of(x):
        return first_of_group(x)[:, :, :start]

    # Rows of a group are contiguous and equal up to `start`, so the first one stands for all.
    prefix_arguments = dict(
        positions=first_of_group(positions)[:, :start],
        segment_ids=first_of_group(segment_ids)[:, :start],
    )
    suffix_arguments = dict(
        positions=positions[:, start:],
        segment_ids=segment_ids[:, start:],
        kv_positions=kv_positions,
        kv_segment_ids=kv_segment_ids,
    )
    if bias is not None:
        bias_of_group = first_of_group(bias) if len(bias) > 1 else bias
        prefix_arguments["bias"] = bias_of_group[:, :, :start, :start]
        suffix_arguments["bias"] = bias[:, :, start:]
    prefix = attention(prefix_of(q), prefix_of(k), prefix_of(v), **prefix_arguments, **options)
    # [B, N, S, H]; `last` lets fused kernels serve although there are more keys than queries.
    suffix = attention(q[:, :, start:], k, v, **suffix_arguments, last=True, **options)
    # [B / G, G, N, S, H] -> [B / G, N, G * S, H]: a group's suffixes behind its one prefix.
    suffix = jnp.moveaxis(suffix.reshape(-1, shared.group_size, *suffix.shape[1:]), 1, 2)
    suffix = suffix.reshape(*suffix.shape[:2], -1, suffix.shape[-1])
    return jnp.concatenate([prefix, suffix], axis=2)


def _in_halves(q, k, v, mask, softcap, bias, sinks, scale):
    """`_xla`, where the first half of the queries cannot see the second half of the keys: three
    quarters of the work.
    """
    length = q.shape[2]
    half = length // 2

    def part(rows, end):
        part_bias = None if bias is None else bias[:, :, rows, :end]
        return _xla(
            q[:, :, rows],
            k[:, :, :end],
            v[:, :, :end],
            mask[:, rows, :end],
            softcap,
            part_bias,
            sinks,
            scale,
        )

    return jnp.concatenate([part(slice(0, half), half), part(slice(half, length), length)], axis=2)


def _xla(q, k, v, mask, softcap, bias, sinks, scale):
    """Plain batched matrix products, the queries of a group side by side; scores and softmax in at
    least float32.
    """
    batch, heads, length, width = q.shape
    groups = heads // k.shape[1]
    q = (q * scale).reshape(batch, k.shape[1], groups * length, width)
    # XLA on CPU takes twice as long for the product of two to four queries with all keys as for as
    # many products of one query.
    scores = _products(q, k, one_by_one=length == 1 and platform() == "cpu")
    scores = scores.astype(jnp.promote_types(scores.dtype, jnp.float32))
    scores = scores.reshape(batch, k.shape[1], groups, length, -1)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias.astype(scores.dtype).reshape(-1, k.shape[1], groups, *bias.shape[2:])
    # Finite rather than -inf: the softmax of a row that is all -inf (padding) is NaN, and its
    # gradient would spread.  0.7, since softmax subtracts the row's maximum, which must not
    # overflow.
    scores = jnp.where(mask[:, None, None], scores, -0.7 * jnp.finfo(scores.dtype).max)
    if sinks is None:
        probs = jax.nn.softmax(scores, axis=-1)
    else:
        sink = jnp.broadcast_to(
            sinks.astype(scores.dtype).reshape(1, k.shape[1], groups, 1, 1), (*scores.shape[:-1], 1)
        )
        probs = jax.nn.softmax(jnp.concatenate([scores, sink], axis=-1), axis=-1)[..., :-1]
    probs = probs.astype(v.dtype).reshape(batch, k.shape[1], groups * length, -1)
    return jnp.matmul(probs, v).reshape(batch, heads, length, v.shape[-1])


def _products(q, k, one_by_one: bool):
    """`q kᵀ`, `[B, K, T, H]` -> `[B, K, T, S]`, all queries in one product or one after another."""
    # An einsum rather than a matmul: for `q @ k.T` XLA on CPU would transpose all keys first.
    parts = jnp.split(q, q.shape[2], axis=2) if one_by_one else [q]
    return jnp.concatenate([in_float32(SCORES, part, k) for part in parts], axis=2)


def _refused(
    kernel, q, v, causal, window, chunk, softcap, bias, sinks, uncached, splits
) -> list[str]:
    """Why a kernel cannot serve; nothing if it can."""
    if kernel == "xla":
        return []
    if kernel not in (*KERNELS["gpu"], *KERNELS["tpu"]):
        return [
            f"it is not known; known are 'xla', 'cudnn', 'triton' and 'splash', but not {kernel!r}"
        ]
    width = q.shape[3]
    # Reasons by whether they hold; those that do are what the error lists.
    why = {
        "a bias on the scores": bias is not None,
        "attention in chunks": chunk is not None,
        "sinks": sinks is not None,
        "values of another width than keys": v.shape[3] != width,
    }
    if kernel in KERNELS["gpu"]:
        why |= {
            f"{q.dtype}, where it wants bfloat16 or float16": q.dtype
            not in (jnp.bfloat16, jnp.float16),
            f"heads {width} wide, where it wants a multiple of 8 up to 128": width % 8 != 0
            or width > 128,
        }
    if kernel != "triton":
        why |= {
            "attention that is not causal": not causal,
            "keys of a cache, beside the queries' own": not uncached,
        }
    if kernel == "cudnn":
        why |= {
            "a soft cap": softcap is not None,
            "a window": window is not None,
            "columns that the mesh's axis `sequence` splits": splits,
        }
    return [reason for reason, holds in why.items() if holds]


def _check(q, k, v, positions, segment_ids, kv_positions, kv_segment_ids) -> None:
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"k {list(k.shape)} but v {list(v.shape)}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"q [B, N, T, H] = {list(q.shape)} but k [B, K, S, H] = {list(k.shape)}; K must divide "
            "N"
        )
    for name, x, length in (
        ("positions", positions, q.shape[2]),
        ("segment_ids", segment_ids, q.shape[2]),
        ("kv_positions", kv_positions, k.shape[2]),
        ("kv_segment_ids", kv_segment_ids, k.shape[2]),
    ):
        if x.shape != (q.shape[0], length):
            raise ValueError(f"{name} {list(x.shape)} but expected {[q.shape[0], length]}")
