"""Attention in a block: projections, norms, rotation, the cache, and what comes of it."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf.fields import documented
from rlhf.models.attention import attention, shared_prefix_attention
from rlhf.models.config import Heads, LayerKind, TransformerConfig
from rlhf.models.linear import linear
from rlhf.models.rotary import Rope, Rotation, rotate
from rlhf.models.weights import Weights
from rlhf.shared_prefix import SharedPrefix

Array = jax.Array


@documented
class Cached(NamedTuple):
    """A layer's part of a cache.

    Attributes:
      state: of the tokens before: keys and values, or what a mixer has.
      write: (old [B, N, S, ..], new [B, N, T, ..]) -> old with new after what was written.
      fills: whether the tokens are all that the cache holds.
    """

    state: Any
    write: Callable
    fills: bool


@documented
class Where(NamedTuple):
    """What a layer knows of its tokens beside their vectors.

    Attributes:
      config: of the model.
      kind: of the layer.
      rotations: by `Rope` and the width of a head.
      cached: the layer's part of a cache, or None.
      attention_inputs: of `attention`: positions, segment ids, bias.
      lent: keys and values of earlier layers, by the name under which they lend them.
    """

    config: TransformerConfig
    kind: LayerKind
    rotations: Mapping[tuple[Rope, int], Rotation]
    cached: Cached | None
    attention_inputs: dict[str, Any]
    lent: Mapping[str, tuple[Array, Array]]

    @property
    def segment_ids(self) -> Array:
        return self.attention_inputs["segment_ids"]

    @property
    def state(self) -> Any:
        return None if self.cached is None else self.cached.state

    def turned(self, x: Array, width: int, keys: bool = False) -> Array:
        """`x [B, N, T, H]` turned by its positions, of heads of so many entries.

        Args:
          x: queries, or keys before they are cached.
          width: of a head.
          keys: x is keys of the cache, where those are turned anew at every step.
        """
        rope = self.kind.rope
        rotation = None if rope is None else self.rotations.get((rope, width))
        if rope is None or rotation is None:
            return x
        angles = rotation.keys if keys else rotation.queries
        return x if angles is None else rotate(x, angles, rope.interleaved)

    def turns_late(self, width: int) -> bool:
        """Whether keys are cached as they are, since angles depend on the length (`by_length`)."""
        rotation = None if self.kind.rope is None else self.rotations.get((self.kind.rope, width))
        return rotation is not None and rotation.keys is not None

    def options(self) -> dict[str, Any]:
        """Arguments of `attention` beside queries, keys and values."""
        c = self.config
        # A fused kernel is meant for training; a cache it cannot serve, which is no error.
        kernel = c.kernel if self.cached is None or c.kernel == "xla" else None
        return dict(
            causal=c.causal,
            window=self.kind.window,
            chunk=self.kind.chunk,
            softcap=c.attention_softcap,
            scale=c.scale,
            kernel=kernel,
            cached=self.cached is not None,
            **self.attention_inputs,
        )


def attend(
    block: Weights, x: Array, where: Where, shared: SharedPrefix
) -> tuple[Array, tuple[Array, Array]]:
    """`[B, T, D]` and the layer's keys and values `[B, K, S, H]`, of the cache where there is one.

    Args:
      block: whose parameters they are.
      x: `[B, T, D]`.
      where: the tokens are.
      shared: what rows share, which stands in x once.
    """
    c = where.config
    kind = where.kind
    heads = kind.heads or Heads(c.width, c.kv_heads)
    prefix = heads.prefix
    size = heads.kv_heads * heads.width
    q = project(block, f"{prefix}q", x, c.num_heads * heads.width)
    if kind.borrows is None:
        k = project(block, f"{prefix}k", x, size)
        v = k if heads.keys_are_values else project(block, f"{prefix}v", x, size)

    def by_head(y, name):
        y = y if c.qkv_clip is None else jnp.clip(y, -c.qkv_clip, c.qkv_clip)
        # Every row with all its columns again, [B, heads, T, H]: attention alone needs the prefix
        # in each row; the products above and below read it once a group.
        y = split(shared.expand(y), heads.width)
        if c.qk_norm == "head" and name != "v":
            y = block.norm(f"{prefix}{name}_norm", y)
        # Named for the rematerialisation policies "names" and "offload" of `REMAT`.
        return checkpoint_name(y, name)

    def to_be_compared(y, name):
        """Queries or keys, normed and turned."""
        # OLMo 2 norms before the split into heads, over all of them; Qwen 3 each head by itself.
        y = block.norm(f"{prefix}{name}_norm", y) if c.qk_norm == "heads" else y
        y = by_head(y, name)
        # Keys are rotated before they are cached, so that each is rotated once.  Where angles
        # depend on the length (`by_length`), they are cached plain and rotated anew at every step.
        late = name == "k" and where.turns_late(heads.width)
        y = y if late else where.turned(y, heads.width)
        y = block.norm(f"{prefix}{name}_norm", y) if c.qk_norm == "turned" else y
        units = c.qk_norm == "unit" and kind.rope is not None
        return block.normalise(y, None, None) if units else y

    q = to_be_compared(q, "q")
    if kind.temperature is not None:
        factor = kind.temperature.of(where.attention_inputs["positions"])
        q = q * factor[:, None, :, None].astype(q.dtype)
    if kind.borrows is None:
        k = to_be_compared(k, "k")
        v = by_head(v, "v")
        v = block.normalise(v, None, None) if c.v_norm else v
        if where.cached is not None:
            keys, values = where.cached.state
            k = where.cached.write(keys, k)
            v = where.cached.write(values, v)
    else:
        k, v = where.lent[kind.borrows]
    kv = k, v
    if where.turns_late(heads.width):
        k = where.turned(k, heads.width, keys=True)
    computed = attention if shared.group_size == 1 else partial(shared_prefix_attention, shared)
    sinks = gate = None
    if c.sinks:
        sinks = block.weight("sinks", (c.num_heads,), ("heads",), nn.initializers.zeros)
    if c.attention_gate:
        gate = project(block, f"{prefix}q_gate", x, c.num_heads * heads.width)
    y = computed(q, k, v, sinks=sinks, **where.options())
    return checkpoint_name(out(block, f"{prefix}o", y, gate), "attention"), kv


def attend_cross(block: Weights, x: Array, cross: dict[str, Any] | None) -> Array:
    """Attention of `x` to an encoder's output, of which `cross` has keys and values."""
    c = block.config
    q = split(project(block, "cross_q", x, c.num_heads * c.width), c.width)
    # Initialisation has no encoder's output; reading `x` in its place declares the parameters.
    cross = {**(cross or {})}
    cross = {**cross_kv(block, x), **cross} if block.is_initializing() else cross
    return out(block, "cross_o", attention(q, causal=False, scale=c.scale, **cross))


