"""The gated delta rule and short convolutions against their definitions, one token at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf.models.convolution import short_convolution
from rlhf.models.delta import Memory, _inverse, delta_rule

BATCH, HEADS, LENGTH, K, V = 2, 3, 11, 4, 5
# Padding at the start, between the tokens of a segment and between segments.
IDS = np.array([[0, 0, 1, 1, 1, 0, 1, 2, 2, 0, 3], [1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2]], np.int32)


def arrays(channels, strength=1.0, seed=0):
    rng = np.random.default_rng(seed)
    shape = BATCH, HEADS, LENGTH
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    return dict(
        q=unit(rng.normal(size=(*shape, K))),
        k=unit(rng.normal(size=(*shape, K))),
        v=rng.normal(size=(*shape, V)),
        decay=-strength * rng.random((*shape, channels)),
        beta=rng.random(shape),
    )


def by_definition(q, k, v, decay, beta, ids, before=None):
    out = np.zeros((BATCH, HEADS, LENGTH, V))
    states, last = before or (np.zeros((BATCH, HEADS, K, V)), np.zeros(BATCH, int))
    states, last = states.copy(), last.copy()
    for b, t in np.ndindex(BATCH, LENGTH):
        if not ids[b, t]:
            continue
        for h in range(HEADS):
            s = states[b, h] if ids[b, t] == last[b] else np.zeros((K, V))
            s = s * np.exp(decay[b, h, t])[:, None]
            change = beta[b, h, t] * (v[b, h, t] - s.T @ k[b, h, t])
            states[b, h] = s + np.outer(k[b, h, t], change)
            out[b, h, t] = states[b, h].T @ q[b, h, t]
        last[b] = ids[b, t]
    return out, states, last


def narrow(values):
    return {name: jnp.asarray(x, jnp.float32) for name, x in values.items()}


def assert_same(found, expected, atol=3e-6):
    (o, memory), (out, states, last) = found, expected
    real = np.broadcast_to(IDS[:, None, :, None] != 0, out.shape)
    np.testing.assert_allclose(np.asarray(o)[real], out[real], rtol=0, atol=atol)
    np.testing.assert_allclose(memory.state, states, rtol=0, atol=atol)
    np.testing.assert_array_equal(memory.segment_ids, last)


@pytest.mark.parametrize("channels", [1, K])
@pytest.mark.parametrize("strength", [1.0, 60.0])  # a float32 holds no e^100
def test_chunks_are_the_rule_token_by_token(channels, strength):
    values = arrays(channels, strength)
    rng = np.random.default_rng(1)
    before = rng.normal(size=(BATCH, HEADS, K, V)), np.array([1, 1])
    expected = by_definition(**values, ids=IDS, before=before)
    memory = Memory(jnp.asarray(before[0], jnp.float32), jnp.asarray(before[1], jnp.int32))
    run = jax.jit(delta_rule, static_argnames="chunk")
    for chunk in (4, 64):
        assert_same(run(**narrow(values), segment_ids=IDS, before=memory, chunk=chunk), expected)
    out = []
    for t in range(LENGTH):
        one = {name: x[:, :, t : t + 1] for name, x in narrow(values).items()}
        o, memory = run(**one, segment_ids=IDS[:, t : t + 1], before=memory, chunk=64)
        out.append(o)
    assert_same((np.concatenate(out, axis=2), memory), expected)


@pytest.mark.parametrize("channels", [1, K])
def test_gradients_of_chunks_are_those_of_tokens(channels):
    values = narrow(arrays(channels, strength=30.0))
    toward = np.random.default_rng(2).normal(size=(BATCH, HEADS, LENGTH, V)).astype(np.float32)
    real = (IDS != 0)[:, None, :, None]

    def loss(values, run):
        return jnp.sum(jnp.where(real, toward * run(values), 0))

    def by_tokens(values):
        memory, out = None, []
        for t in range(LENGTH):
            one = {name: x[:, :, t : t + 1] for name, x in values.items()}
            o, memory = delta_rule(**one, segment_ids=IDS[:, t : t + 1], before=memory)
            out.append(o)
        return jnp.concatenate(out, axis=2)

    by_chunks = lambda values: delta_rule(**values, segment_ids=IDS, chunk=4)[0]
    ours, wanted = (
        jax.jit(jax.grad(lambda x, run=run: loss(x, run)))(values) for run in (by_chunks, by_tokens)
    )
    for name, x in wanted.items():
        assert np.isfinite(ours[name]).all(), name
        np.testing.assert_allclose(ours[name], x, rtol=0, atol=2e-5 * np.abs(x).max(), err_msg=name)
        assert np.abs(x).max() > 0


@pytest.mark.parametrize("channels", [1, K])
def test_a_long_row_takes_a_step_a_chunk_and_no_square_array(channels):
    length, chunk = 512, 64
    shapes = {
        name: jax.ShapeDtypeStruct((*x.shape[:2], length, *x.shape[3:]), jnp.float32)
        for name, x in arrays(channels).items()
    }
    ids = jax.ShapeDtypeStruct((BATCH, length), jnp.int32)

    def loss(values, ids):
        return delta_rule(**values, segment_ids=ids, chunk=chunk)[0].sum()

    text = str(jax.make_jaxpr(jax.grad(loss))(shapes, ids))
    assert f"length={length // chunk}\n" in text
    assert f"{length},{length}]" not in text
    assert f"{chunk},{chunk}]" in text
    # XLA on a CPU hung in it, at 8 heads of 128 and 128 tokens.
    assert "triangular_solve" not in text


@pytest.mark.parametrize("size", [1, 2, 5, 16, 64])
def test_a_chunk_s_inverse_is_numpy_s(size):
    rng = np.random.default_rng(4)
    below = np.tril(rng.normal(size=(2, 3, size, size)), -1) * 0.3
    expected = np.linalg.inv(np.eye(size) + below)
    found = _inverse(jnp.asarray(below, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # Keys that are all alike: powers of such a matrix have entries of 1e17.
    alike = np.tril(np.ones((1, 1, size, size), np.float32), -1)
    np.testing.assert_array_equal(_inverse(jnp.asarray(alike)), np.linalg.inv(np.eye(size) + alike))


def test_a_convolution_reads_its_own_segment_alone():
    """In one piece, in pieces that go on with each other, and with padding between the tokens."""
    rng = np.random.default_rng(3)
    taps, channels = 4, 3
    x = rng.normal(size=(BATCH, LENGTH, channels)).astype(np.float32)
    weight = rng.normal(size=(taps, channels)).astype(np.float32)
    for ids in (
        IDS,
        np.where(np.arange(LENGTH) < 2, 0, 1 + (np.arange(LENGTH) > 6))[None] * [[1], [1]],
    ):
        ids = ids.astype(np.int32)
        expected = np.zeros_like(x)
        for b, t in np.ndindex(BATCH, LENGTH):
            before = [s for s in range(t + 1) if ids[b, s]][-taps:]
            for place, s in enumerate(reversed(before)):
                if ids[b, s] == ids[b, t]:
                    expected[b, t] += weight[taps - 1 - place] * x[b, s]
        real = ids != 0
        whole, _ = short_convolution(x, weight, ids)
        np.testing.assert_allclose(np.asarray(whole)[real], expected[real], rtol=0, atol=1e-6)
        state, parts = None, []
        for start, end in ((0, 4), (4, 5), (5, 9), (9, LENGTH)):
            y, state = short_convolution(x[:, start:end], weight, ids[:, start:end], state)
            parts.append(y)
        parts = np.concatenate(parts, axis=1)
        np.testing.assert_allclose(parts[real], expected[real], rtol=0, atol=1e-6)
