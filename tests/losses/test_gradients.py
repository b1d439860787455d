"""Gradient oracles: surrogates in closed form, KL estimators by enumeration of a small categorical, in float64."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import assert_close, gradients, run

from rlhf.losses import covariance, kl, policy, ratios

# ---- surrogates: dL/dlog π of one token, at a ratio and an advantage ------------------------------------------------

CLIP: dict[str, Any] = {"clip_low": 0.2, "clip_high": 0.3}
sigmoid = lambda x: 1 / (1 + math.exp(-x))


def clipped(r, a):
    """The clip stops what would go further: up where A > 0, down where A < 0."""
    return 0.0 if (a > 0 and r > 1.3) or (a < 0 and r < 0.8) else -r * a


def sapo(r, a):
    tau = 1.0 if a > 0 else 1.05
    gate = sigmoid(tau * (r - 1))
    return -4 * gate * (1 - gate) * r * a


def vespo(r, a):
    k, lam = (2.0, 3.0) if a >= 0 else (3.0, 2.0)
    return -(r**k) * math.exp(lam * (1 - r)) * a


SURROGATES = {  # what is differentiated, and the derivative
    "reinforce": (lambda lp, old, a, m: policy.reinforce(lp, a, m), lambda r, a: -a),
    "clipped_surrogate": (functools.partial(policy.clipped_surrogate, **CLIP), clipped),
    "dual_clipped_surrogate": (
        functools.partial(policy.dual_clipped_surrogate, **CLIP, dual_clip=2.0),
        lambda r, a: 0.0 if a < 0 and r > 2.0 else clipped(r, a),
    ),
    "two_sided_surrogate": (
        functools.partial(policy.two_sided_surrogate, **CLIP, max_ratio=2.0),
        lambda r, a: 0.0 if a < 0 and r > 2.0 else clipped(r, a),
    ),
    "gspo": (functools.partial(policy.gspo, **CLIP), clipped),
    "gspo_token": (functools.partial(policy.gspo_token, **CLIP), clipped),
    "luspo": (functools.partial(policy.luspo, **CLIP), clipped),
    "gmpo": (
        functools.partial(policy.gmpo, clip_low=0.2, clip_high=0.3),
        lambda r, a: (
            0.0 if (a > 0 and math.log(r) > 0.3) or (a < 0 and math.log(r) < -0.2) else -r * a
        ),
    ),
    "cispo": (
        functools.partial(policy.cispo, max_ratio=1.5, min_ratio=0.5),
        lambda r, a: -min(max(r, 0.5), 1.5) * a,
    ),
    "sapo": (policy.sapo, sapo),
    "vespo": (policy.vespo, vespo),
    "dppo": (
        functools.partial(
            policy.dppo, threshold_low=0.1, threshold_high=0.15
        ),  # of π = 0.3 r against 0.3
        lambda r, a: (
            0.0 if (a > 0 and 0.3 * (r - 1) > 0.15) or (a < 0 and 0.3 * (1 - r) > 0.1) else -r * a
        ),
    ),
    "topr": (policy.topr, lambda r, a: -a if a >= 0 else -min(r, 1.0) * a),
    "m2po": (
        functools.partial(policy.m2po, threshold=0.1),
        lambda r, a: -r * a if math.log(r) ** 2 <= 0.1 else 0.0,
    ),
    "decoupled_surrogate": (
        lambda lp, old, a, m: policy.decoupled_surrogate(
            lp, old, a, m, importance=0.5 * jnp.ones_like(lp), **CLIP
        ),
        lambda r, a: 0.5 * clipped(r, a),
    ),
    "kl_cov": (  # a single token has no covariance, and pays
        functools.partial(covariance.kl_cov, kl_coef=0.7),
        lambda r, a: -r * a + 0.7 * (math.copysign(1, r - 1) if r != 1 else 0.0),
    ),
}


@pytest.mark.parametrize("name", SURROGATES)
@pytest.mark.parametrize("advantage", [1.5, -0.5])
@pytest.mark.parametrize("ratio", [1.0, 1.2, 0.9, 1.4, 1.7, 2.5, 0.7, 0.3])
def test_surrogate(name, advantage, ratio):
    old, derivative = np.full((1, 1), math.log(0.3)), SURROGATES[name][1]
    got = gradients(surrogate_of(name), old + math.log(ratio), old, np.full((1, 1), advantage))
    np.testing.assert_allclose(got[0][0, 0], derivative(ratio, advantage), rtol=1e-9, atol=1e-12)
    assert not np.any(got[1])
    assert not np.any(got[2])


@functools.cache
def surrogate_of(name):
    return lambda lp, old, advantages: SURROGATES[name][0](
        lp, old, advantages, jnp.ones((1, 1), bool)
    )


@pytest.mark.parametrize("name", [name for name in SURROGATES if name != "kl_cov"])
def test_at_ratio_one_the_gradient_is_reinforces(name):
    rng = np.random.default_rng(0)
    lp, advantages = -rng.uniform(0.1, 3, (3, 1)), rng.normal(size=(3, 1))
    factor = 0.5 if name == "decoupled_surrogate" else 1.0
    fn = lambda lp, old, a: SURROGATES[name][0](lp, old, a, jnp.ones((3, 1), bool))
    assert_close(gradients(fn, lp, lp, advantages)[0], -factor * advantages)


def test_gradients_through_a_sequences_ratio():
    """A sequence of two tokens: each token's loss reaches both, half of it."""
    old = np.log([[0.3, 0.4]])
    lp, advantages = old + np.array([[0.1, -0.3]]), np.array([[2.0, 2.0]])
    mask, ratio = np.ones((1, 2), bool), math.exp(-0.1)
    of = lambda fn: gradients(
        lambda lp: fn(lp, old, advantages, mask, clip_low=0.2, clip_high=0.3), lp
    )[0]
    assert_close(
        of(policy.gspo), [[-2 * ratio, -2 * ratio]]
    )  # two losses, each of which gives half to each
    assert_close(of(policy.gspo_token), [[-2 * ratio, -2 * ratio]])
    assert_close(of(policy.luspo), [[-4 * ratio, -4 * ratio]])
    # GMPO bounds the first token at 0.05 from above and leaves the second: only that one is reached.
    bounded = math.exp((0.05 - 0.3) / 2)
    got = gradients(
        lambda lp: policy.gmpo(lp, old, advantages, mask, clip_low=0.2, clip_high=0.05), lp
    )[0]
    assert_close(got, [[0.0, -2 * bounded]])
    uneven = gradients(
        lambda lp: policy.gspo_token(
            lp, old, advantages * [[1, 0]], mask, clip_low=0.2, clip_high=0.3
        ),
        lp,
    )[0]
    assert_close(uneven, [[-2 * ratio, 0.0]])


