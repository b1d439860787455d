"""What a block does with each token by itself: an MLP, or experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from rlhf.models.config import ACTIVATIONS
from rlhf.models.experts import Routed, Router, experts
from rlhf.models.experts import Weights as ExpertWeights
from rlhf.models.linear import linear
from rlhf.models.weights import Weights

Array = jax.Array


def mlp(block: Weights, x: Array, size: int, prefix: str = "") -> Array:
    """`down(act(gate x) · up x)`, of leaves whose names start with `prefix`."""
    c = block.config
    init = nn.initializers.normal(c.hidden_size**-0.5)

    def project(name):
        name = prefix + name
        w = block.weight(name, (c.hidden_size, size), ("embed", "mlp"), init)
        return linear(x, w, block.bias(c.mlp_bias, f"{name}_bias", size, "mlp"))

    if c.gated:
        h = ACTIVATIONS[c.activation](project("gate")) * project("up")
    elif c.activation == "xielu":
        h = _xielu(block, project("up"))
    else:
        h = ACTIVATIONS[c.activation](project("up"))
    h = checkpoint_name(h, "mlp")
    down = f"{prefix}down"
    w = block.weight(down, (size, c.hidden_size), ("mlp", "embed"), block.into_residual(size))
    return linear(h, w, block.bias(c.mlp_bias, f"{down}_bias", c.hidden_size, "embed"))


def _xielu(block: Weights, x: Array) -> Array:
    """`a x² + b x` above 0, below it `(e^min(x, ε) - 1 - x) (b + c) + b x`, a and c the softplus
    of what is learned  (arXiv:2411.13010).
    """
    fixed = {"xielu_beta": 0.5, "xielu_eps": -1e-6}  # in the files, not trained
    # The logarithms of e^0.8 - 1 and e^0.3 - 1.
    learned = {"xielu_positive": 0.203, "xielu_negative": -1.05}
    wide = jnp.promote_types(x.dtype, jnp.float32)

    def number(name, value, shape=(), axes=()):
        return (
            block.weight(name, shape, axes, nn.initializers.constant(value))
            .astype(wide)
            .reshape(())
        )

    beta, eps = (jax.lax.stop_gradient(number(*one)) for one in fixed.items())
    positive, negative = (jax.nn.softplus(number(*one, (1,), (None,))) for one in learned.items())
    negative = beta + negative
    y = x.astype(wide)
    below = (jnp.expm1(jnp.minimum(y, eps)) - y) * negative + beta * y
    return jnp.where(y > 0, positive * y * y + beta * y, below).astype(x.dtype)


def sparse(
    block: Weights,
    x: Array,
    real: Array,
    cached: bool,
    chosen: Array | None = None,
    router_input: Array | None = None,
) -> tuple[Array, Routed]:
    """Experts, and what every token goes through beside them.

    Args:
      block: whose parameters they are.
      x: `[B, T, D]`.
      real: `[B, T]` bool, which tokens count in the statistics of the router.
      cached: as in `experts`.
      chosen: `[B, T, k]`, experts in place of the router's choice.
      router_input: what the router reads in place of x.
    """
    c = block.config
    e = c.experts
    axes = ("expert", "embed", "mlp")
    init = nn.initializers.normal(c.hidden_size**-0.5)
    # Not split over experts: every device routes its own tokens.
    router = Router(
        block.weight("router", (c.hidden_size, e.number), ("embed", None), init),
        bias=block.bias(e.bias, "router_bias", e.number, None),
        # In float32 whatever the parameters' dtype: rounded it would choose other experts.
        correction=block.weight(
            "router_correction", (e.number,), (None,), nn.initializers.zeros, jnp.float32
        )
        if e.correction
        else None,
        scale=block.weight("router_scale", (e.number,), (None,), nn.initializers.ones)
        if e.beside
        else None,
    )
    gate = block.weight("expert_gate", (e.number, c.hidden_size, e.size), axes, init)
    up = block.weight("expert_up", (e.number, c.hidden_size, e.size), axes, init)
    down = block.weight(
        "expert_down",
        (e.number, e.size, c.hidden_size),
        ("expert", "mlp", "embed"),
        block.into_residual(e.size),
    )
    biases = (
        block.weight(
            f"expert_{name}_bias", (e.number, size), (axes[0], axis), nn.initializers.zeros
        )
        if e.bias
        else None
        for name, size, axis in (
            ("gate", e.size, "mlp"),
            ("up", e.size, "mlp"),
            ("down", c.hidden_size, "embed"),
        )
    )
    y, routed = experts(
        x,
        router,
        ExpertWeights(gate, up, down, *biases),
        real,
        e,
        ACTIVATIONS[c.activation],
        cached=cached,
        router_input=router_input,
        chosen=chosen,
    )
    if e.shared_size:
        shared = mlp(block, x, e.shared_size, "shared_")
        if e.shared_gate:
            w = block.weight("shared_router", (c.hidden_size, 1), ("embed", None), init)
            shared = shared * jax.nn.sigmoid(linear(x, w))
        y = y + shared
    return y, routed
