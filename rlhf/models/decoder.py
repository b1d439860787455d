"""One decoder for GPT-2, Llama, Mistral, Qwen and Gemma: a config says which."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf.lm import LM, from_linen
from rlhf.models.attention import attention
from rlhf.models.linear import linear, rows
from rlhf.sharding import constrain

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What may differ from layer to layer, and is known when the program is compiled."""

    window: int | None = None  # tokens a query sees, itself included; None: all before it
    rope_theta: float = 10_000.0  # base of the rotary frequencies


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer.  Defaults are Llama's."""

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    mlp_size: int
    num_kv_heads: int | None = None  # None: num_heads
    head_dim: int | None = None  # None: hidden_size // num_heads
    kinds: tuple[LayerKind, ...] = (LayerKind(),)  # layer i is of kind i modulo their number
    max_positions: int | None = None  # learned positions, so many; None: rotary
    norm: str = "rms"  # "rms" or "layer" (mean taken off, with bias)
    norm_eps: float = 1e-6
    norm_place: str = "pre"  # "pre", "post" (of the branch, OLMo 2) or "both" (Gemma 2)
    norm_offset: float = 0.0  # Gemma: scale by 1 + w
    qk_norm: bool = False  # normalise queries and keys per head (Qwen 3, Gemma 3)
    activation: str = "silu"  # a name in jax.nn; "gelu" is the tanh form
    gated: bool = True  # down(act(gate x) · up x), else down(act(up x))
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    tied: bool = False  # logits from the embedding matrix
    embed_scale: float = 1.0  # Gemma: √hidden_size
    attention_scale: float | None = None  # None: head_dim ** -0.5
    attention_softcap: float | None = None
    final_softcap: float | None = None
    dtype: Any = jnp.float32  # of the computation
    param_dtype: Any = jnp.float32
    remat: bool = False  # recompute each block in the backward pass

    def __post_init__(self):
        choices = {"norm": ("rms", "layer"), "norm_place": ("pre", "post", "both")}
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field} must be one of {allowed}, but is {getattr(self, field)!r}")
        if not callable(getattr(jax.nn, self.activation, None)):
            raise ValueError(f"activation must name a function in jax.nn, but is {self.activation!r}")
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide hidden_size {self.hidden_size}; give head_dim")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}")

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def width(self) -> int:
        return self.head_dim or self.hidden_size // self.num_heads


class Cache(NamedTuple):
    """Keys and values of what was read so far.  Every leaf has the batch on axis 0."""

    written: Array  # [B] int32, columns written: the write index
    positions: Array  # [B, S] int32
    segment_ids: Array  # [B, S] int32, 0 = not written, or padding
    layers: tuple[tuple[Array, Array], ...]  # per layer keys and values [B, K, S, H]


def decoder(config: DecoderConfig) -> LM:
    """The `LM` of a config.

    >>> lm = decoder(DecoderConfig(vocab_size=8, hidden_size=4, num_layers=2, num_heads=1, mlp_size=8, tied=True))
    >>> params = lm.init(jax.random.key(0))
    >>> tokens = jnp.ones((1, 3), jnp.int32)
    >>> h, _, _ = lm.hidden(params, tokens, positions=jnp.arange(3)[None], segment_ids=tokens)
    >>> lm.unembed(params, h).shape
    (1, 3, 8)
    """
    return from_linen(Decoder(config))


class _Module(nn.Module):
    """A module whose parameters are declared when it is initialised, and plain leaves afterwards."""

    config: DecoderConfig

    def weight(self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable) -> Any:
        if self.is_initializing():
            return self.param(name, nn.with_partitioning(init, axes), shape, self.config.param_dtype)
        return self.get_variable("params", name)

    def bias(self, wanted: bool, name: str, size: int, axis: str | None) -> Any:
        return self.weight(name, (size,), (axis,), nn.initializers.zeros) if wanted else None

    def norm_weights(self, name: str, size: int) -> tuple[Any, Any]:
        c = self.config
        axis = "embed" if size == c.hidden_size else None
        scale = self.weight(name, (size,), (axis,), nn.initializers.constant(1.0 - c.norm_offset))
        return scale, self.bias(c.norm == "layer", f"{name}_bias", size, axis)

    def normalise(self, x: Array, scale: Any, bias: Any) -> Array:
        """Root mean square or layer norm, computed in at least float32."""
        c = self.config
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if c.norm == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + c.norm_eps)
        y = y * (rows(scale, y) + c.norm_offset)
        return (y if bias is None else y + rows(bias, y)).astype(x.dtype)

    def norm(self, name: str, x: Array) -> Array:
        return self.normalise(x, *self.norm_weights(name, x.shape[-1]))