def cross_kv(block: Weights, encoded: Array) -> dict[str, Array]:
    """Keys and values `[B, K, S, H]` of an encoder's output `[B, S, D]`."""
    c = block.config
    return {
        name: split(project(block, f"cross_{name}", encoded, c.kv_heads * c.width), c.width)
        for name in ("k", "v")
    }


def project(block: Weights, name: str, x: Array, size: int) -> Array:
    c = block.config
    axis = "kv" if name.endswith(("k", "v")) else "heads"
    init = nn.initializers.normal(c.hidden_size**-0.5)
    w = block.weight(name, (c.hidden_size, size), ("embed", axis), init)
    return linear(x, w, block.bias(c.qkv_bias, f"{name}_bias", size, axis))


def split(x: Array, width: int) -> Array:
    """`[B, T, N H]` to `[B, N, T, H]`."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, width), 1, 2)


def out(block: Weights, name: str, x: Array, gate: Array | None = None) -> Array:
    """`[B, N, T, H]` to `[B, T, D]`, times the sigmoid of a gate `[B, T, N H]` in between."""
    c = block.config
    inputs = x.shape[1] * x.shape[3]
    x = jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], inputs)
    x = x if gate is None else x * jax.nn.sigmoid(gate)
    w = block.weight(name, (inputs, c.hidden_size), ("heads", "embed"), block.into_residual(inputs))
    return linear(x, w, block.bias(c.out_bias, f"{name}_bias", c.hidden_size, "embed"))
