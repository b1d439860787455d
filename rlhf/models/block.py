"""One block: attention and MLP, each added to the residual stream."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf.lm import ALONE, SharedPrefix
from rlhf.models.attention import attention, attention_once
from rlhf.models.config import ACTIVATIONS, LayerKind, TransformerConfig
from rlhf.models.experts import experts
from rlhf.models.linear import linear, rows
from rlhf.models.rotary import Rope, Turn, rotate

Array = jax.Array


class Weights(nn.Module):
    """A module whose parameters are declared when it is initialised, and plain leaves afterwards."""

    config: Any

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


class Block(Weights):
    """Attention, attention to an encoder's output where there is one, and MLP or experts."""

    config: TransformerConfig
    shared: SharedPrefix = ALONE

    @nn.compact
    def __call__(
        self,
        x: Array,
        kind: LayerKind,
        turns: Mapping[Rope | None, Turn],
        cached,
        seen: dict[str, Any],
        cross: dict[str, Any] | None,
    ) -> tuple[Array, tuple[Array, Array], Any]:
        """`x [B, T, D]` through one block; what rows share stands in `x` once, and is attention's alone to read again.

        Args:
          cached: this layer's (keys, values, write), or None.
          seen: of `attention`: positions, segment ids, bias.
          cross: likewise for the encoder's output, with its `k` and `v`; None without an encoder.

        Returns: x, this layer's keys and values, and its `Routing`; None without experts.
        """
        c = self.config
        attend = lambda h: self.attend(h, kind, turns, cached, seen)
        real = self.shared.once(seen["segment_ids"] != 0)
        feed = lambda h: self.sparse(h, real) if kind.sparse else (self.mlp(h), None)
        if c.parallel:
            h = self.norm("attention_norm", x)
            y, kv = attend(h)
            z, routing = feed(h if c.parallel == 1 else self.norm("mlp_norm", x))
            return x + (y + z) * jnp.asarray(c.residual_scale, x.dtype), kv, routing
        x, kv = self.branch("attention", x, attend)
        if c.cross:
            x, _ = self.branch("cross", x, lambda h: self.attend_cross(h, cross))
        x, routing = self.branch("mlp", x, feed)
        return x, kv, routing

    def branch(self, name: str, x: Array, f: Callable) -> tuple[Array, Any]:
        """`x + f(x)`, with norms where the config has them."""
        place = self.config.norm_place
        y, extra = f(self.norm(f"{name}_norm", x) if place in ("pre", "both") else x)
        if place in ("branch", "both"):
            y = self.norm(f"{name}_post_norm", y)
        x = x + y * jnp.asarray(self.config.residual_scale, x.dtype)
        return (self.norm(f"{name}_norm", x) if place == "sum" else x), extra

    def attend(self, x, kind, turns, cached, seen):
        c = self.config
        q, k, v = self.project("q", x, c.num_heads), self.project("k", x, c.kv_heads), self.project("v", x, c.kv_heads)
        if c.qk_norm == "heads":
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        q, k, v = (self.split(self.shared.whole(y)) for y in (q, k, v))  # [B, heads, T, H]
        if c.qk_norm == "head":
            q, k = self.norm("q_norm", q), self.norm("k_norm", k)
        q, k, v = (checkpoint_name(y, name) for y, name in ((q, "q"), (k, "k"), (v, "v")))
        turn, later = turns.get(kind.rope, (None, None))  # keys turn before they are cached, or later
        turned = lambda y, angles: y if angles is None else rotate(y, angles, kind.rope.interleaved)
        q, k = turned(q, turn), k if later else turned(k, turn)
        if cached is not None:
            keys, values, write = cached
            k, v = write(keys, k), write(values, v)
        kv = k, v
        k = turned(k, later)
        kernel = c.kernel if cached is None or c.kernel == "xla" else None  # a fused one is asked of training, not of a cache
        where = dict(causal=c.causal, window=kind.window, softcap=c.attention_softcap, scale=c.scale, kernel=kernel)
        attend = attention if self.shared.rows == 1 else partial(attention_once, self.shared)
        return checkpoint_name(self.out("o", attend(q, k, v, **where, **seen)), "attention"), kv

    def attend_cross(self, x, cross):
        c = self.config
        q = self.split(self.project("cross_q", x, c.num_heads))
        cross = {**self.cross_kv(x), **cross} if self.is_initializing() else cross
        return self.out("cross_o", attention(q, causal=False, scale=c.scale, **cross)), None

    def cross_kv(self, encoded: Array) -> dict[str, Array]:
        """Keys and values `[B, K, S, H]` of an encoder's output `[B, S, D]`."""
        heads = self.config.kv_heads
        return {
            "k": self.split(self.project("cross_k", encoded, heads)),
            "v": self.split(self.project("cross_v", encoded, heads)),
        }

    def project(self, name, x, heads):
        c = self.config
        axis = "heads" if name.endswith("q") else "kv"
        w = self.weight(name, (c.hidden_size, heads * c.width), ("embed", axis), nn.initializers.normal(c.hidden_size**-0.5))
        return linear(x, w, self.bias(c.qkv_bias, f"{name}_bias", heads * c.width, axis))

    def split(self, x):
        """`[B, T, N H]` to `[B, N, T, H]`."""
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1, self.config.width), 1, 2)

    def out(self, name, x):
        c = self.config
        inputs = c.num_heads * c.width
        x = jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], inputs)
        w = self.weight(name, (inputs, c.hidden_size), ("heads", "embed"), self.into_residual(inputs))
        return linear(x, w, self.bias(c.out_bias, f"{name}_bias", c.hidden_size, "embed"))

    def into_residual(self, inputs):
        """Smaller with depth, so that the sum over the blocks starts at a fixed size  (GPT-2)."""
        return nn.initializers.normal((2 * self.config.num_layers * inputs) ** -0.5)

    def mlp(self, x):
        c = self.config
        init = nn.initializers.normal(c.hidden_size**-0.5)

        def project(name):
            w = self.weight(name, (c.hidden_size, c.mlp_size), ("embed", "mlp"), init)
            return linear(x, w, self.bias(c.mlp_bias, f"{name}_bias", c.mlp_size, "mlp"))

        activate = ACTIVATIONS[c.activation]
        h = activate(project("gate")) * project("up") if c.gated else activate(project("up"))
        h = checkpoint_name(h, "mlp")
        w = self.weight("down", (c.mlp_size, c.hidden_size), ("mlp", "embed"), self.into_residual(c.mlp_size))
        return linear(h, w, self.bias(c.mlp_bias, "down_bias", c.hidden_size, "embed"))

    def sparse(self, x, real):
        c, axes = self.config, ("expert", "embed", "mlp")
        init = nn.initializers.normal(c.hidden_size**-0.5)
        router = self.weight("router", (c.hidden_size, c.experts), ("embed", None), init)
        gate = self.weight("expert_gate", (c.experts, c.hidden_size, c.expert_size), axes, init)
        up = self.weight("expert_up", (c.experts, c.hidden_size, c.expert_size), axes, init)
        into, size = self.into_residual(c.expert_size), (c.experts, c.expert_size, c.hidden_size)
        down = self.weight("expert_down", size, ("expert", "mlp", "embed"), into)
        how = dict(per_token=c.experts_per_token, renormalise=c.expert_renormalise, activate=ACTIVATIONS[c.activation])
        return experts(x, router, gate, up, down, real, **how)
