"""The gated delta rule, by chunks and token by token; and the layers that are one: Qwen's and Kimi's."""

import dataclasses
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf.fields import documented
from rlhf.models.convolution import Recent, recent, short_convolution
from rlhf.models.linear import linear, rows

Array = jax.Array
CHUNK = 64
BLOCK = 16  # of a chunk, where each channel decays by itself
# Sums of many small changes: in full float32 on every device.
einsum = partial(jnp.einsum, precision="highest")


@documented
class Memory(NamedTuple):
    """What the rule keeps of the tokens before.

    Attributes:
      state: [B, H, K, V] float32.
      segment_ids: [B] int32, the segment that it is of; 0: none yet.
    """

    state: Array
    segment_ids: Array


def delta_rule(
    q: Array,
    k: Array,
    v: Array,
    decay: Array,
    beta: Array,
    segment_ids: Array,
    before: Memory | None = None,
    *,
    chunk: int = CHUNK,
) -> tuple[Array, Memory]:
    """`S ← e^g S; S ← S + k (β (v - Sᵀ k))ᵀ; o = Sᵀ q`, from zeros at the start of a segment
    (arXiv:2412.06464; g a channel: arXiv:2510.26692).

    Chunk by chunk a triangular system stands for the changes within it (sec. 3.3): `T / chunk`
    steps of matrix products, and no array `[T, T]`.  A single token is one step.

    Args:
      q, k: `[B, H, T, K]`.  v: `[B, H, T, V]`.
      decay: g ≤ 0, `[B, H, T, 1]`, or `[B, H, T, K]` for each channel of the keys.
      beta: `[B, H, T]`.
      segment_ids: `[B, T]` int32; 0 is padding, which changes nothing.  The tokens of a segment lie
        side by side, but for padding.
      before: the memory to go on with; None: of nothing.
      chunk: tokens that are computed at once.

    Returns: o `[B, H, T, V]` float32, without meaning at padding; and the memory after.

    >>> one = jnp.ones((1, 1, 3, 1))
    >>> o, _ = delta_rule(one, one, one, 0 * one - jnp.log(2.0), 0.5 * one[..., 0], jnp.array([[1, 1, 2]]))
    >>> o[0, 0, :, 0].tolist()  # 1/2; 1/4 + (1 - 1/4) / 2; anew
    [0.5, 0.625, 0.5]
    """
    q, k, v, decay, beta = (x.astype(jnp.float32) for x in (q, k, v, decay, beta))
    batch, heads, length, _ = q.shape
    if before is None:
        state = jnp.zeros((batch, heads, k.shape[-1], v.shape[-1]), jnp.float32)
        before = Memory(state, jnp.zeros(batch, jnp.int32))
    real = segment_ids != 0
    k = jnp.where(real[:, None, :, None], k, 0)
    decay = jnp.where(real[:, None, :, None], decay, 0)
    beta = jnp.where(real[:, None], beta, 0)
    # Padding belongs to the segment before it: then equal ids are side by side.
    ids = jnp.concatenate([before.segment_ids[:, None], segment_ids], axis=1)
    columns = jax.lax.cummax(jnp.where(ids != 0, jnp.arange(length + 1)[None], 0), axis=1)
    ids = jnp.take_along_axis(ids, columns, axis=1)[:, 1:]
    if length == 1:
        return _one(q, k, v, decay, beta, ids[:, 0], before)
    size = min(chunk, length)
    more = -length % size

    def chunks(x, axis):
        """`[..., T, ...]` to `[T / C, ..., C, ...]`."""
        pad = [(0, more if i == axis else 0) for i in range(x.ndim)]
        # The last id again: padding at the end.
        x = jnp.pad(x, pad, mode="edge") if x is ids else jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    parts = tuple(chunks(x, 2) for x in (q, k, v, decay, beta))
    # Of a chunk its rows and the memory before it are held for the backward pass.
    step = jax.checkpoint(_chunk, prevent_cse=False)
    after, o = jax.lax.scan(step, before, (*parts, chunks(ids, 1)))
    o = jnp.moveaxis(o, 0, 2).reshape(batch, heads, -1, v.shape[-1])
    return o[:, :, :length], after


