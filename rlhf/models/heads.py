"""Heads: numbers from hidden states."""

import jax
import jax.numpy as jnp

from rlhf.lm import Bound, Head


def scalar_head(hidden_size: int, *, scale: float = 0.0, dtype=jnp.float32) -> Head:
    """`h w + b`: one number per position, for values and rewards.

    Args:
      hidden_size: D.
      scale: standard deviation of the initial weights.  0 for values (they start at 0); `(D + 1) ** -0.5` for rewards
        (arXiv:1909.08593, as "The N implementation details of RLHF with PPO" describes it).
      dtype: of the parameters.

    Returns: a `Head` whose `apply(params, hidden [..., D])` gives `[...]` in at least float32.

    >>> head = scalar_head(4)
    >>> head.apply(head.init(jax.random.key(0)), jnp.ones((2, 3, 4))).shape
    (2, 3)
    """
    return Head(
        init=Bound(_init, (hidden_size, scale, jnp.dtype(dtype))),
        axes=_axes,
        apply=_apply,
    )


def _init(hidden_size, scale, dtype, key):
    return {"weight": scale * jax.random.normal(key, (hidden_size,), dtype), "bias": jnp.zeros((), dtype)}


def _axes():
    return {"weight": ("embed",), "bias": None}


def _apply(params, hidden):
    hidden = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    return hidden @ params["weight"].astype(hidden.dtype) + params["bias"].astype(hidden.dtype)
