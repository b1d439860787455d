"""Statistics of the comparison of algorithms, against rliable's and scipy's values."""

import json
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.algorithms import statistics

# Made by rliable 1.2.0, whose draws were replaced by the resamples in the file.
RLIABLE = {
    name: np.asarray(value)
    for name, value in json.loads((Path(__file__).parent / "data/rliable.json").read_text()).items()
}
X, Y = RLIABLE["x"], RLIABLE["y"]
OF_X, OF_Y = RLIABLE["resamples_of_x"], RLIABLE["resamples_of_y"]


def test_interquartile_mean_and_its_interval_are_rliables():
    found = statistics.interval(statistics.interquartile_mean, [X], [OF_X])
    np.testing.assert_allclose(found, RLIABLE["interquartile_mean"], rtol=1e-9)
    assert found.estimate == pytest.approx(stats.trim_mean(X, 0.25, axis=None), rel=1e-12)


def test_probability_of_improvement_and_its_interval_are_rliables():
    found = statistics.interval(statistics.probability_of_improvement, [X, Y], [OF_X, OF_Y])
    np.testing.assert_allclose(found, RLIABLE["improvement"], rtol=1e-9)
    u = RLIABLE["mannwhitney"].mean() / (len(X) * len(Y))
    assert found.estimate == pytest.approx(u, rel=1e-12)


def test_profiles_and_their_bands_are_rliables():
    thresholds = RLIABLE["thresholds"]
    found = statistics.interval(lambda x: statistics.profile(x, thresholds), [X], [OF_X])
    np.testing.assert_allclose(found.estimate, RLIABLE["profile"], atol=1e-9)
    np.testing.assert_allclose(found.low, RLIABLE["profile_low"], atol=1e-9)
    np.testing.assert_allclose(found.high, RLIABLE["profile_high"], atol=1e-9)


def test_resamples_stay_within_their_task():
    scores = np.arange(12.0).reshape(4, 3)
    indices = statistics.resamples(np.random.default_rng(0), scores, 50)
    drawn = statistics.resampled(scores, indices)
    assert drawn.shape == (50, 4, 3)
    assert (drawn % 3 == np.arange(3)).all()
    # Tasks draw by themselves.
    assert (indices[..., 0] != indices[..., 1]).any()


def test_permutation_p_is_that_of_all_splits():
    x, y = X[:4, :1], Y[:3, :1]
    both = np.concatenate([x, y])[:, 0]
    exact = stats.mannwhitneyu(x[:, 0], y[:, 0], method="exact").pvalue
    assert len(set(both)) == len(both)
    found = statistics.permutation_p(np.random.default_rng(0), x, y, 200_000)
    assert found == pytest.approx(exact, abs=0.005)


def test_permutation_p_sees_opposite_tasks_as_no_improvement():
    # Better on one task and worse on the other by as much.
    x = np.array([[3.0, 0.0], [4.0, 1.0]])
    y = np.array([[1.0, 2.0], [2.0, 3.0]])
    assert statistics.permutation_p(np.random.default_rng(0), x, y, 1000) == 1.0
    assert statistics.permutation_p(np.random.default_rng(0), x[:, :1], y[:, :1], 1000) < 0.5


def test_holm_is_the_closed_test():
    # Holm's step-down rejects what the closed Bonferroni test does, whatever the order.
    p = np.array([0.011, 0.02, 0.022, 0.9])
    for order in permutations(range(4)):
        np.testing.assert_allclose(
            statistics.holm(p[list(order)]), np.array([0.044, 0.06, 0.06, 0.9])[list(order)]
        )


def test_equivalence_needs_runs_and_a_margin():
    rng = np.random.default_rng(0)
    x, y = 0.5 + 0.01 * rng.standard_normal((2, 16, 4))
    indices = [statistics.resamples(rng, x, 2000), statistics.resamples(rng, y, 2000)]
    assert statistics.is_equivalent(x, y, indices, margin=0.02)
    assert not statistics.is_equivalent(x, y + 0.03, indices, margin=0.02)
    few = [at[:, :2] % 2 for at in indices]
    noisy = 0.5 + 0.2 * rng.standard_normal((2, 2, 4))
    assert not statistics.is_equivalent(*noisy, few, margin=0.02)


def test_fit_finds_the_sigmoid_and_predicts_the_second_half():
    compute = np.geomspace(1, 1000, 40)
    true = statistics.Sigmoid(0.2, 0.9, 30.0, 1.5)
    scores = true(compute) + 0.005 * np.random.default_rng(0).standard_normal(40)
    found = statistics.fit(compute, scores, 0.2)
    assert found.asymptote == pytest.approx(0.9, abs=0.01)
    assert found.midpoint == pytest.approx(30.0, rel=0.1)
    assert found.exponent == pytest.approx(1.5, rel=0.1)
    first = statistics.fit(compute[:28], scores[:28], 0.2)
    assert np.abs(first(compute[28:]) - scores[28:]).max() < 0.05
