"""Modules that declare their parameters, and read them as plain leaves afterwards."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf.models.linear import rows

Array = jax.Array


class Weights(nn.Module):
    """A module whose parameters are declared at initialisation, and plain leaves afterwards."""

    config: Any

    def weight(
        self,
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        init: Callable,
        dtype: Any = None,
    ) -> Any:
        # `self.param` would check every leaf's shape, but adapters and quantised matrices stand in
        # a leaf's place: after initialisation it is read as it is.
        if self.is_initializing():
            dtype = self.config.param_dtype if dtype is None else dtype
            return self.param(name, nn.with_partitioning(init, axes), shape, dtype)
        return self.get_variable("params", name)

    def bias(self, wanted: bool, name: str, size: int, axis: str | None) -> Any:
        return self.weight(name, (size,), (axis,), nn.initializers.zeros) if wanted else None

    def norm_weights(self, name: str, size: int) -> tuple[Any, Any]:
        c = self.config
        # Norms over a head or over all heads (`qk_norm`) have no axis of hidden states.
        axis = "embed" if size == c.hidden_size else None
        # Gemma multiplies by 1 + w: its scales start at 0, so that the norm starts as the identity.
        scale = self.weight(name, (size,), (axis,), nn.initializers.constant(1.0 - c.norm_offset))
        return scale, self.bias(c.norm == "layer" and c.norm_bias, f"{name}_bias", size, axis)

    def normalise(self, x: Array, scale: Any, bias: Any, eps: float | None = None) -> Array:
        """Root mean square or layer norm, computed in at least float32."""
        c = self.config
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if c.norm == "layer":
            y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(
            (y * y).mean(-1, keepdims=True) + (c.norm_eps if eps is None else eps)
        )
        y = y if scale is None else y * (rows(scale, y) + c.norm_offset)
        return (y if bias is None else y + rows(bias, y)).astype(x.dtype)

    def norm(self, name: str, x: Array, eps: float | None = None) -> Array:
        return self.normalise(x, *self.norm_weights(name, x.shape[-1]), eps)

    def into_residual(self, inputs: int) -> Callable:
        """Smaller with depth, so that the sum over the blocks starts at a fixed size  (GPT-2)."""
        return nn.initializers.normal((2 * self.config.num_layers * inputs) ** -0.5)
