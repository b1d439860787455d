"""Rotary positions: their frequencies, the scalings that stretch them over longer texts, and the
rotation.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from rlhf.fields import documented
from rlhf.models.linear import are_ids, look_up, or_zero

Array = jax.Array


class Scaling(Protocol):
    """Frequencies for texts longer than those of pretraining."""

    @property
    def attention_factor(self) -> float: ...  # on cos and sin

    @property
    def by_length(self) -> bool:
        """Whether the frequencies depend on how long a sequence is; else `lengths` is None."""
        ...

    def frequencies(self, theta: float, size: int, lengths: Array | None) -> Array:
        """Radians a token, `[..., size / 2]`."""
        ...


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which of a head's entries turn, and how fast  (RoPE, arXiv:2104.09864)."""

    theta: float = 10_000.0  # base of the frequencies
    share: float = 1.0  # of a head's entries, from the first, that turn; the others stay
    # entries 2i and 2i + 1 are a pair (GPT-J); False: i and i + size / 2
    interleaved: bool = False
    scaling: Scaling | None = None

    def size(self, width: int) -> int:
        """Entries that turn, of `width`."""
        # `int` rounds down, and 0.29 of 100 is 28.999… in floating point.
        return int(width * self.share + 1e-6)


@documented
class Rotation(NamedTuple):
    """cos and sin, each `[B, 1, T, size / 2]`, of the queries; and of the keys where those turn
    after they were cached.

    Attributes:
      queries: cosines and sines for queries.
      keys: cosines and sines for keys.
    """

    queries: tuple[Array, Array]
    keys: tuple[Array, Array] | None = None


