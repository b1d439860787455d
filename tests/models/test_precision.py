"""A computation in bfloat16 rounds activations alone: what decides, or adds up, does so in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.models import LayerKind, Rope, TransformerConfig, transformer
from rlhf.models.attention import attention
from rlhf.models.config import Experts
from rlhf.models.experts import Router, Weights, experts
from rlhf.models.linear import in_float32, linear
from rlhf.models.rotary import rotate, rotations
from rlhf.rollouts import samplers

LOW = jnp.bfloat16
rng = np.random.default_rng(0)
low = lambda *shape: jnp.asarray(rng.normal(size=shape), LOW)
wide = lambda *arrays: [x.astype(jnp.float32) for x in arrays]
ULP = 2.0**-8  # of a bfloat16 near 1


def test_routers_choose_as_in_float32():
    """The same experts for the same activations, though hundreds of logits lie closer than bfloat16 tells apart."""
    x, router = low(4, 256, 32), low(32, 64)
    ones = jnp.ones((4, 256), bool)
    gate, up, down = low(64, 32, 4), low(64, 32, 4), low(64, 4, 32)
    config = Experts(64, 4, 4)
    route = jax.jit(
        lambda x, router, *w: (
            experts(x, Router(router), Weights(*w), ones, config, jax.nn.silu)[1].routing
        )
    )
    ours, exact = route(x, router, gate, up, down), route(*wide(x, router, gate, up, down))
    np.testing.assert_array_equal(ours.choices, exact.choices)
    np.testing.assert_allclose(ours.probs, exact.probs, rtol=1e-5)
    master = jnp.asarray(
        rng.normal(size=(32, 64)), jnp.float32
    )  # masters in float32 are not rounded first
    np.testing.assert_array_equal(
        route(x, master, gate, up, down).choices, route(*wide(x, master, gate, up, down)).choices
    )


def test_scores_of_attention_and_their_softmax():
    """Scores of some hundreds, whose differences bfloat16 loses."""
    q, k, v = low(1, 2, 4, 16) * 30, low(1, 2, 64, 16), low(1, 2, 64, 16)
    where = dict(
        positions=jnp.full((1, 4), 99), segment_ids=jnp.ones((1, 4), int), kv_positions=jnp.arange(64)[None],
        kv_segment_ids=jnp.ones((1, 64), int), scale=1.0, kernel="xla",
    )  # fmt: skip
    for scored in (
        lambda q, k, v: attention(q, k, v, **where),
        lambda *x: attention(x[0][:, :, :1], *x[1:], **one(where)),
    ):
        np.testing.assert_allclose(
            scored(q, k, v).astype(jnp.float32), scored(*wide(q, k, v)), atol=4 * ULP
        )


def one(where):
    return {
        **where,
        "positions": where["positions"][:, :1],
        "segment_ids": where["segment_ids"][:, :1],
    }


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_not_rounded(tied):
    config = TransformerConfig(
        vocab_size=64,
        hidden_size=32,
        num_layers=1,
        num_heads=1,
        mlp_size=8,
        dtype=LOW,
        param_dtype=LOW,
        tied=tied,
    )
    lm, hidden = transformer(config), low(2, 3, 32) * 8
    params = {"embedding": low(64, 32), "unembedding": low(32, 64)}
    got = lm.unembed(params, hidden)
    w = params["embedding"].T if tied else params["unembedding"]
    np.testing.assert_allclose(
        got, jnp.matmul(*wide(hidden, w), precision="highest"), rtol=1e-5, atol=1e-4
    )
    gradient = jax.grad(lambda p, h: lm.unembed(p, h).sum(), argnums=(0, 1))(params, hidden)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(LOW)}


@pytest.mark.parametrize("shape", ["2d", "batched"])
def test_gradients_of_products_in_float32_are_those_of_plain_ones(shape):
    a, b = (low(6, 8), low(8, 5)) if shape == "2d" else (low(2, 6, 8), low(2, 8, 5))
    of = lambda product: jax.grad(
        lambda a, b: jnp.sin(product(a, b).astype(jnp.float32)).sum(), argnums=(0, 1)
    )
    exact = of(jnp.matmul)(*wide(a, b))
    got = of(lambda a, b: in_float32(jnp.matmul, a, b))(a, b)
    for x, y in zip(got, exact, strict=True):
        assert x.dtype == LOW
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=0.05 * float(jnp.abs(y).max()))


@pytest.mark.parametrize("of_logits", [False, True])
def test_gradients_of_masters_are_not_rounded(of_logits):
    """`xᵀ g` in float32, of activations in half precision."""
    x, master = low(16, 8), low(8, 5).astype(jnp.float32) + 2**-12
    weigh = low(16, 5).astype(jnp.float32)

    def loss(master):
        return (linear(x, master, wide=of_logits).astype(jnp.float32) * weigh).sum()

    got = jax.grad(loss)(master)
    exact = jnp.matmul(x.astype(jnp.float32).T, weigh, precision="highest")
    np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5)
    assert (got != got.astype(LOW).astype(jnp.float32)).any()


def test_far_positions_turn_by_their_own_angles():
    """bfloat16 has no 257; float32 has every position."""
    at = jnp.array([[0, 257, 4097, 131_071]])
    angles = rotations([(Rope(), 16)], at, jnp.ones_like(at), None, None)[Rope(), 16].queries
    exact = np.asarray(at)[0, :, None] * 10_000.0 ** (-np.arange(8) / 8)
    np.testing.assert_allclose(angles[0][0, 0], np.cos(exact), atol=0.02)
    x = low(1, 1, 4, 16)
    np.testing.assert_allclose(
        rotate(x, angles).astype(jnp.float32), rotate(*wide(x), angles), atol=4 * ULP
    )


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_norms_add_up_in_float32(norm):
    config = TransformerConfig(
        vocab_size=8,
        hidden_size=512,
        num_layers=1,
        num_heads=1,
        mlp_size=8,
        norm=norm,
        dtype=LOW,
        kinds=(LayerKind(),),
    )
    from rlhf.models.block import Block

    x, scale, bias = low(1, 2, 512) + 16, jnp.ones(512), jnp.zeros(512) if norm == "layer" else None
    normalise = lambda x: Block(config, parent=None).apply({}, x, scale, bias, method="normalise")
    np.testing.assert_allclose(
        normalise(x).astype(jnp.float32), normalise(*wide(x)), atol=2 * ULP, rtol=ULP
    )


def test_chances_and_thresholds_of_sampling_are_float32():
    """A thousand tokens, whose probabilities bfloat16 could not add up; logits come in float32 from every model."""
    logits = jnp.asarray(rng.normal(size=(64, 1000)), jnp.float32)
    chances = jax.random.uniform(jax.random.key(0), (64,))
    assert chances.dtype == jnp.float32
    drawn = samplers.draw(chances, logits)
    p = np.exp(np.asarray(logits, np.float64))
    exact = (np.cumsum(p / p.sum(1, keepdims=True), 1) <= np.asarray(chances)[:, None]).sum(1)
    np.testing.assert_array_equal(drawn, exact)