def test_clip_cov_has_no_gradient_where_it_drops():
    old, advantages, mask = (
        np.log([[0.5, 0.1, 0.4]]),
        np.array([[1.0, -1.0, 0.2]]),
        np.ones((1, 3), bool),
    )
    knobs = dict(key=jax.random.key(0), share=0.4, cov_low=0.2, cov_high=9.0)
    fn = lambda lp: covariance.clip_cov(lp, old, advantages, mask, **knobs)
    cov = run(covariance.covariance, old, advantages, mask)
    centred = lambda x: x - x.mean()
    assert_close(cov, centred(advantages) * centred(old))
    dropped = np.flatnonzero(run(fn, old)[0] == 0)
    assert len(dropped) == 1  # 0.4 of three tokens, rounded down
    assert cov[0, dropped[0]] > 0.2
    assert_close(gradients(fn, old)[0][0, dropped], [0.0])


# ---- KL: expectations over four actions, by enumeration -------------------------------------------------------------

RNG = np.random.default_rng(1)
LOGITS, REF, OLD = RNG.normal(size=(3, 4))
ACTIONS = np.ones(4, bool)


def expected(estimate, sampler):
    """`Σ_a sampler(a) estimate(a)`, the sampler held fixed: the mean loss over infinitely many samples."""
    weight = np.exp(np.asarray(jax.nn.log_softmax(sampler)))

    def loss(logits):
        logprobs, ref = jax.nn.log_softmax(logits), jax.nn.log_softmax(REF)
        return weight * estimate(logprobs, ref)

    return loss


