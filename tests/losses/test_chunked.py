"""`chunked` gives the value and gradient of whole logits, without them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf import losses

B, T, D, V = 3, 10, 5, 37  # no two products of these are alike
RNG = np.random.default_rng(0)
HIDDEN, WEIGHT, BIAS = RNG.normal(size=(B, T, D)), RNG.normal(size=(D, V)), RNG.normal(size=V)
TOKENS = RNG.integers(V, size=(B, T))
COTANGENTS = RNG.normal(size=(2, B, T))


def statistics(logits, tokens):
    return {
        "logprob": losses.logits.token_logprob(logits, tokens),
        "entropy": losses.logits.entropy(logits),
    }


def unembed(params, hidden):
    """Soft cap, bias and temperature, in the order that models have them."""
    logits = 4.0 * jnp.tanh(
        (hidden @ params["weight"] + params["bias"][(None,) * (hidden.ndim - 1)]) / 4.0
    )
    return logits / params["temperature"]


def objective(params, hidden, tokens, *, chunk_size):
    head = functools.partial(unembed, params)
    if chunk_size is None:
        out = statistics(head(hidden), tokens)
    else:
        out = losses.chunked(statistics, hidden, head, tokens, chunk_size=chunk_size)
    return jnp.sum(COTANGENTS[0] * out["logprob"] + COTANGENTS[1] * out["entropy"]), out


def differentiated(chunk_size, **options):
    loss = functools.partial(objective, chunk_size=chunk_size)
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), compiler_options=options)


@functools.cache
def results(chunk_size):
    with jax.enable_x64(True):
        params = {"weight": WEIGHT, "bias": BIAS, "temperature": 0.7}
        run = differentiated(chunk_size, xla_backend_optimization_level=0)  # compiles sooner
        return jax.tree.map(np.asarray, run(params, HIDDEN, TOKENS))


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 10, 128])
def test_equals_whole_logits(chunk_size):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max())
    jax.tree.map(close, results(chunk_size), results(None))


def largest_array(chunk_size):
    """Elements of the largest array anywhere in the compiled value and gradient."""
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    params = {"weight": shape((D, V)), "bias": shape((V,)), "temperature": shape(())}
    arrays = params, shape((B, T, D)), jax.ShapeDtypeStruct((B, T), jnp.int32)
    text = differentiated(chunk_size).lower(*arrays).compile().as_text()
    return max(
        np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w+\[([\d,]+)\]", text)
    )


def test_the_logits_of_all_positions_are_never_an_array():
    assert largest_array(None) == B * T * V
    assert largest_array(4) == B * 4 * V


@pytest.mark.parametrize("chunk_size", [4, 128])
def test_no_logits_are_kept_for_the_way_back(chunk_size):
    hidden, weight = HIDDEN.astype(np.float32), WEIGHT.astype(np.float32)

    def backward(hidden, weight):
        fn = lambda h, w: losses.chunked(
            statistics, h, lambda h: h @ w, TOKENS, chunk_size=chunk_size
        )
        return jax.vjp(fn, hidden, weight)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, hidden, weight))
    assert max(x.size for x in kept) < min(chunk_size, T) * B * V


def test_per_token_arrays_and_results_of_any_rank():
    extra = RNG.normal(size=(B, T, 2)).astype(np.float32)
    fn = lambda logits, extra, tokens: (extra[..., None] * logits[..., None, :3], tokens)
    head = lambda hidden: hidden @ WEIGHT.astype(np.float32)
    hidden = HIDDEN.astype(np.float32)
    got, tokens = jax.jit(lambda *x: losses.chunked(fn, x[0], head, *x[1:], chunk_size=4))(
        hidden, extra, TOKENS
    )
    np.testing.assert_allclose(got, extra[..., None] * head(hidden)[..., None, :3], rtol=1e-5)
    np.testing.assert_array_equal(tokens, TOKENS)


@pytest.mark.parametrize(
    ("chunk_size", "computed", "asked"), [(4, slice(4, 8), 2), (10, slice(0, 0), 0)]
)
def test_chunks_without_a_needed_position_are_left_out(chunk_size, computed, asked):
    """They are 0 and without gradient; had they been computed, their NaN would be everywhere."""
    needed, left_out = np.zeros((B, T), bool), np.ones(T, bool)
    needed[1, 5 : 5 + asked], left_out[computed] = True, False
    hidden, weight = HIDDEN.astype(np.float32), WEIGHT.astype(np.float32)

    def loss(hidden, weight, needed):
        out = losses.chunked(
            statistics, hidden, lambda h: h @ weight, TOKENS, chunk_size=chunk_size, needed=needed
        )
        return sum(
            jnp.sum((x * c)[:, computed]) for x, c in zip(out.values(), COTANGENTS, strict=True)
        ), out

    differentiated = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    gradients, out = differentiated(np.where(left_out[:, None], np.nan, hidden), weight, needed)
    expected_gradients, expected = differentiated(hidden, weight, None)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=1e-5), gradients, expected_gradients
    )
    for name, x in out.items():
        np.testing.assert_allclose(
            x, np.where(left_out, 0.0, expected[name]), atol=1e-5, err_msg=name
        )


@pytest.mark.parametrize("chunk_size", [4, 128])
def test_refuses(chunk_size):
    # A copy: JAX remembers in which precision it has seen an array of NumPy.
    weight = WEIGHT.astype(np.float32)
    head = lambda hidden: hidden @ weight
    with pytest.raises(ValueError, match=r"per-token array \[3, 9\] but hidden \[3, 10, 5\]"):
        losses.chunked(statistics, HIDDEN, head, TOKENS[:, 1:], chunk_size=chunk_size)
    with pytest.raises(ValueError, match=r"per-token array \[3, 1\] but hidden \[3, 10, 5\]"):
        losses.chunked(
            statistics, HIDDEN, head, TOKENS, chunk_size=chunk_size, needed=TOKENS[:, :1] > 0
        )
    with pytest.raises(
        ValueError,
        match=rf"must return \[B, C, ...\] = \[3, {min(chunk_size, T)}\], but returned \[3\]",
    ):
        losses.chunked(lambda logits: logits.sum((1, 2)), HIDDEN, head, chunk_size=chunk_size)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        losses.chunked(statistics, HIDDEN, head, TOKENS, chunk_size=0)


def of_sum(logits, tokens):
    """A loss that is not linear in what it reads of the logits."""
    logprob, entropy = losses.logits.token_logprob_and_entropy(logits, tokens)
    return jnp.exp(logprob) - 0.1 * entropy**2, {"logprob": logprob, "tokens": tokens}


def summed(params, hidden, *, chunk_size, **options):
    head = functools.partial(unembed, params)
    if chunk_size is None:
        loss, aux = of_sum(head(hidden), TOKENS)
        return 3 * losses.weighted_sum(loss, COTANGENTS[0]) ** 2, aux
    loss, aux = losses.chunked_sum(
        of_sum, hidden, head, COTANGENTS[0], TOKENS, chunk_size=chunk_size, **options
    )
    return 3 * loss**2, aux


@functools.cache
def results_of_sum(chunk_size, **options):
    with jax.enable_x64(True):
        params = {"weight": WEIGHT, "bias": BIAS, "temperature": 0.7}
        loss = functools.partial(summed, chunk_size=chunk_size, **options)
        run = jax.jit(
            jax.value_and_grad(loss, argnums=(0, 1), has_aux=True),
            compiler_options={"xla_backend_optimization_level": 0},
        )
        return jax.tree.map(np.asarray, run(params, HIDDEN))


@pytest.mark.parametrize(
    "options", [dict(chunk_size=4), dict(chunk_size=128), dict(chunk_size=3, parts=2)]
)
def test_a_sum_equals_that_of_whole_logits(options):
    close = lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-12 * np.abs(y).max())
    jax.tree.map(close, results_of_sum(**options), results_of_sum(None))


def products(fn, *arrays):
    """Products of a chunk's logits with the matrix in a compiled program: XLA counts a loop once."""
    cost = jax.jit(fn).lower(*arrays).compile().cost_analysis()
    return round(cost["flops"] / (2 * B * 4 * D * V), 1)


