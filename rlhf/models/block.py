"""One block: attention and MLP, each added to the residual stream."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.models.config import ACTIVATIONS, LayerKind, TransformerConfig
from rlhf.models.experts import Routed
from rlhf.models.feed_forward import mlp, sparse
from rlhf.models.linear import linear, rows
from rlhf.models.rotary import Rope, Rotation
from rlhf.models.self_attention import Cached, Where, attend, attend_cross, cross_kv
from rlhf.models.weights import Weights
from rlhf.shared_prefix import NOT_SHARED, SharedPrefix

Array = jax.Array


@documented
class Extra(NamedTuple):
    """What some models' layers read beside the residual stream.

    Attributes:
      cross: of an encoder's output, with its `k` and `v`; None without an encoder.
      lent: keys and values of earlier layers, by the name under which they lend them.
      layer_input: [B, T, P], of the tokens for this layer alone; None where there is none.
      chosen: [B, T, k], experts in place of the router's choice; None: that.
    """

    cross: dict[str, Any] | None = None
    lent: Mapping[str, tuple[Array, Array]] = {}
    layer_input: Array | None = None
    chosen: Array | None = None


class Block(Weights):
    """Attention, attention to an encoder's output where there is one, and MLP or experts."""

    config: TransformerConfig
    shared: SharedPrefix = NOT_SHARED

    @nn.compact
    def __call__(
        self,
        x: Array,
        kind: LayerKind,
        rotations: Mapping[tuple[Rope, int], Rotation],
        cached: Cached | None,
        attention_inputs: dict[str, Any],
        extra: Extra,
    ) -> tuple[Array, Any, Routed | None]:
        """`x [B, T, D]` through one block; what rows share stands in `x` once, and is attention's
        alone to read again.

        Args:
          x: `[B, T, D]`.
          kind: of the layer.
          rotations: angles of the positions, for each rope and width of heads.
          cached: this layer's part of the cache, or None.
          attention_inputs: of `attention`: positions, segment ids, bias.
          extra: what else it reads.

        Returns: x, this layer's keys and values or its mixer's state, and its `Routed`; None
        without experts.
        """
        c = self.config
        where = Where(c, kind, rotations, cached, attention_inputs, extra.lent)

        def mix(h):
            if kind.mixer is not None:
                return kind.mixer.mix(self, h, where)
            return attend(self, h, where, self.shared)

        # Padding must not count in the statistics of the router.
        real = self.shared.deduplicate(attention_inputs["segment_ids"] != 0)

        def feed(h, before):
            if not kind.sparse:
                return mlp(self, h, kind.widening * c.mlp_size, kind.mlp_prefix), None
            if c.experts.beside:
                return self.beside(h, before, real, cached is not None, extra.chosen)
            return sparse(self, h, real, cached is not None, extra.chosen)

        # GPT-J reads both branches from one norm, GPT-NeoX from a norm each; neither reads the
        # other.
        if c.parallel:
            h = self.norm("attention_norm", x)
            y, state = mix(h)
            z, routed = feed(h if c.parallel == 1 else self.norm("mlp_norm", x), x)
            return x + (y + z) * jnp.asarray(c.residual_scale, x.dtype), state, routed
        x, state = self.branch("attention", x, mix)
        if c.cross:
            x, _ = self.branch("cross", x, lambda h: (attend_cross(self, h, extra.cross), None))
        x, routed = self.branch("mlp", x, partial(feed, before=x))
        if c.layer_input_size:
            x = self.with_layer_input(x, extra.layer_input)
        if c.layer_scalar:
            # In the files, not trained.
            scalar = self.weight("layer_scalar", (1,), (None,), nn.initializers.ones)
            x = x * rows(jax.lax.stop_gradient(scalar), x)
        return x, state, routed

    def branch(self, name: str, x: Array, f: Callable) -> tuple[Array, Any]:
        """`x + f(x)`, with norms where the config has them."""
        place = self.config.norm_place
        y, more = f(self.norm(f"{name}_norm", x) if place in ("pre", "both") else x)
        if place in ("branch", "both"):
            y = self.norm(f"{name}_post_norm", y)
        x = x + y * jnp.asarray(self.config.residual_scale, x.dtype)
        return (self.norm(f"{name}_norm", x) if place == "sum" else x), more

    def beside(
        self, h: Array, x: Array, real: Array, cached: bool, chosen: Array | None
    ) -> tuple[Array, Routed]:
        """The sum of an MLP of h and of experts of x, each with norms of its own  (Gemma 4)."""
        c = self.config
        dense = self.norm("dense_post_norm", mlp(self, h, c.mlp_size))
        # The router reads x in a norm of its own.
        scale = self.weight("router_norm", (c.hidden_size,), ("embed",), nn.initializers.ones)
        router_input = self.normalise(x, None, None)
        router_input = (
            router_input
            * rows(scale, router_input)
            * jnp.asarray(c.hidden_size**-0.5, router_input.dtype)
        )
        y, routed = sparse(self, self.norm("expert_norm", x), real, cached, chosen, router_input)
        return dense + self.norm("expert_post_norm", y), routed

    def with_layer_input(self, x: Array, of_layer: Array | None) -> Array:
        """`x + norm(W (act(V x) · i))`, with i the layer's own input  (Gemma 4)."""
        c = self.config
        size = c.layer_input_size
        # Initialisation has no such input; any declares the parameters.
        of_layer = jnp.zeros((*x.shape[:2], size), x.dtype) if of_layer is None else of_layer
        init = nn.initializers.normal(c.hidden_size**-0.5)
        w = self.weight("input_gate", (c.hidden_size, size), ("embed", None), init)
        y = ACTIVATIONS[c.activation](linear(x, w)) * of_layer
        w = self.weight(
            "input_projection", (size, c.hidden_size), (None, "embed"), self.into_residual(size)
        )
        return x + self.norm("input_norm", linear(y, w))

    def cross_kv(self, encoded: Array) -> dict[str, Array]:
        """Keys and values `[B, K, S, H]` of an encoder's output `[B, S, D]`."""
        return cross_kv(self, encoded)
