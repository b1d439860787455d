"""Short causal convolutions over the tokens of a segment, and the layer that is one (LFM2)."""

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.models.linear import linear, rows

Array = jax.Array


@documented
class Recent(NamedTuple):
    """The last real columns that a convolution read, the newest last.

    Attributes:
      inputs: [B, K - 1, C].
      segment_ids: [B, K - 1] int32; 0 where there was none yet.
    """

    inputs: Array
    segment_ids: Array


def recent(batch: int, taps: int, channels: int, dtype: Any) -> Recent:
    """Before the first column."""
    return Recent(
        jnp.zeros((batch, taps - 1, channels), dtype), jnp.zeros((batch, taps - 1), jnp.int32)
    )


def short_convolution(
    x: Array, weight: Array, segment_ids: Array, before: Recent | None = None
) -> tuple[Array, Recent]:
    """`y_t = Σ_j w_j x_{t - (K - 1) + j}` over the last K real tokens, those of its own segment
    alone.

    Padding is passed over wherever it lies, so that what a token reads depends on nothing beside
    its segment.

    Args:
      x: `[B, T, C]`.
      weight: `[K, C]`, a filter for each channel.
      segment_ids: `[B, T]` int32, 0 is padding.
      before: the columns that came before; None: there were none.

    Returns: `[B, T, C]`, without meaning at padding; and what `before` is to the next call.

    >>> x = jnp.array([[[1.0], [2.0], [9.0], [3.0], [4.0]]])
    >>> y, _ = short_convolution(x, jnp.array([[10.0], [1.0]]), jnp.array([[1, 1, 0, 1, 2]]))
    >>> y[0, [0, 1, 3, 4], 0].tolist()
    [1.0, 12.0, 23.0, 4.0]
    """
    taps = weight.shape[0]
    batch, length, channels = x.shape
    before = recent(batch, taps, channels, x.dtype) if before is None else before
    x = jnp.concatenate([before.inputs.astype(x.dtype), x], axis=1)
    ids = jnp.concatenate([before.segment_ids, segment_ids], axis=1)
    real = ids != 0
    columns = jnp.arange(x.shape[1])[None]
    # The last real column before each, and before the end; -1 where there is none.
    latest = jax.lax.cummax(jnp.where(real, columns, -1), axis=1)
    last = jnp.pad(latest, ((0, 0), (1, 0)), constant_values=-1)

    def back(at: Array) -> Array:
        """From columns `[B, ...]`, -1 for none, to the real ones before them."""
        return jnp.where(at < 0, -1, jnp.take_along_axis(last, jnp.maximum(at, 0), axis=1))

    def gathered(x: Array) -> Array:
        at = jnp.broadcast_to(columns[:, taps - 1 :], segment_ids.shape)
        out = rows(weight[-1], x) * x[:, taps - 1 :]
        for tap in range(2, taps + 1):
            at = back(at)
            same = (at >= 0) & (jnp.take_along_axis(ids, at, axis=1) == segment_ids)
            out = out + jnp.where(same[..., None], rows(weight[-tap], x) * _rows(x, at), 0)
        return out

    def shifted(x: Array) -> Array:
        out = rows(weight[-1], x) * x[:, taps - 1 :]
        for tap in range(2, taps + 1):
            here = slice(taps - tap, x.shape[1] - tap + 1)
            same = ids[:, here] == segment_ids
            out = out + jnp.where(same[..., None], rows(weight[-tap], x) * x[:, here], 0)
        return out

    # Columns next to one another are read by shifts, several times as fast as by gathers; unless
    # padding lies between tokens of a row, as where turns of unequal length are read.
    between = real[:, 1:] & ~real[:, :-1] & (last[:, 1:-1] >= 0)
    y = shifted(x) if length == 1 else jax.lax.cond(between.any(), gathered, shifted, x)
    at = jnp.full((batch, 1), x.shape[1])
    newest = []
    for _ in range(taps - 1):
        at = back(at)
        newest.append(at)
    at = jnp.concatenate(newest[::-1], axis=1)
    ids = jnp.where(at < 0, 0, jnp.take_along_axis(ids, jnp.maximum(at, 0), axis=1))
    return y, Recent(jnp.where((at < 0)[..., None], 0, _rows(x, at)), ids)


def _rows(x: Array, at: Array) -> Array:
    """Columns `at [B, N]` of `x [B, T, C]`; any where `at` is -1."""
    return jax.vmap(lambda x, at: x[at])(x, jnp.maximum(at, 0))


@dataclasses.dataclass(frozen=True)
class ShortConvolution:
    """`out(c * conv(b * x))`, with b, c and x of one projection  (LFM2)."""

    taps: int
    bias: bool = False

    def empty(self, c, batch: int, length: int) -> Recent:
        return recent(batch, self.taps, c.hidden_size, c.dtype)

    def mix(self, block, x: Array, where) -> tuple[Array, Recent]:
        c = block.config
        size = c.hidden_size
        init = nn.initializers.normal(size**-0.5)
        parts = [
            linear(
                x,
                block.weight(f"conv_{name}", (size, size), ("embed", "heads"), init),
                block.bias(self.bias, f"conv_{name}_bias", size, "heads"),
            )
            for name in ("b", "c", "x")
        ]
        b, gate, h = parts
        taps = block.weight(
            "conv_taps", (self.taps, size), (None, "heads"), nn.initializers.normal(self.taps**-0.5)
        )
        y, state = short_convolution(b * h, taps, where.segment_ids, where.state)
        tap_bias = block.bias(self.bias, "conv_taps_bias", size, "heads")
        y = y if tap_bias is None else y + rows(tap_bias, y)
        w = block.weight("conv_out", (size, size), ("heads", "embed"), block.into_residual(size))
        out_bias = block.bias(self.bias, "conv_out_bias", size, "embed")
        return linear(gate * y, w, out_bias), state
