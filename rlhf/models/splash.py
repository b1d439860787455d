"""Splash attention: the fused kernel of TPUs.  Imported where it is used only."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import PartitionSpec

from rlhf.sharding import RULES, spec

Array = jax.Array
LANES = 128  # the length is padded to a multiple of this
BLOCK = 512  # the most columns of a tile


def splash(q: Array, k: Array, v: Array, segment_ids: Array, *, window=None, softcap=None, interpret: bool = False) -> Array:
    """Causal attention within segments, blocks that nothing is seen of skipped; never the `[T, T]` scores.

    Args:
      q: `[B, N, T, H]`, scaled.  k, v: `[B, K, T, H]`.  Heads and rows are split over the mesh that is set.
      segment_ids: `[B, T]` int32.
      window: tokens a query sees, itself included; None: all.
      softcap: c in `c tanh(score / c)`.
      interpret: run without a TPU, slowly; for tests.

    Returns: `[B, N, T, H]` in the dtype of q.
    """
    length = q.shape[2]
    pad = -length % LANES
    widen = lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, pad), (0, 0)))
    q, k, v, segment_ids = widen(q), widen(k), widen(v), jnp.pad(segment_ids, ((0, 0), (0, pad)))

    def local(q, k, v, ids):
        kernel = _kernel(q.shape[1], q.shape[2], window, softcap, interpret)
        return jax.vmap(lambda q, k, v, i: kernel(q, k, v, splash_attention_kernel.SegmentIds(i, i)))(q, k, v, ids)

    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        heads = spec(("batch", "heads", None, None), mesh, RULES)
        rows = PartitionSpec(heads[0], None)
        local = jax.shard_map(local, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
    return local(q, k, v, segment_ids)[:, :, :length]


def _kernel(heads: int, length: int, window, softcap, interpret):
    shape = (length, length)
    mask: Any = splash_attention_mask.CausalMask(shape)
    if window is not None:
        mask = splash_attention_mask.LocalMask(shape, (window - 1, 0), 0)
    block = max(size for size in range(LANES, min(BLOCK, length) + 1, LANES) if length % size == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq")
    blocks: Any = dict.fromkeys(names, block)
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        block_sizes=splash_attention_kernel.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