class Block(_Module):
    """Attention and MLP, each added to the residual stream."""

    @nn.compact
    def __call__(self, x: Array, kind: LayerKind, rotary, cached, **where) -> tuple[Array, tuple[Array, Array]]:
        """`x [B, T, D]`; `cached`: this layer's (keys, values, write) or None.  Returns x and the keys and values."""
        h, kv = self.attend(self.before("attention_norm", x), kind, rotary, cached, where)
        x = x + self.after("attention_post_norm", h)
        h = self.mlp(self.before("mlp_norm", x))
        return x + self.after("mlp_post_norm", h), kv

    def into_residual(self, inputs):
        """Smaller with depth, so that the sum over the blocks starts at a fixed size  (GPT-2)."""
        return nn.initializers.normal((2 * self.config.num_layers * inputs) ** -0.5)

    def before(self, name, x):
        return x if self.config.norm_place == "post" else self.norm(name, x)

    def after(self, name, x):
        return x if self.config.norm_place == "pre" else self.norm(name, x)

    def attend(self, x, kind, rotary, cached, where):
        c = self.config
        inputs, outputs = c.hidden_size, c.num_heads * c.width
        init = nn.initializers.normal(inputs**-0.5)

        def project(name, heads, axis):
            w = self.weight(name, (inputs, heads * c.width), ("embed", axis), init)
            y = linear(x, w, self.bias(c.qkv_bias, f"{name}_bias", heads * c.width, axis))
            return y.reshape(*x.shape[:2], heads, c.width)

        q, k, v = project("q", c.num_heads, "heads"), project("k", c.kv_heads, "kv"), project("v", c.kv_heads, "kv")
        if c.qk_norm:
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        q, k, v = (jnp.swapaxes(y, 1, 2) for y in (q, k, v))  # [B, heads, T, H]
        if rotary is not None:
            q, k = rotate(q, *rotary[kind.rope_theta]), rotate(k, *rotary[kind.rope_theta])
        if cached is not None:
            keys, values, write = cached
            k, v = write(keys, k), write(values, v)
        scale = c.width**-0.5 if c.attention_scale is None else c.attention_scale
        out = attention(q, k, v, window=kind.window, softcap=c.attention_softcap, scale=scale, **where)
        out = jnp.swapaxes(out, 1, 2).reshape(*x.shape[:2], outputs)
        w = self.weight("o", (outputs, inputs), ("heads", "embed"), self.into_residual(outputs))
        return linear(out, w, self.bias(c.out_bias, "o_bias", inputs, "embed")), (k, v)

    def mlp(self, x):
        c = self.config
        init = nn.initializers.normal(c.hidden_size**-0.5)

        def project(name):
            w = self.weight(name, (c.hidden_size, c.mlp_size), ("embed", "mlp"), init)
            return linear(x, w, self.bias(c.mlp_bias, f"{name}_bias", c.mlp_size, "mlp"))

        activate = getattr(jax.nn, c.activation)
        h = activate(project("gate")) * project("up") if c.gated else activate(project("up"))
        w = self.weight("down", (c.mlp_size, c.hidden_size), ("mlp", "embed"), self.into_residual(c.mlp_size))
        return linear(h, w, self.bias(c.mlp_bias, "down_bias", c.hidden_size, "embed"))