@pytest.mark.parametrize("needed", [None, np.ones((B, T), bool)])
def test_a_sum_makes_its_logits_once_and_no_gradient_that_is_not_asked_for(needed):
    hidden, weight = HIDDEN.astype(np.float32), WEIGHT.astype(np.float32)

    by = np.ones((B, T), np.float32)

    def squared(logits, tokens):
        return (logits**2).sum(-1), None

    def loss(hidden, weight):
        head = lambda hidden: hidden @ weight
        return losses.chunked_sum(squared, hidden, head, by, TOKENS, chunk_size=4, needed=needed)[0]

    forward = products(loss, hidden, weight)
    frozen = products(jax.grad(loss), hidden, weight)
    both = products(jax.grad(loss, (0, 1)), hidden, weight)
    # Beside the products the squares and their sums.
    assert 1 <= forward < 1.9 <= frozen < 2.9 <= both < 3.9


def test_chunks_of_a_sum_without_a_needed_position_are_left_out():
    needed, columns = np.zeros((B, T), bool), slice(4, 8)
    needed[1, 5] = True
    outside = np.ones((T, 1), bool)
    outside[columns] = False
    hidden, weight = HIDDEN.astype(np.float32), WEIGHT.astype(np.float32)

    def run(hidden, part, needed):
        def loss(hidden, weight):
            arrays = hidden[:, part], lambda hidden: hidden @ weight, by[:, part], TOKENS[:, part]
            return losses.chunked_sum(of_sum, *arrays, chunk_size=4, needed=needed)

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(hidden, weight)

    by = COTANGENTS[0].astype(np.float32)
    got = run(np.where(outside, np.nan, hidden), slice(None), needed)
    (value, aux), (of_hidden, of_weight) = run(hidden, columns, None)
    np.testing.assert_allclose(got[0][0], value, atol=1e-5)
    np.testing.assert_allclose(got[0][1]["logprob"][:, columns], aux["logprob"], atol=1e-5)
    np.testing.assert_allclose(got[1][0], np.where(outside, 0.0, of_hidden), atol=1e-5)
    np.testing.assert_allclose(got[1][1], of_weight, atol=1e-5)


def test_a_sum_refuses_a_loss_that_is_not_of_positions():
    hidden, total = HIDDEN.astype(np.float32), lambda logits: (logits.sum(), None)
    with pytest.raises(
        ValueError, match=r"must return \[B, C, ...\] = \[3, 4\], but returned \[\]"
    ):
        losses.chunked_sum(total, hidden, lambda h: 2.0 * h, TOKENS > 0, chunk_size=4)
