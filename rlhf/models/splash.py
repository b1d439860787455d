"""Splash attention: the fused kernel of TPUs.  Imported where it is used only."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import NamedSharding, PartitionSpec

from rlhf.sharding import fitting, ways

Array = jax.Array
LANES = 128  # the length is padded to a multiple of this
BLOCK = 512  # the most columns of a tile


def splash(
    q: Array,
    k: Array,
    v: Array,
    segment_ids: Array,
    kv_segment_ids: Array,
    *,
    window=None,
    softcap=None,
    splits: bool = False,
    interpret: bool = False,
) -> Array:
    """Causal attention within segments, blocks that no query attends to skipped; never the `[T, S]`
    scores.

    Args:
      q: `[B, N, T, H]`, scaled, of the last T of S columns.  k, v: `[B, K, S, H]`.  Heads and rows
        are split over the mesh that is set.
      segment_ids, kv_segment_ids: `[B, T]` and `[B, S]` int32.
      window: tokens a query sees, itself included; None: all.
      softcap: c in `c tanh(score / c)`.
      splits: the columns of the queries are split over the mesh's axis `sequence` too.
      interpret: run without a TPU, slowly; for tests.

    Returns: `[B, N, T, H]` in the dtype of q.
    """
    length = q.shape[2]
    before = k.shape[2] - length
    parts = ways("sequence") if splits else 1

    # Padded columns are of segment 0, to which no real query attends.
    def widen(x, axis, to=LANES):
        return jnp.pad(x, [(0, -n % to if i == axis else 0) for i, n in enumerate(x.shape)])

    q, segment_ids = widen(q, 2, LANES * parts), widen(segment_ids, 1, LANES * parts)
    k, v, kv_segment_ids = widen(k, 2), widen(v, 2), widen(kv_segment_ids, 1)

    split = "sequence" if splits else None
    queries, keys = (fitting(("batch", "heads", split, None), x.shape) for x in (q, k))
    rows, heads, columns, _ = queries

    def local(kernel, q, k, v, ids, kv_ids):
        if keys[2]:
            k, v = (jax.lax.all_gather(x, keys[2], axis=2, tiled=True) for x in (k, v))

        def one(q, k, v, ids, kv_ids):
            return kernel(q, k, v, splash_attention_kernel.SegmentIds(ids, kv_ids))

        # The kernel takes one row, [N, T, H].
        return jax.vmap(one)(q, k, v, ids, kv_ids)

    # XLA cannot split a kernel over devices by itself; each runs it on its own rows and heads.
    mesh = jax.sharding.get_abstract_mesh()
    # Its mask is that of all columns: made of a device's own, it would take them for the first.
    kernel = _kernel(
        q.shape[1],
        (q.shape[2], k.shape[2]),
        before,
        window,
        softcap,
        interpret,
        (1 if heads is None else ways("heads"), parts),
    )
    if not mesh.empty:
        of_kernel = kernel.manual_sharding_spec(NamedSharding(mesh, PartitionSpec(heads, columns)))
        ids = PartitionSpec(rows, columns), PartitionSpec(rows, None)
        specs = (of_kernel, queries, keys, keys, *ids)
        local = jax.shard_map(local, in_specs=specs, out_specs=queries, check_vma=False)
    return local(kernel, q, k, v, segment_ids, kv_segment_ids)[:, :, :length]


def _kernel(heads: int, shape: tuple[int, int], before: int, window, softcap, interpret, shards):
    mask: Any = splash_attention_mask.CausalMask(shape, before)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), before)
    head_shards, column_shards = shards
    # Blocks must divide the length: the largest multiple of a lane group that does.
    q, kv = (
        max(size for size in range(LANES, min(BLOCK, n) + 1, LANES) if n % size == 0)
        for n in (shape[0] // column_shards, shape[1])
    )
    blocks: Any = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), q)
    blocks |= dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq"), kv)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        head_shards=head_shards,
        q_seq_shards=column_shards,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
