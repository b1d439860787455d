"""Experts against their definition, one token at a time; and what the router says of itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import exhaustive

from rlhf import adapters, losses
from rlhf.models.config import Experts
from rlhf.models.experts import Router, Routing, Weights, experts
from rlhf.sharding import make_mesh

RNG = np.random.default_rng(0)
BATCH, LENGTH, SIZE, NUMBER, INNER = 2, 5, 3, 4, 6
X = RNG.normal(size=(BATCH, LENGTH, SIZE)).astype(np.float32)
ROUTER = RNG.normal(size=(SIZE, NUMBER)).astype(np.float32)
GATE, UP = (RNG.normal(size=(NUMBER, SIZE, INNER)).astype(np.float32) for _ in range(2))
DOWN = RNG.normal(size=(NUMBER, INNER, SIZE)).astype(np.float32)
REAL = np.arange(LENGTH)[None] < np.array([[LENGTH], [3]])


def two_of_them(x, router, gate, up, down, real):
    config = Experts(NUMBER, 2, INNER)
    return experts(x, Router(router), Weights(gate, up, down), real, config, jax.nn.silu)


def by_definition(x, router, gate, up, down, per_token, renormalise):
    out, probs = np.zeros_like(x, np.float64), np.zeros((*x.shape[:2], NUMBER))
    picked = np.zeros_like(probs)
    for b, t in np.ndindex(x.shape[:2]):
        scores = np.exp(x[b, t] @ router)
        p = probs[b, t] = scores / scores.sum()
        chosen = np.argsort(-p)[:per_token]
        picked[b, t, chosen] = 1
        for e in chosen:
            h = x[b, t] @ gate[e]
            y = (h / (1 + np.exp(-h)) * (x[b, t] @ up[e])) @ down[e]
            out[b, t] += p[e] / (p[chosen].sum() if renormalise else 1.0) * y
    return out, probs, picked


@pytest.mark.parametrize(("per_token", "renormalise"), [(2, True), (1, False), (4, True)])
def test_experts_are_their_definition(per_token, renormalise):
    config = Experts(NUMBER, per_token, INNER, renormalise=renormalise)
    y, routed = jax.jit(
        lambda x: experts(x, Router(ROUTER), Weights(GATE, UP, DOWN), REAL, config, jax.nn.silu)
    )(X)
    out, probs, picked = by_definition(X, ROUTER, GATE, UP, DOWN, per_token, renormalise)
    np.testing.assert_allclose(y, out, rtol=0, atol=2e-5)
    counted = REAL[:, :, None]
    chosen = np.eye(NUMBER)[routed.chosen].sum(-2)
    np.testing.assert_array_equal(chosen, picked)
    expected = Routing((probs * counted).sum(1), (picked * counted).sum(1), REAL.sum(1))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), routed.routing, expected
    )


def test_gradients_are_those_of_all_experts_side_by_side():
    """Through x, the experts and the router's weights: against every expert run on every token."""

    def dense(x, router, gate, up, down):
        p = jax.nn.softmax(x @ router, axis=-1)
        kept = p >= jnp.sort(p, axis=-1)[..., -2:-1]
        p = jnp.where(kept, p, 0.0)
        h = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
        return jnp.einsum("bte,btef,efd->btd", p / p.sum(-1, keepdims=True), h, down)

    sparse = lambda *args: two_of_them(*args, REAL)[0]
    weights = (X, ROUTER, GATE, UP, DOWN)
    ours, theirs = (
        jax.jit(jax.grad(lambda w, f=f: jnp.sum(jnp.sin(f(*w)))))(weights) for f in (sparse, dense)
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
        assert np.abs(b).max() > 0


def test_the_balance_is_that_of_transformers():
    """`load_balancing_loss_func`: every layer's rows side by side, shares of choices times mean probabilities."""
    logits = RNG.normal(size=(3, BATCH, LENGTH, NUMBER))  # three layers
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    picked = np.argsort(-probs, axis=-1)[..., :2]
    share, mean, rows = np.zeros(NUMBER), np.zeros(NUMBER), 0
    for layer, b, t in np.ndindex(logits.shape[:3]):
        if REAL[b, t]:
            share[picked[layer, b, t]] += 1
            mean += probs[layer, b, t]
            rows += 1
    expected = NUMBER * np.sum(share / rows * mean / rows)
    choices = np.eye(NUMBER)[picked].sum(-2) * REAL[None, :, :, None]
    routing = (probs * REAL[None, :, :, None]).sum((0, 2)), choices.sum((0, 2)), 3 * REAL.sum(1)
    np.testing.assert_allclose(losses.routing.balance(*routing).sum(), expected, rtol=1e-5)


@pytest.mark.parametrize(
    "shape",
    exhaustive(
        [dict(expert=4, data=2), dict(expert=2, sequence=2, tensor=2)],
        quick=[dict(expert=4, data=2)],
    ),
)
def test_experts_on_several_devices_are_those_of_one(shape):
    """Values, statistics and all five gradients; tokens go to the experts' devices and back, none is dropped."""
    rng = np.random.default_rng(1)
    x, toward = (rng.normal(size=(8, 6, SIZE)).astype(np.float32) for _ in range(2))
    real = np.arange(6)[None] < rng.integers(3, 7, (8, 1))

    def graded(weights):
        y, vjp, routing = jax.vjp(
            lambda *weights: two_of_them(*weights, real), *weights, has_aux=True
        )
        return y, routing, vjp(toward)

    weights = (x, ROUTER, GATE, UP, DOWN)
    with jax.enable_x64(True):
        weights, toward = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), (weights, toward))
        wanted = jax.jit(graded)(weights)
        with jax.set_mesh(make_mesh(**shape)):
            found = jax.jit(graded)(weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())
        assert np.abs(b).max() > 0