class Decoder(_Module):
    """Embedding, blocks, final norm.  `layers` holds the blocks' parameters stacked, `[num_layers, ...]`."""

    def setup(self):
        c = self.config
        init = nn.initializers.normal(c.hidden_size**-0.5)
        self.embedding = self.weight("embedding", (c.vocab_size, c.hidden_size), ("vocab", "embed"), init)
        self.layers = self._stacked()
        self.final_norm = self.norm_weights("final_norm", c.hidden_size)
        if c.max_positions:
            self.position_embedding = self.weight("position_embedding", (c.max_positions, c.hidden_size), (None, "embed"), init)
        if not c.tied:
            self.unembedding = self.weight("unembedding", (c.hidden_size, c.vocab_size), ("embed", "vocab"), init)

    def _stacked(self):
        if not self.is_initializing():
            return self.get_variable("params", "layers")
        c = self.config
        x, one = jnp.zeros((1, 1, c.hidden_size), c.dtype), jnp.ones((1, 1), jnp.int32)
        rotary = self.rotary(one)
        init_one = lambda key: Block(c).init(key, x, c.kinds[0], rotary, None, positions=one, segment_ids=one)["params"]
        boxed = lambda leaf: isinstance(leaf, nn.Partitioned)
        named = lambda tree: jax.tree.map(lambda leaf: leaf.replace(names=("layers", *leaf.names)), tree, is_leaf=boxed)
        return self.param("layers", lambda key: named(jax.vmap(init_one)(jax.random.split(key, c.num_layers))))

    def hidden(self, tokens, *, positions, segment_ids, cache=None, inputs=None):
        """Final hidden states `[B, T, D]`, the cache with these tokens in it, and `{}`."""
        if inputs:
            raise ValueError(f"a decoder is conditioned on its tokens alone, but got inputs {sorted(inputs)}")
        c = self.config
        x = jnp.take(self.embedding, tokens, axis=0).astype(c.dtype) * jnp.asarray(c.embed_scale, c.dtype)
        if c.max_positions:
            x = x + jnp.take(self.position_embedding, positions, axis=0).astype(c.dtype)
        x = constrain(x, "batch", "sequence", None)
        if cache is None:
            x = self._scan(x, positions, segment_ids)
        else:
            x, cache = self._unroll(x, positions, segment_ids, cache)
        return self.normalise(x, *self.final_norm), cache, {}

    def unembed(self, hidden):
        """Logits `[..., V]` in at least float32."""
        c = self.config
        weight = self.embedding.T if c.tied else self.unembedding
        logits = linear(hidden, weight)
        logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
        return logits if c.final_softcap is None else c.final_softcap * jnp.tanh(logits / c.final_softcap)

    def init_cache(self, batch, length):
        c = self.config
        zeros = jnp.zeros((batch, length), jnp.int32)
        empty = lambda: jnp.zeros((batch, c.kv_heads, length, c.width), c.dtype)
        return Cache(zeros[:, 0], zeros, zeros, tuple((empty(), empty()) for _ in range(c.num_layers)))

    def _scan(self, x, positions, segment_ids):
        """Training: one compiled block, scanned over the repeating pattern of kinds; the layers left over follow."""
        c, period = self.config, len(self.config.kinds)
        rotary = self.rotary(positions)

        def apply(x, params, kind):
            y, _ = Block(c, parent=None).apply(
                {"params": params}, x, kind, rotary, None, positions=positions, segment_ids=segment_ids
            )
            return constrain(y, "batch", "sequence", None)

        apply = jax.checkpoint(apply, static_argnums=2, prevent_cse=False) if c.remat else apply

        def pattern(x, params):
            for i, kind in enumerate(c.kinds):
                x = apply(x, _layer(params, i), kind)
            return x, None

        repeats, rest = divmod(c.num_layers, period)
        whole = jax.tree.map(lambda p: p[: repeats * period].reshape(repeats, period, *p.shape[1:]), self.layers)
        x, _ = jax.lax.scan(pattern, x, whole)
        for i in range(rest):
            x = apply(x, _layer(self.layers, repeats * period + i), c.kinds[i])
        return x

    def _unroll(self, x, positions, segment_ids, cache):
        """Prefill and decoding: each layer by itself over the same stacked parameters, with a cache of its own."""
        c, rotary = self.config, self.rotary(positions)
        update = lambda axis: jax.vmap(lambda old, new, i: jax.lax.dynamic_update_slice_in_dim(old, new, i, axis))
        cache_positions = update(0)(cache.positions, positions, cache.written)
        cache_segments = update(0)(cache.segment_ids, segment_ids, cache.written)
        write = lambda old, new: update(1)(old, new, cache.written)
        where = dict(positions=positions, segment_ids=segment_ids, kv_positions=cache_positions, kv_segment_ids=cache_segments)
        layers = []
        for i, (keys, values) in enumerate(cache.layers):
            block = Block(c, parent=None)
            kind = c.kinds[i % len(c.kinds)]
            x, kv = block.apply({"params": _layer(self.layers, i)}, x, kind, rotary, (keys, values, write), **where)
            layers.append(kv)
        return x, Cache(cache.written + x.shape[1], cache_positions, cache_segments, tuple(layers))

    def rotary(self, positions):
        """cos and sin for every base in use, `{theta: ([B, 1, T, H/2], [B, 1, T, H/2])}`; None with learned positions."""
        c = self.config
        if c.max_positions:
            return None
        exponent = jnp.arange(c.width // 2, dtype=jnp.float32) * 2 / c.width
        angles = {
            theta: positions[:, None, :, None].astype(jnp.float32) * (1.0 / theta**exponent)[None, None, None, :]
            for theta in {kind.rope_theta for kind in c.kinds}
        }
        return {theta: (jnp.cos(a), jnp.sin(a)) for theta, a in angles.items()}


def rotate(x: Array, cos: Array, sin: Array) -> Array:
    """Rotary positions on halves  (RoPE, arXiv:2104.09864, eq. 34): `[B, N, T, H]` by angles `[B, 1, T, H/2]`."""
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, jnp.float32)), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _layer(params, i):
    return jax.tree.map(lambda p: p[i], params)