def _one(q, k, v, decay, beta, ids, before: Memory) -> tuple[Array, Memory]:
    """A step of one token."""
    q, k, v, decay = (x[:, :, 0] for x in (q, k, v, decay))
    continues = (ids == before.segment_ids)[:, None, None, None]
    state = jnp.where(continues, before.state * jnp.exp(decay)[..., None], 0)
    change = beta * (v - einsum("bhkv,bhk->bhv", state, k))
    state = state + k[..., None] * change[..., None, :]
    return einsum("bhkv,bhk->bhv", state, q)[:, :, None], Memory(state, ids)


def _chunk(before: Memory, parts) -> tuple[Memory, Array]:
    """C tokens, `[B, H, C, ..]`: with G the sums of g, `A_ij = β_i (k_i · k_j) e^(G_i - G_j)` below
    the diagonal, and changes U of `(I + A) U = β (v - e^G Sᵀ k)`.
    """
    q, k, v, decay, beta, ids = parts
    # What is left of a thing after so many tokens: sums of g, which are never differences of larger
    # sums, whose rounding the exponential would show.
    total = jnp.cumsum(decay, axis=2)
    same = ids[:, None, :, None] == ids[:, None, None, :]
    continues = (ids == before.segment_ids[:, None])[:, None, :, None]
    # The share of the memory before that a token still has.
    left = jnp.where(continues, jnp.exp(total), 0)
    causal = jnp.tril(jnp.ones((1, 1, *same.shape[-2:]), bool))
    a = jnp.where(same & jnp.tril(causal, -1), _decayed(k, k, decay), 0)
    a = a * beta[..., None]
    wanted = beta[..., None] * (v - einsum("bhck,bhkv->bhcv", k * left, before.state))
    changes = _solved(a, wanted)
    of_chunk = jnp.where(same & causal, _decayed(q, k, decay), 0)
    o = einsum("bhck,bhkv->bhcv", q * left, before.state)
    o = o + einsum("bhij,bhjv->bhiv", of_chunk, changes)
    # What the last token leaves.
    to_end = jnp.where(same[:, :, -1:].swapaxes(-1, -2), jnp.exp(_after(decay)), 0)
    state = left[:, :, -1, :, None] * before.state
    state = state + einsum("bhck,bhcv->bhkv", k * to_end, changes)
    return Memory(state, ids[:, -1]), o


@jax.custom_vjp
def _solved(a: Array, y: Array) -> Array:
    """x of `(I + A) x = y`, for A `[B, H, C, C]` of which the part below the diagonal counts.

    By the inverse, which the gradient needs too.  Not by `triangular_solve`, whose threads XLA on a
    CPU lets wait for each other for ever.
    """
    return einsum("bhij,bhjv->bhiv", _inverse(a), y)


