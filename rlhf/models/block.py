"""One block: attention and MLP, each added to the residual stream."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf.models.attention import attention, shared_prefix_attention
from rlhf.models.config import ACTIVATIONS, LayerKind, TransformerConfig
from rlhf.models.experts import experts
from rlhf.models.linear import linear, rows
from rlhf.models.rotary import Rope, Rotation, rotate
from rlhf.shared_prefix import NOT_SHARED, SharedPrefix

Array = jax.Array


class Weights(nn.Module):
    """A module whose parameters are declared at initialisation, and plain leaves afterwards."""

    config: Any

    def weight(
        self, name: str, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable
    ) -> Any:
        # `self.param` would check every leaf's shape, but adapters and quantised matrices stand in
        # a leaf's place: after initialisation it is read as it is.
        if self.is_initializing():
            return self.param(
                name, nn.with_partitioning(init, axes), shape, self.config.param_dtype
            )
        return self.get_variable("params", name)

    def bias(self, wanted: bool, name: str, size: int, axis: str | None) -> Any:
        return self.weight(name, (size,), (axis,), nn.initializers.zeros) if wanted else None

    def norm_weights(self, name: str, size: int) -> tuple[Any, Any]:
        c = self.config
        # Norms over a head or over all heads (`qk_norm`) have no axis of hidden states.
        axis = "embed" if size == c.hidden_size else None
        # Gemma multiplies by 1 + w: its scales start at 0, so that the norm starts as the identity.
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
    shared: SharedPrefix = NOT_SHARED

    @nn.compact
    def __call__(
        self,
        x: Array,
        kind: LayerKind,
        rotations: Mapping[Rope | None, Rotation],
        cached,
        attention_inputs: dict[str, Any],
        cross: dict[str, Any] | None,
    ) -> tuple[Array, tuple[Array, Array], Any]:
        """`x [B, T, D]` through one block; what rows share stands in `x` once, and is attention's
        alone to read again.

        Args:
          cached: this layer's (keys, values, write), or None.
          attention_inputs: of `attention`: positions, segment ids, bias.
          cross: likewise for the encoder's output, with its `k` and `v`; None without an encoder.

        Returns: x, this layer's keys and values, and its `Routing`; None without experts.
        """
        c = self.config

        def attend(h):
            return self.attend(h, kind, rotations, cached, attention_inputs)

        # Padding must not count in the statistics of the router.
        real = self.shared.deduplicate(attention_inputs["segment_ids"] != 0)

        def feed(h):
            return self.sparse(h, real, cached) if kind.sparse else (self.mlp(h), None)

        # GPT-J reads both branches from one norm, GPT-NeoX from a norm each; neither reads the
        # other.
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

    def attend(self, x, kind, rotations, cached, attention_inputs):
        c = self.config
        q = self.project("q", x, c.num_heads)
        k = self.project("k", x, c.kv_heads)
        v = self.project("v", x, c.kv_heads)
        # OLMo 2 norms before the split into heads, over all of them; Qwen 3 each head by itself.
        if c.qk_norm == "heads":
            q = self.norm("q_norm", q)
            k = self.norm("k_norm", k)
        # Every row with all its columns again, [B, heads, T, H]: attention alone needs the prefix
        # in each row; the products above and below read it once a group.
        q, k, v = (self.split(self.shared.expand(y)) for y in (q, k, v))
        if c.qk_norm == "head":
            q = self.norm("q_norm", q)
            k = self.norm("k_norm", k)
        # Named for the rematerialisation policies "names" and "offload" of `REMAT`.
        q, k, v = (checkpoint_name(y, name) for y, name in ((q, "q"), (k, "k"), (v, "v")))

        def rotated(y, angles):
            return y if angles is None else rotate(y, angles, kind.rope.interleaved)

        # Keys are rotated before they are cached, so that each is rotated once.  Where angles
        # depend on the length (`by_length`), they are cached plain and rotated anew at every step.
        angles, key_angles = rotations.get(kind.rope, (None, None))
        q = rotated(q, angles)
        k = k if key_angles else rotated(k, angles)
        if cached is not None:
            keys, values, write = cached
            k = write(keys, k)
            v = write(values, v)
        kv = k, v
        k = rotated(k, key_angles)
        # A fused kernel is meant for training; a cache it cannot serve, which is no error.
        kernel = c.kernel if cached is None or c.kernel == "xla" else None
        where = dict(
            causal=c.causal,
            window=kind.window,
            softcap=c.attention_softcap,
            scale=c.scale,
            kernel=kernel,
            cached=cached is not None,
        )
        attend = (
            attention
            if self.shared.group_size == 1
            else partial(shared_prefix_attention, self.shared)
        )
        return checkpoint_name(
            self.out("o", attend(q, k, v, **where, **attention_inputs)), "attention"
        ), kv

    def attend_cross(self, x, cross):
        c = self.config
        q = self.split(self.project("cross_q", x, c.num_heads))
        # Initialisation has no encoder's output; reading `x` in its place declares the parameters.
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
        w = self.weight(
            name,
            (c.hidden_size, heads * c.width),
            ("embed", axis),
            nn.initializers.normal(c.hidden_size**-0.5),
        )
        return linear(x, w, self.bias(c.qkv_bias, f"{name}_bias", heads * c.width, axis))

    def split(self, x):
        """`[B, T, N H]` to `[B, N, T, H]`."""
        return jnp.swapaxes(x.reshape(*x.shape[:2], -1, self.config.width), 1, 2)

    def out(self, name, x):
        c = self.config
        inputs = c.num_heads * c.width
        x = jnp.swapaxes(x, 1, 2).reshape(x.shape[0], x.shape[2], inputs)
        w = self.weight(
            name, (inputs, c.hidden_size), ("heads", "embed"), self.into_residual(inputs)
        )
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
        w = self.weight(
            "down", (c.mlp_size, c.hidden_size), ("mlp", "embed"), self.into_residual(c.mlp_size)
        )
        return linear(h, w, self.bias(c.mlp_bias, "down_bias", c.hidden_size, "embed"))

    def sparse(self, x, real, cached):
        c = self.config
        axes = ("expert", "embed", "mlp")
        init = nn.initializers.normal(c.hidden_size**-0.5)
        # Not split over experts: every device routes its own tokens.
        router = self.weight("router", (c.hidden_size, c.experts), ("embed", None), init)
        gate = self.weight("expert_gate", (c.experts, c.hidden_size, c.expert_size), axes, init)
        up = self.weight("expert_up", (c.experts, c.hidden_size, c.expert_size), axes, init)
        down = self.weight(
            "expert_down",
            (c.experts, c.expert_size, c.hidden_size),
            ("expert", "mlp", "embed"),
            self.into_residual(c.expert_size),
        )
        options = dict(
            per_token=c.experts_per_token,
            renormalise=c.expert_renormalise,
            activate=ACTIVATIONS[c.activation],
            cached=cached is not None,
        )
        return experts(x, router, gate, up, down, real, **options)
