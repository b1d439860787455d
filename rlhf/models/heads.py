"""Heads: numbers from hidden states."""

import jax
import jax.numpy as jnp

from rlhf.bound import Bound
from rlhf.lm import Head
from rlhf.models.config import ACTIVATIONS
from rlhf.models.linear import linear


def scalar_head(hidden_size: int, *, scale: float = 0.0, dtype=jnp.float32) -> Head:
    """`h w + b`: one number per position, for values and rewards.

    Args:
      hidden_size: D.
      scale: standard deviation of the initial weights.  0 for values (they start at 0);
        `(D + 1) ** -0.5` for rewards (arXiv:1909.08593, as "The N implementation details of RLHF
        with PPO" describes it).
      dtype: of the parameters.

    Returns: a `Head` whose `apply(params, hidden [..., D])` gives `[...]` in at least float32.

    >>> head = scalar_head(4)
    >>> head.apply(head.init(jax.random.key(0)), jnp.ones((2, 3, 4))).shape
    (2, 3)
    """
    # `Bound` rather than a closure: heads with equal arguments are equal, so that jit finds the
    # program that it compiled for the first.
    return Head(
        init=Bound(_init_scalar, (hidden_size, scale, jnp.dtype(dtype))),
        axes=_axes_scalar,
        apply=_apply_scalar,
    )


def _init_scalar(hidden_size, scale, dtype, key):
    return {
        "weight": scale * jax.random.normal(key, (hidden_size,), dtype),
        "bias": jnp.zeros((), dtype),
    }


def _axes_scalar():
    return {"weight": ("embed",), "bias": None}


def _apply_scalar(params, hidden):
    hidden = _widen(hidden)
    return hidden @ params["weight"].astype(hidden.dtype) + params["bias"].astype(hidden.dtype)


def classifier_head(
    hidden_size: int,
    labels: int,
    *,
    bias: bool = False,
    inner: str | None = None,
    inner_size: int | None = None,
    reads: str = "last",
    scale: float = 0.02,
    dtype=jnp.float32,
) -> Head:
    """`f(h W_i + b_i) W + b`, as the classifiers of Hugging Face have it; without `inner`,
    `h W + b`.

    Args:
      hidden_size: D.
      labels: K.
      bias: whether there is a b; sequence classifiers on decoders have none, token classifiers do.
      inner: the activation f of a layer `[D, I]` before the labels (encoders); a name of
        `ACTIVATIONS`.
      inner_size: I; None: D.
      reads: the token by which `rollouts.classify` scores a text: "last", "first" or "every".
      scale: standard deviation of the initial weights.
      dtype: of the parameters.

    Returns: a `Head` whose `apply(params, hidden [..., D])` gives `[..., K]` in at least float32;
    if K is 1 `[...]`, a reward.

    >>> head = classifier_head(4, 3, inner="tanh", bias=True)
    >>> head.apply(head.init(jax.random.key(0)), jnp.ones((2, 5, 4))).shape
    (2, 5, 3)
    """
    inner_size = (inner_size or hidden_size) if inner else None
    init = Bound(_init_labels, (hidden_size, inner_size, labels, bias, scale, jnp.dtype(dtype)))
    return Head(
        init, Bound(_axes_labels, (bias, inner)), Bound(_apply_labels, (labels, bias, inner)), reads
    )


def q_head(hidden_size: int, actions: int, *, dtype=jnp.float32) -> Head:
    """`relu(h W_i + b_i) W + b`, the inner layer `[D, 2 D]`: Q of every token, or V  (ILQL,
    arXiv:2206.11871, as in trlX).

    Args:
      hidden_size: D.
      actions: the vocabulary for Q; 1 for V.
      dtype: of the parameters.

    Returns: a `Head` whose `apply(params, hidden [..., D])` gives `[..., actions]`, or `[...]` for
    V, in at least float32.

    >>> head = q_head(4, 96)
    >>> head.apply(head.init(jax.random.key(0)), jnp.ones((2, 5, 4))).shape
    (2, 5, 96)
    """
    size = 2 * hidden_size
    return classifier_head(
        hidden_size, actions, bias=True, inner="relu", inner_size=size, reads="every", dtype=dtype
    )


def _init_labels(hidden_size, inner_size, labels, bias, scale, dtype, key):
    # Both keys are split off always, so that `weight` is the same with and without an inner layer.
    weights, more = jax.random.split(key)
    out = {"weight": scale * jax.random.normal(weights, (inner_size or hidden_size, labels), dtype)}
    if bias:
        out["bias"] = jnp.zeros(labels, dtype)
    if inner_size:
        out["inner"] = scale * jax.random.normal(more, (hidden_size, inner_size), dtype)
        out["inner_bias"] = jnp.zeros(inner_size, dtype)
    return out


def _axes_labels(bias, inner):
    of_inner = {"inner": ("embed", None), "inner_bias": None} if inner else {}
    return {"weight": ("embed", None), **({"bias": None} if bias else {}), **of_inner}


def _apply_labels(labels, bias, inner, params, hidden):
    hidden = _widen(hidden)
    if inner:
        hidden = ACTIVATIONS[inner](linear(hidden, params["inner"], params["inner_bias"]))
    out = linear(hidden, params["weight"], params["bias"] if bias else None)
    # With a single label the head is a reward model's, whose callers expect no axis of labels.
    return out[..., 0] if labels == 1 else out


def _widen(hidden):
    # Rewards and values are small differences of large sums.
    return hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