def _solved_forward(a: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    inverse = _inverse(a)
    x = einsum("bhij,bhjv->bhiv", inverse, y)
    return x, (inverse, x)


def _solved_back(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    inverse, x = residuals
    of_y = einsum("bhji,bhjv->bhiv", inverse, g)
    return -einsum("bhiv,bhjv->bhij", of_y, x), of_y


_solved.defvjp(_solved_forward, _solved_back)


def _inverse(a: Array) -> Array:
    """`(I + A)⁻¹` for A `[B, H, C, C]` below the diagonal: of blocks on the diagonal, each twice as
    large as those before.

    `[[P, 0], [Q, R]]⁻¹ = [[P⁻¹, 0], [-R⁻¹ Q P⁻¹, R⁻¹]]`; every block is one of the result, and none
    grows as powers of A would.
    """
    batch, heads, length, _ = a.shape
    size = 1 << (length - 1).bit_length()
    a = jnp.pad(a, ((0, 0), (0, 0), (0, size - length), (0, size - length)))
    inverses = jnp.ones((batch, heads, size, 1, 1), a.dtype)
    half = 1
    while half < size:
        number = size // (2 * half)
        blocks = a.reshape(batch, heads, number, 2 * half, number, 2 * half)
        at = jnp.arange(number)
        # The axis of blocks comes first, as indices that lie apart have it.
        corner = jnp.moveaxis(blocks[:, :, at, half:, at, :half], 0, 2)
        first, second = inverses[:, :, 0::2], inverses[:, :, 1::2]
        corner = -einsum("bhnij,bhnjk,bhnkl->bhnil", second, corner, first)
        zeros = jnp.zeros_like(corner)
        inverses = jnp.concatenate(
            [
                jnp.concatenate([first, zeros], axis=-1),
                jnp.concatenate([corner, second], axis=-1),
            ],
            axis=-2,
        )
        half *= 2
    return inverses[:, :, 0, :length, :length]


def _after(decay: Array) -> Array:
    """`[.., C, D]`: the sum of g over the tokens after each."""
    after = jnp.flip(jnp.cumsum(jnp.flip(decay, axis=2), axis=2), axis=2)
    return jnp.pad(after[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))


def _between(decay: Array) -> Array:
    """`[B, H, C, C, D]`: the sum of g from after token j to token i, for `i ≥ j`; else 0."""
    size = decay.shape[2]
    later = jnp.tril(jnp.ones((size, size), bool), -1)[None, None, :, :, None]
    return jnp.cumsum(jnp.where(later, decay[:, :, :, None], 0), axis=2)


def _decayed(a: Array, b: Array, decay: Array) -> Array:
    """`Σ_d a_id b_jd e^(g_(j+1)d + .. + g_id)` for `i ≥ j`, `[B, H, C, C]`; anything above the
    diagonal.

    No exponent is above 0, whatever the decay.
    """
    size = decay.shape[2]
    if decay.shape[-1] == 1:
        return einsum("bhik,bhjk->bhij", a, b) * jnp.exp(_between(decay)[..., 0])
    out = []
    for start in range(0, size, BLOCK):
        here = slice(start, min(start + BLOCK, size))
        # Columns before the block: from them to its start, and from its start on.
        earlier = einsum(
            "bhik,bhjk->bhij",
            a[:, :, here] * jnp.exp(jnp.cumsum(decay[:, :, here], axis=2)),
            b[:, :, :start] * jnp.exp(_after(decay[:, :, :start])),
        )
        within = einsum(
            "bhik,bhjk,bhijk->bhij",
            a[:, :, here],
            b[:, :, here],
            jnp.exp(_between(decay[:, :, here])),
        )
        rest = size - here.stop
        out.append(jnp.pad(jnp.concatenate([earlier, within], -1), [(0, 0)] * 3 + [(0, rest)]))
    return jnp.concatenate(out, axis=2)


# ---- layers ------------------------------------------------------------------------------------


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def _normed(x: Array, scale: Array, eps: float) -> Array:
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * rows(scale, x)


class _State(NamedTuple):
    """Of one layer."""

    recent: Recent
    memory: Memory


@dataclasses.dataclass(frozen=True)
class Delta:
    """A layer of the gated delta rule: q, k and v through a short convolution, a decay a head or,
    as Kimi has it, a channel, and a gate on the normed output.

    Qwen's has `value_heads / key_heads` value heads to a key head, and gates by SiLU.  Kimi's decay
    and gate, by a sigmoid, come of two projections, the first of them `value_size` wide.
    """

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    taps: int = 4
    by_channel: bool = False

    @property
    def channels(self) -> int:
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size

    def empty(self, c, batch: int, length: int) -> _State:
        state = jnp.zeros((batch, self.value_heads, self.key_size, self.value_size), jnp.float32)
        return _State(
            recent(batch, self.taps, self.channels, c.dtype),
            Memory(state, jnp.zeros(batch, jnp.int32)),
        )

    def mix(self, block, x: Array, where) -> tuple[Array, _State]:
        c = block.config
        ids = where.segment_ids
        x = jnp.where((ids != 0)[..., None], x, 0)
        init = nn.initializers.normal(c.hidden_size**-0.5)
        keys = self.key_heads * self.key_size
        values = self.value_heads * self.value_size

        def project(name: str, size: int, x: Array = x) -> Array:
            w = block.weight(f"delta_{name}", (x.shape[-1], size), ("embed", "heads"), init)
            return linear(x, w)

        sizes = {"q": keys, "k": keys, "v": values}
        qkv = jnp.concatenate([project(*one) for one in sizes.items()], axis=-1)
        taps = [
            block.weight(
                f"delta_{name}_taps",
                (self.taps, size),
                (None, "heads"),
                nn.initializers.normal(self.taps**-0.5),
            )
            for name, size in sizes.items()
        ]
        state = where.state
        qkv, latest = short_convolution(
            qkv, jnp.concatenate(taps, axis=-1), ids, None if state is None else state.recent
        )
        q, k, v = jnp.split(jax.nn.silu(qkv), [keys, 2 * keys], axis=-1)
        wide = jnp.float32
        q, k = (_unit(self.by_head(y, self.key_heads).astype(wide)) for y in (q, k))
        # Value head h reads key head h // r.
        q, k = (jnp.repeat(y, self.value_heads // self.key_heads, axis=1) for y in (q, k))
        decay, gate = (self.kimi if self.by_channel else self.qwen)(block, x, project)
        beta = jax.nn.sigmoid(project("beta", self.value_heads).astype(wide))
        o, memory = delta_rule(
            q * self.key_size**-0.5,
            k,
            self.by_head(v, self.value_heads),
            decay,
            jnp.swapaxes(beta, 1, 2),
            ids,
            None if state is None else state.memory,
        )
        scale = block.weight("delta_norm", (self.value_size,), (None,), nn.initializers.ones)
        y = (_normed(o, scale, c.norm_eps) * gate).astype(x.dtype)
        y = jnp.swapaxes(y, 1, 2).reshape(*x.shape[:2], values)
        w = block.weight(
            "delta_out", (values, c.hidden_size), ("heads", "embed"), block.into_residual(values)
        )
        return linear(y, w), _State(latest, memory)

    def by_head(self, x: Array, heads: int) -> Array:
        """`[B, T, N H]` to `[B, N, T, H]`."""
        return jnp.swapaxes(x.reshape(*x.shape[:2], heads, -1), 1, 2)

    def rate(self, block) -> Array:
        """`e^a`, how fast a head forgets, `[H]`."""
        init = nn.initializers.constant(0.0)
        return jnp.exp(
            block.weight("delta_rate", (self.value_heads,), (None,), init).astype(jnp.float32)
        )

    def step(self, block, size: int) -> Array:
        init = nn.initializers.constant(-2.0)
        return block.weight("delta_dt_bias", (size,), (None,), init).astype(jnp.float32)

    def qwen(self, block, x: Array, project) -> tuple[Array, Array]:
        """`g = -e^a softplus(step x + b)` a head, and the gate `silu(z x)`."""
        heads = self.value_heads
        step = project("step", heads).astype(jnp.float32)
        step = step + rows(self.step(block, heads), step)
        decay = -rows(self.rate(block), step) * jax.nn.softplus(step)
        z = self.by_head(project("z", heads * self.value_size), heads)
        return jnp.swapaxes(decay, 1, 2)[..., None], jax.nn.silu(z.astype(jnp.float32))

    def kimi(self, block, x: Array, project) -> tuple[Array, Array]:
        """The same a channel of the keys, and the gate a sigmoid."""
        heads = self.value_heads
        size = heads * self.key_size

        def low_rank(name: str, size: int) -> Array:
            y = project(f"{name}_up", size, project(f"{name}_down", self.value_size))
            return y.astype(jnp.float32)

        step = low_rank("step", size)
        step = self.by_head(step + rows(self.step(block, size), step), heads)
        decay = -self.rate(block)[None, :, None, None] * jax.nn.softplus(step)
        gate = self.by_head(low_rank("gate", heads * self.value_size), heads)
        return decay, jax.nn.sigmoid(gate)
