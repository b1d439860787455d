"""Algorithms on the bandit end where theory says, of which the closed form is one place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.algorithms import closed_form
from benchmarks.algorithms.closed_form import ALGORITHMS
from rlhf.tasks import bandit

REFERENCE = jax.nn.log_softmax(jnp.asarray(np.random.default_rng(0).normal(size=(4, 44))))
REWARDS = jnp.asarray(bandit.rewards(1))
CLOSE = 0.02
EXACT = [name for name, one in ALGORITHMS.items() if one.theory.startswith("exact")]
OTHERS = [name for name in ALGORITHMS if name not in EXACT]


def forward_kl_objective(logprobs, beta):
    """`E[r] - β KL(π_ref ‖ π)` of each context."""
    reward = (jnp.exp(logprobs) * REWARDS).sum(axis=-1)
    return reward - beta * (jnp.exp(REFERENCE) * (REFERENCE - logprobs)).sum(axis=-1)


@pytest.mark.parametrize("beta", [0.05, 0.2, 2.0])
def test_the_optimum_with_a_forward_kl_is_the_best_of_all_policies(beta):
    best = closed_form.forward_kl_optimum(REFERENCE, REWARDS, beta)
    np.testing.assert_allclose(jnp.exp(best).sum(axis=-1), 1.0, rtol=1e-5)
    gradient = jax.grad(lambda x: forward_kl_objective(jax.nn.log_softmax(x), beta).sum())(best)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)
    rng = np.random.default_rng(1)
    for scale in (0.01, 0.1, 1.0):
        other = jax.nn.log_softmax(best + scale * rng.normal(size=best.shape))
        assert (forward_kl_objective(other, beta) < forward_kl_objective(best, beta)).all()


@pytest.mark.parametrize("optimum", [closed_form.forward_kl_optimum, bandit.optimum])
def test_a_scaled_optimum_is_the_one_at_its_own_deviation(optimum):
    found = closed_form.scaled_optimum(optimum, REFERENCE, REWARDS, 2.0)
    policy = np.exp(np.asarray(found, np.float64))
    mean = (policy * REWARDS).sum(axis=1, keepdims=True)
    deviation = np.sqrt((policy * (REWARDS - mean) ** 2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(
        np.exp(found), np.exp(optimum(REFERENCE, REWARDS, 2.0 * deviation)), atol=1e-5
    )


def ends(name, **changes):
    """Total variations at the end of two runs: to the closed form, and to the algorithm's own
    optimum.
    """
    algorithm = ALGORITHMS[name]
    algorithm = algorithm._replace(setting=algorithm.setting._replace(**changes))
    curves = closed_form.distance(algorithm, seeds=2)
    return curves["to_closed_form"][:, -1], curves["to_its_optimum"][:, -1]


SHORT = {"steps": 250, "prompts": 8, "evaluations": 1}


def test_rloo_ends_at_the_closed_form():
    to_closed_form, _ = ends("RLOO", **SHORT)
    assert to_closed_form.max() < 0.05


def test_grpo_ends_at_its_own_optimum_and_not_at_the_closed_form():
    to_closed_form, to_its_optimum = ends("GRPO", **SHORT)
    assert to_its_optimum.max() < 0.05
    assert to_closed_form.min() > 0.2


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", EXACT)
def test_exact_algorithms_end_at_the_closed_form(name):
    line = closed_form.line(name, seeds=2)
    assert line["to its own optimum, at most"] < CLOSE
    assert line["to the closed form"] <= line["to the closed form, at most"] < CLOSE
    assert line["at the start"] > 10 * CLOSE


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", OTHERS)
def test_other_algorithms_end_at_their_own_optimum(name):
    line = closed_form.line(name, seeds=2)
    assert line["to its own optimum"] <= line["to its own optimum, at most"] < CLOSE
    assert line["to the closed form"] > 5 * CLOSE