# --- adapters on experts -----------------------------------------------------------------------------------------------


def adapted(rng, dora=False):
    """Experts' matrices with adapters that change something, each expert's another."""

    def one(base):
        number, inputs, outputs = base.shape
        a, b = rng.normal(size=(number, inputs, 2)), rng.normal(size=(number, 2, outputs))
        magnitude = rng.random((number, outputs)) + 0.5 if dora else None
        parts = (a, b, rng.random(number) + 0.5, magnitude)
        return adapters.LoRAWeight(base, *jax.tree.map(lambda x: jnp.asarray(x, base.dtype), parts))

    return Weights(*map(one, map(jnp.asarray, (GATE, UP, DOWN))))


@pytest.mark.parametrize("dora", [False, True])
def test_adapters_on_experts_are_the_merged_matrices(dora):
    config = Experts(NUMBER, 2, INNER)
    weights = adapted(np.random.default_rng(2), dora)
    merged = Weights(*(w if w is None else w.merged() for w in weights))
    assert np.abs(merged.gate - GATE).max() > 0.1
    x = jnp.asarray(X)
    run = jax.jit(lambda w: experts(x, Router(ROUTER), w, REAL, config, jax.nn.silu)[0])
    np.testing.assert_allclose(run(weights), run(merged), rtol=2e-5, atol=2e-5)


def test_gradients_of_adapters_on_experts_over_devices():
    config = Experts(NUMBER, 2, INNER)
    rng = np.random.default_rng(3)
    x, toward = (rng.normal(size=(8, 6, SIZE)) for _ in range(2))
    real = np.ones((8, 6), bool)

    def graded(weights):
        def loss(weights):
            y, _ = experts(x, Router(ROUTER), weights, real, config, jax.nn.silu)
            return jnp.sum(toward * y)

        return jax.grad(loss)(weights)

    with jax.enable_x64(True):
        x, toward = jnp.asarray(x), jnp.asarray(toward)
        weights = jax.tree.map(lambda w: jnp.asarray(w, jnp.float64), adapted(rng))
        wanted = jax.jit(graded)(weights)
        for shape in (dict(expert=4, data=2), dict(expert=2, tensor=2, data=2)):
            with jax.set_mesh(make_mesh(**shape)):
                found = jax.jit(graded)(weights)
            for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.abs(b).max())


def test_norms_over_inputs_that_a_mesh_splits_are_refused():
    config = Experts(NUMBER, 2, INNER)
    weights = adapted(np.random.default_rng(2), dora=True)
    x, real = jnp.ones((8, 6, SIZE)), np.ones((8, 6), bool)
    run = jax.jit(lambda w: experts(x, Router(ROUTER), w, real, config, jax.nn.silu)[0])
    message = "DoRA on experts whose inputs the mesh splits over"
    with (
        jax.set_mesh(make_mesh(expert=2, tensor=2, data=2)),
        pytest.raises(ValueError, match=message),
    ):
        run(weights)