def plain(theta: float, size: int) -> Array:
    """`theta ** (-2 i / size)`, the frequencies of pretraining."""
    # In float64, and rounded once: a power in float32 is off by several last bits on some devices,
    # and far positions multiply them.
    return jnp.asarray(theta ** (-np.arange(0, size, 2) / size), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Positions divided by `factor`  (arXiv:2306.15595)."""

    factor: float
    attention_factor = 1.0
    by_length = False

    def frequencies(self, theta, size, lengths=None):
        return plain(theta, size) / self.factor


@dataclasses.dataclass(frozen=True)
class Proportional:
    """Frequencies of all of a head, of which the first share turns, and the rest stays  (Gemma 4)."""

    share: float
    attention_factor = 1.0
    by_length = False

    def frequencies(self, theta, size, lengths=None):
        turning = int(self.share * size / 2)
        return jnp.where(jnp.arange(size // 2) < turning, plain(theta, size), 0.0)


@dataclasses.dataclass(frozen=True)
class Dynamic:
    """A base that grows with the length once it is over `original`  (NTK-aware, as transformers has
    it).
    """

    factor: float
    original: int
    attention_factor = 1.0
    by_length = True

    def frequencies(self, theta, size, lengths):
        # Up to the original length the growth is 1, and the frequencies are those of pretraining.
        lengths = jnp.maximum(lengths, self.original)[..., None].astype(jnp.float32)
        growth = self.factor * lengths / self.original - (self.factor - 1)
        exponent = jnp.arange(0, size, 2, dtype=jnp.float32) / (size - 2)
        return _like(plain(theta, size), growth) * growth ** -_like(exponent, growth)


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Long waves divided by `factor`, short ones unchanged, a blend between  (Llama 3.1)."""

    factor: float
    low: float
    high: float
    original: int
    attention_factor = 1.0
    by_length = False

    def frequencies(self, theta, size, lengths=None):
        unscaled = plain(theta, size)
        turns = self.original * unscaled / (2 * math.pi)  # over the length of pretraining
        share = jnp.clip((turns - self.low) / (self.high - self.low), 0.0, 1.0)
        return (1 - share) * unscaled / self.factor + share * unscaled


@dataclasses.dataclass(frozen=True)
class Yarn:
    """A ramp over the entries, between unchanged and divided by `factor`  (YaRN, arXiv:2309.00071,
    eq. 23 to 25).
    """

    factor: float
    original: int
    attention_factor: float
    fast: float = 32.0
    slow: float = 1.0
    truncate: bool = True
    by_length = False

    def frequencies(self, theta, size, lengths=None):

        # The entry whose wave turns so often over the length of pretraining.
        def entry(turns):
            return size * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = entry(self.fast)
        high = entry(self.slow)
        if self.truncate:
            low = math.floor(low)
            high = math.ceil(high)
        low = max(low, 0)
        high = min(high, size - 1)
        # 0.001, as in the authors' code, where the ramp has no width.
        divided = jnp.clip(
            (jnp.arange(size // 2, dtype=jnp.float32) - low) / max(high - low, 0.001), 0.0, 1.0
        )
        unscaled = plain(theta, size)
        return unscaled / self.factor * divided + unscaled * (1 - divided)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """A divisor for every frequency; another set for sequences longer than `original`  (LongRoPE,
    arXiv:2402.13753).

    The set is chosen for every sequence by itself: what else is in the batch changes nothing.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    attention_factor: float
    by_length = True

    def frequencies(self, theta, size, lengths):
        divisors = jnp.asarray([self.short, self.long], jnp.float32)[
            (lengths > self.original).astype(jnp.int32)
        ]
        return _like(plain(theta, size), divisors) / divisors


def rotations(
    ropes: Sequence[tuple[Rope, int]],
    positions: Array,
    segment_ids: Array,
    kv_positions: Array | None,
    kv_segment_ids,
) -> dict[tuple[Rope, int], Rotation]:
    """cos and sin for every kind of rotation in use, of heads of a width; `kv_...` are a cache's,
    None without one.

    Positions beyond a cache's columns give NaN: a row has no more tokens than columns.
    """
    # With a cache a sequence is as long as what the cache holds of it, not as this step's tokens.
    if kv_positions is None:
        here = lengths(positions, segment_ids)
    else:
        here = lengths(kv_positions, kv_segment_ids)

    def one(rope, width, positions, segment_ids):
        by_length = rope.scaling is not None and rope.scaling.by_length
        of_row = (
            jnp.take_along_axis(here, segment_ids, axis=1, mode="fill", fill_value=0)
            if by_length
            else None
        )
        size = rope.size(width)
        f = (
            plain(rope.theta, size)
            if rope.scaling is None
            else rope.scaling.frequencies(rope.theta, size, of_row)
        )
        # One query a row: XLA would take sines anew for every layer's q and k (131 of 1,000 µs a
        # token on a CPU), but reads a table of all positions once.
        table = kv_positions is not None and not by_length
        at = jnp.arange(kv_positions.shape[1])[None] if table else positions
        angles = at[:, None, :, None].astype(jnp.float32) * (
            f[:, None] if by_length else f.reshape(1, 1, 1, -1)
        )
        factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
        cos = factor * jnp.cos(angles)
        sin = factor * jnp.sin(angles)
        if table:
            # [1, 1, S, size / 2] -> [B, 1, T, size / 2]
            rows = or_zero(positions, kv_positions.shape[1], segment_ids)
            return look_up(cos[0, 0], rows)[:, None], look_up(sin[0, 0], rows)[:, None]
        if by_length:
            # A segment id beyond the columns has no length: NaN rather than another's frequencies.
            known = are_ids(segment_ids, here.shape[1])[:, None, :, None]
            cos = jnp.where(known, cos, jnp.nan)
            sin = jnp.where(known, sin, jnp.nan)
        return cos, sin

    def rotation(rope, width):
        later = kv_positions is not None and rope.scaling is not None and rope.scaling.by_length
        return Rotation(
            one(rope, width, positions, segment_ids),
            one(rope, width, kv_positions, kv_segment_ids) if later else None,
        )

    return {each: rotation(*each) for each in dict.fromkeys(ropes)}


def lengths(positions: Array, segment_ids: Array) -> Array:
    """`[B, T + 1]`: how long the sequence of each segment id is; ids count from 1, and 0 is
    padding.

    >>> lengths(jnp.array([[0, 1, 2, 0]]), jnp.array([[1, 1, 1, 2]])).tolist()
    [[0, 3, 1, 0, 0]]
    """
    batch, length = positions.shape
    rows = jnp.broadcast_to(jnp.arange(batch)[:, None], segment_ids.shape)
    # A scatter of maxima, as segments may lie anywhere in a row; ids beyond the columns are
    # dropped.
    longest = (
        jnp.zeros((batch, length + 1), positions.dtype).at[rows, segment_ids].max(positions + 1)
    )
    return longest.at[:, 0].set(0)


def rotate(x: Array, angles: tuple[Array, Array], interleaved: bool = False) -> Array:
    """Turns pairs of entries of `x [B, N, T, H]` by angles `[B, 1, T, size / 2]`; entries from
    `size` on stay  (eq. 34).
    """
    cos, sin = angles
    size = 2 * cos.shape[-1]
    # In float32: in half precision cos and sin of neighbouring positions are often equal.
    turning = x[..., :size].astype(jnp.promote_types(x.dtype, jnp.float32))
    if interleaved:
        first = turning[..., 0::2]
        second = turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    first, second = first * cos - second * sin, second * cos + first * sin
    out = (
        jnp.stack([first, second], axis=-1).reshape(turning.shape)
        if interleaved
        else jnp.concatenate([first, second], -1)
    )
    return (
        jnp.concatenate([out.astype(x.dtype), x[..., size:]], axis=-1)
        if size < x.shape[-1]
        else out.astype(x.dtype)
    )


def _like(vector: Array, like: Array) -> Array:
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))
