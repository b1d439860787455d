"""Attention whose keys and values are made of one narrow vector a token (DeepSeek V2, MLA)."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from rlhf.models.attention import attention
from rlhf.models.linear import linear

Array = jax.Array
EPS = 1e-6  # of the norms of narrow vectors, whatever the config says of the others


@dataclasses.dataclass(frozen=True)
class Latent:
    """Multi-head latent attention  (arXiv:2405.04434, sec. 2.1).

    A token is held as `rank` numbers, of which every head makes its keys and values, and a key of
    `turning` numbers that all heads share; that one alone has a position.  While decoding, queries
    meet the narrow vectors themselves: `q · (U c) = (Uᵀ q) · c`.
    """

    rank: int
    plain: int  # entries of a query that meet keys made of the narrow vector
    turning: int  # those that meet the shared key
    value_size: int
    query_rank: int | None = None  # queries too are made of a narrow vector, of this size
    bias: bool = False

    def empty(self, c, batch: int, length: int) -> tuple[Array]:
        return (jnp.zeros((batch, 1, length, self.rank + self.turning), c.dtype),)

    def mix(self, block, x: Array, where) -> tuple[Array, tuple[Array]]:
        c = block.config
        heads = c.num_heads
        init = nn.initializers.normal(c.hidden_size**-0.5)

        def project(name: str, x: Array, size: int, axis: str | None = None) -> Array:
            w = block.weight(
                name, (x.shape[-1], size), ("embed" if axis is None else None, axis), init
            )
            biased = self.bias and axis is None
            return linear(x, w, block.bias(biased, f"{name}_bias", size, axis))

        width = self.plain + self.turning
        if self.query_rank is None:
            w = block.weight("q", (c.hidden_size, heads * width), ("embed", "heads"), init)
            q = linear(x, w)
        else:
            narrow = block.norm("latent_q_norm", project("latent_q_down", x, self.query_rank), EPS)
            q = project("latent_q_up", narrow, heads * width, "heads")
        q = jnp.swapaxes(q.reshape(*q.shape[:2], heads, width), 1, 2)
        q_plain, q_turning = jnp.split(q, [self.plain], axis=-1)
        q_turning = where.turned(q_turning, c.width)
        held = project("latent_down", x, self.rank + self.turning)
        narrow, shared = jnp.split(held, [self.rank], axis=-1)
        narrow = block.norm("latent_norm", narrow, EPS)
        # [B, 1, T, ..]: one key head.
        narrow, shared = narrow[:, None], where.turned(shared[:, None], c.width)
        up = block.weight(
            "latent_up",
            (self.rank, heads * (self.plain + self.value_size)),
            (None, "heads"),
            nn.initializers.normal(self.rank**-0.5),
        )
        state = (jnp.concatenate([narrow, shared], axis=-1),)
        cached = where.cached
        if cached is not None:
            state = (cached.write(cached.state[0], state[0]),)
        options = where.options()
        if cached is None or cached.fills:
            # Of [B, T, rank] keys and values for every head.
            kv = linear(narrow[:, 0], up)
            kv = jnp.swapaxes(kv.reshape(*kv.shape[:2], heads, -1), 1, 2)
            k, v = jnp.split(kv, [self.plain], axis=-1)
            k = jnp.concatenate([k, jnp.broadcast_to(shared, (*k.shape[:3], self.turning))], -1)
            y = attention(jnp.concatenate([q_plain, q_turning], -1), k, v, **options)
        else:
            # The matrix itself, of one with an adapter too.
            of_heads = linear(jnp.eye(self.rank, dtype=x.dtype), up).reshape(self.rank, heads, -1)
            of_keys, of_values = jnp.split(of_heads, [self.plain], axis=-1)
            q = jnp.concatenate([jnp.einsum("bnth,rnh->bntr", q_plain, of_keys), q_turning], -1)
            y = attention(q, state[0], state[0][..., : self.rank], **options)
            y = jnp.einsum("bntr,rnv->bntv", y, of_values)
        values = heads * self.value_size
        y = jnp.swapaxes(y, 1, 2).reshape(*x.shape[:2], values)
        w = block.weight(
            "o", (values, c.hidden_size), ("heads", "embed"), block.into_residual(values)
        )
        return linear(y, w, block.bias(self.bias, "o_bias", c.hidden_size, "embed")), state
