"""Splash attention: the fused kernel of TPUs.  Imported where it is used only."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)
from jax.sharding import PartitionSpec

from rlhf.sharding import RULES, spec, ways

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
      interpret: run without a TPU, slowly; for tests.

    Returns: `[B, N, T, H]` in the dtype of q.
    """
    length = q.shape[2]
    before = k.shape[2] - length

    # Padded columns are of segment 0, to which no real query attends.
    def widen(x, axis):
        return jnp.pad(x, [(0, -n % LANES if i == axis else 0) for i, n in enumerate(x.shape)])

    q, k, v = (widen(x, 2) for x in (q, k, v))
    segment_ids = widen(segment_ids, 1)
    kv_segment_ids = widen(kv_segment_ids, 1)

    def local(q, k, v, ids, kv_ids):
        kernel = _kernel(q.shape[1], (q.shape[2], k.shape[2]), before, window, softcap, interpret)

        def one(q, k, v, ids, kv_ids):
            return kernel(q, k, v, splash_attention_kernel.SegmentIds(ids, kv_ids))

        # The kernel takes one row, [N, T, H].
        return jax.vmap(one)(q, k, v, ids, kv_ids)

    # XLA cannot split a kernel over devices by itself; each runs it on its own rows and heads.
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        # Prompts may be too few for the devices, each of which then reads all of them.
        is_split = q.shape[0] % ways("batch") == 0
        heads = spec(("batch" if is_split else None, "heads", None, None), mesh, RULES)
        rows = PartitionSpec(heads[0], None)
        local = jax.shard_map(
            local, in_specs=(heads, heads, heads, rows, rows), out_specs=heads, check_vma=False
        )
    return local(q, k, v, segment_ids, kv_segment_ids)[:, :, :length]


def _kernel(heads: int, shape: tuple[int, int], before: int, window, softcap, interpret):
    mask: Any = splash_attention_mask.CausalMask(shape, before)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), before)
    # Blocks must divide the length: the largest multiple of a lane group that does.
    q, kv = (
        max(size for size in range(LANES, min(BLOCK, n) + 1, LANES) if n % size == 0) for n in shape
    )
    blocks: Any = dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), q)
    blocks |= dict.fromkeys(("block_kv", "block_kv_dkv", "block_kv_dkv_compute", "block_kv_dq"), kv)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