def reverse(logits):
    p, q = jax.nn.softmax(logits), jax.nn.softmax(REF)
    return (p * (jnp.log(p) - jnp.log(q))).sum()


def forward(logits):
    p, q = jax.nn.softmax(logits), jax.nn.softmax(REF)
    return (q * (jnp.log(q) - jnp.log(p))).sum()


def exact(divergence):
    with jax.enable_x64(True):
        return np.asarray(jax.value_and_grad(divergence)(jnp.asarray(LOGITS))[1]), float(
            divergence(jnp.asarray(LOGITS))
        )


masked = lambda fn, **knobs: lambda lp, ref: fn(lp, ref, ACTIONS, **knobs)
ON_POLICY = {  # the mean gradient of each estimator in a loss, samples from the policy itself
    "k1": (masked(kl.k1), None),
    "k2": (masked(kl.k2), reverse),
    "k3": (masked(kl.k3), forward),
    "k1, straight through": (masked(kl.straight_through, estimator=kl.k1), reverse),
    "k3, straight through": (masked(kl.straight_through), reverse),
    "k1 with its score function": (masked(kl.score_function, estimator=kl.k1), reverse),
    "k3 with its score function": (masked(kl.score_function), reverse),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_mean_gradient_of_an_estimator(name):
    estimate, divergence = ON_POLICY[name]
    with jax.enable_x64(True):
        got = gradients(expected(estimate, LOGITS), LOGITS)[0]
    want = np.zeros(4) if divergence is None else exact(divergence)[0]
    np.testing.assert_allclose(got, want, atol=1e-12)


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3, kl.straight_through, kl.score_function])
def test_mean_value_of_an_estimator(estimator):
    with jax.enable_x64(True):
        got = float(run(expected(masked(estimator), LOGITS), LOGITS).sum())
    assert abs(got - exact(reverse)[1]) < 1e-12


@pytest.mark.parametrize("estimator", [kl.k1, kl.k3])
def test_bias_corrected_is_exact_off_policy(estimator):
    """Samples of an older policy: value and gradient are those of the reverse KL of the policy of today."""
    with jax.enable_x64(True):
        old = np.asarray(jax.nn.log_softmax(jnp.asarray(OLD)))
        estimate = lambda lp, ref: kl.bias_corrected(lp, ref, old, ACTIONS, estimator=estimator)
        loss = expected(estimate, OLD)
        want, value = exact(reverse)
        np.testing.assert_allclose(gradients(loss, LOGITS)[0], want, atol=1e-12)
        assert abs(float(run(loss, LOGITS).sum()) - value) < 1e-12


def test_full_kl():
    with jax.enable_x64(True):
        want, value = exact(reverse)
        assert abs(float(run(kl.full, LOGITS, REF)) - value) < 1e-12
        np.testing.assert_allclose(
            gradients(lambda x: kl.full(x, REF), LOGITS)[0], want, atol=1e-12
        )


def test_log_ratios_end_at_twenty_and_so_do_gradients():
    far, old, mask = np.array([[50.0, -50.0, 1.0]]), np.zeros((1, 3)), np.ones((1, 3), bool)
    assert_close(run(ratios.token_log_ratio, far, old, mask), [[20.0, -20.0, 1.0]])
    assert_close(
        gradients(lambda lp: ratios.token_log_ratio(lp, old, mask), far)[0], [[0.0, 0.0, 1.0]]
    )
