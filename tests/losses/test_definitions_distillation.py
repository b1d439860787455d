"""Supervised objectives, reward models, distillation and offline objectives against slow definitions, in float64."""

import math

import jax
import numpy as np
import pytest
from definitions import assert_close, finite_differences, gradients, run

from rlhf.losses import advantages, distillation, logits, offline, policy, reward_model, supervised

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(size=(2, 4, 5))
TOKENS = RNG.integers(5, size=4)
MASK = np.array(
    [[True, False, True, True], [False, False, False, False], [True, True, True, False]]
)
LOGPROBS, OTHERS = -RNG.uniform(0.1, 3, size=(2, *MASK.shape))
VALUES, TARGETS = RNG.normal(size=(2, *MASK.shape))


def softmax(x):
    return np.array([math.exp(v) for v in x]) / sum(math.exp(v) for v in x)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def per_position(definition, *arrays):
    return np.array([definition(*rows) for rows in zip(*arrays, strict=True)])


# ---- logits, supervised, reward models --------------------------------------------------------------------------------


def test_log_sum_squared_probs():
    assert_close(
        run(logits.log_sum_squared_probs, STUDENT),
        [math.log(sum(softmax(x) ** 2)) for x in STUDENT],
    )
    far = np.array([[1e4, -1e4, 0.0]])
    assert_close(run(logits.log_sum_squared_probs, far), [0.0])


def test_smoothed_cross_entropy():
    def definition(x, token):
        p = softmax(x)
        target = np.full(5, 0.1 / 5)
        target[token] += 0.9
        return -sum(target * np.log(p)) + 0.3 * math.log(sum(np.exp(x))) ** 2

    knobs = {"label_smoothing": 0.1, "z_loss": 0.3}
    assert_close(
        run(logits.smoothed_cross_entropy, STUDENT, TOKENS, **knobs),
        per_position(definition, STUDENT, TOKENS),
    )
    slopes = finite_differences(logits.smoothed_cross_entropy, STUDENT, TOKENS, **knobs)
    got = gradients(lambda x: logits.smoothed_cross_entropy(x, TOKENS, **knobs), STUDENT)[0]
    np.testing.assert_allclose(got, slopes, atol=1e-8)


def test_is_top1_counts_the_first_of_equals():
    ties = np.array([[1.0, 1.0], [1.0, 1.0], [0.0, 2.0]])
    assert run(logits.is_top1, ties, np.array([0, 1, 1])).tolist() == [True, False, True]


def test_dft_weighs_by_a_probability_that_is_not_differentiated():
    assert_close(
        run(supervised.dft, LOGPROBS, MASK), np.where(MASK, -np.exp(LOGPROBS) * LOGPROBS, 0.0)
    )
    assert_close(
        gradients(lambda x: supervised.dft(x, MASK), LOGPROBS)[0],
        np.where(MASK, -np.exp(LOGPROBS), 0.0),
    )


def test_process_reward():
    steps, labels = RNG.normal(size=(*MASK.shape, 2)), RNG.integers(2, size=MASK.shape)
    want = np.zeros(MASK.shape)
    for i in zip(*np.nonzero(MASK), strict=True):
        want[i] = -math.log(softmax(steps[i])[labels[i]])
    assert_close(run(reward_model.process_reward, steps, np.where(MASK, labels, -100), MASK), want)


def test_regression():
    want = [
        [(v - t) ** 2 for v, t in zip(*rows, strict=True)]
        for rows in zip(VALUES, TARGETS, strict=True)
    ]
    assert_close(run(reward_model.regression, VALUES, TARGETS), want)
    assert_close(
        gradients(lambda x: reward_model.regression(x, TARGETS), VALUES)[0], 2 * (VALUES - TARGETS)
    )


# ---- divergences ------------------------------------------------------------------------------------------------------


def mixed(s, t, share):
    return share * t + (1 - share) * s


DIVERGENCES = {  # of the student's and the teacher's distributions
    "forward_kl": (lambda s, t: kl(t, s), {}),
    "reverse_kl": (lambda s, t: kl(s, t), {}),
    "jsd": (
        lambda s, t: 0.3 * kl(t, mixed(s, t, 0.3)) + 0.7 * kl(s, mixed(s, t, 0.3)),
        {"beta": 0.3},
    ),
    "skew_kl": (lambda s, t: kl(t, mixed(s, t, 0.2)), {"skew": 0.2}),
    "skew_reverse_kl": (lambda s, t: kl(s, mixed(s, t, 0.8)), {"skew": 0.2}),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence(name):
    definition, knobs = DIVERGENCES[name]
    fn = getattr(distillation, name)
    want = per_position(lambda s, t: definition(softmax(s), softmax(t)), STUDENT, TEACHER)
    assert_close(run(fn, STUDENT, TEACHER, **knobs), want)
    assert_close(run(fn, STUDENT, STUDENT + 3.0, **knobs), np.zeros(4))
    got = gradients(lambda s, t: fn(s, t, **knobs), STUDENT, TEACHER)
    np.testing.assert_allclose(got[0], finite_differences(fn, STUDENT, TEACHER, **knobs), atol=1e-8)
    assert not np.any(got[1])


@pytest.mark.parametrize(("beta", "limit"), [(0.0, "forward_kl"), (1.0, "reverse_kl")])
def test_the_ends_of_the_jsd_are_the_kls(beta, limit):
    end = getattr(distillation, limit)
    assert_close(run(distillation.jsd, STUDENT, TEACHER, beta=beta), run(end, STUDENT, TEACHER))
    got = gradients(lambda s, beta: distillation.jsd(s, TEACHER, beta=beta), STUDENT, beta)[0]
    assert_close(got, gradients(lambda s: end(s, TEACHER), STUDENT)[0])


def test_skew_without_skew():
    assert_close(
        run(distillation.skew_kl, STUDENT, TEACHER, skew=0.0),
        run(distillation.forward_kl, STUDENT, TEACHER),
    )
    reverse = run(distillation.reverse_kl, STUDENT, TEACHER)
    assert_close(run(distillation.skew_reverse_kl, STUDENT, TEACHER, skew=0.0), reverse)


def test_far_logits_are_finite():
    far = np.array([[1e4, -1e4, 0.0], [0.0, 0.0, 0.0]])
    for name, (_, knobs) in DIVERGENCES.items():
        fn = getattr(distillation, name)
        for student, teacher in ((far, far[::-1]), (far, -far)):
            assert np.isfinite(run(fn, student, teacher, **knobs)).all()
            assert np.isfinite(
                gradients(lambda s, fn=fn, t=teacher, k=knobs: fn(s, t, **k), student)[0]
            ).all()


def test_support_and_tail():
    support = run(distillation.top_k, TEACHER, static={"k": 2}.items())
    assert support.sum(-1).tolist() == [2, 2, 2, 2]
    for row, (s, t) in enumerate(zip(STUDENT, TEACHER, strict=True)):
        inside = sorted(np.argsort(-t)[:2])
        assert np.flatnonzero(support[row]).tolist() == inside
        kept = [softmax(x)[inside] for x in (s, t)]
        renormalised = run(distillation.on_support, STUDENT, TEACHER, support)
        with_tail = run(distillation.with_tail, STUDENT, TEACHER, support)
        for of, without, tail in zip(kept, renormalised, with_tail, strict=True):
            np.testing.assert_allclose(np.exp(without[row][inside]), of / of.sum(), rtol=1e-10)
            np.testing.assert_allclose(
                np.exp(tail[row][[*inside, 5]]), [*of, 1 - of.sum()], rtol=1e-10
            )
            assert np.isinf(np.delete(without[row], inside)).all()
            assert np.isinf(np.delete(tail[row], [*inside, 5])).all()


def test_a_whole_support_changes_nothing():
    whole = np.ones(STUDENT.shape, bool)
    restricted = lambda s, t: distillation.jsd(*distillation.on_support(s, t, whole), beta=0.3)
    assert_close(
        run(restricted, STUDENT, TEACHER), run(distillation.jsd, STUDENT, TEACHER, beta=0.3)
    )


def test_top_k_takes_the_first_of_equals():
    assert run(distillation.top_k, np.zeros(3), static={"k": 2}.items()).tolist() == [
        True,
        True,
        False,
    ]


# ---- advantages of a teacher ------------------------------------------------------------------------------------------


def test_distillation_advantages_have_the_gradient_of_the_reverse_kl():
    """The expectation over the student's tokens of `-A ∇log π` is `∇KL(S ‖ T)`."""

    def expected(student):
        logprobs, teacher = jax.nn.log_softmax(student), jax.nn.log_softmax(TEACHER[0])
        everywhere = np.ones(5, bool)
        loss = policy.reinforce(
            logprobs, distillation.advantages(logprobs, teacher, everywhere), everywhere
        )
        return (jax.lax.stop_gradient(jax.numpy.exp(logprobs)) * loss).sum()

    exact = gradients(lambda s: distillation.reverse_kl(s, TEACHER[0]), STUDENT[0])[0]
    assert_close(gradients(expected, STUDENT[0])[0], exact)


@pytest.mark.parametrize("discount", [0.0, 0.7, 1.0])
def test_minillm_is_a_mean_of_what_follows(discount):
    want = np.zeros(MASK.shape)
    for row in range(len(MASK)):
        columns = np.flatnonzero(MASK[row])
        for i, t in enumerate(columns):
            powers = [discount**k for k in range(len(columns) - i)]
            gains = [OTHERS[row, u] - LOGPROBS[row, u] for u in columns[i:]]
            want[row, t] = sum(p * g for p, g in zip(powers, gains, strict=True)) / sum(powers)
    assert_close(run(distillation.minillm, LOGPROBS, OTHERS, MASK, discount=discount), want)


def test_prefix_weights_with_packed_rows():
    ids = np.array([[1, 1, 2, 2], [1, 1, 1, 1], [1, 2, 2, 0]])
    mask, got = MASK & (ids > 0), np.zeros(MASK.shape)
    for row in range(len(mask)):
        for segment in (1, 2):
            columns = [t for t in range(4) if mask[row, t] and ids[row, t] == segment]
            sizes = [abs(VALUES[row, t]) for t in columns]
            for i, t in enumerate(columns):
                got[row, t] = 1 + 0.5 * (1 - sum(sizes[:i]) / sum(sizes))
    np.testing.assert_allclose(
        run(distillation.prefix_weights, VALUES, mask, segment_ids=ids), got, rtol=1e-10
    )


# ---- offline ----------------------------------------------------------------------------------------------------------


def test_td_targets():
    ids = np.array([[1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 2, 0]])
    want = np.zeros(MASK.shape)
    for row in range(len(MASK)):
        for segment in (1, 2):
            columns = [t for t in range(4) if MASK[row, t] and ids[row, t] == segment]
            following = [*(VALUES[row, t] for t in columns[1:]), 0.0]
            for t, value in zip(columns, following, strict=bool(columns)):
                want[row, t] = TARGETS[row, t] + 0.9 * value
    assert_close(
        run(offline.td_targets, TARGETS, VALUES, MASK, segment_ids=ids, discount=0.9), want
    )


def test_q_and_value_losses():
    error = TARGETS - VALUES
    assert_close(run(offline.q_loss, VALUES, TARGETS, MASK), np.where(MASK, error**2, 0))
    assert_close(
        gradients(lambda q: offline.q_loss(q, TARGETS, MASK), VALUES)[0],
        np.where(MASK, -2 * error, 0),
    )
    slope = np.where(error < 0, 0.2, 0.8)
    assert_close(
        run(offline.expectile_value_loss, VALUES, TARGETS, MASK, tau=0.8),
        np.where(MASK, slope * error**2, 0),
    )
    got = gradients(lambda v: offline.expectile_value_loss(v, TARGETS, MASK, tau=0.8), VALUES)[0]
    assert_close(got, np.where(MASK, -2 * slope * error, 0))


def test_the_expectile_is_between_the_mean_and_the_maximum():
    sample, mask = np.array([0.0, 1.0, 4.0]), np.ones(3, bool)
    at = lambda v, tau: run(
        offline.expectile_value_loss, np.full(3, v), sample, mask, tau=tau
    ).sum()
    best = lambda tau: min(np.linspace(0, 4, 401), key=lambda v: at(v, tau))
    assert abs(best(0.5) - sample.mean()) < 0.01
    assert sample.mean() < best(0.9) < best(0.99) < sample.max()


def test_cql_and_awac():
    want = per_position(lambda x, token: math.log(sum(np.exp(x))) - x[token], STUDENT, TOKENS)
    assert_close(run(offline.cql, STUDENT, TOKENS), want)
    weight = np.exp(0.5 * (TARGETS - VALUES))
    assert_close(
        run(offline.awac, LOGPROBS, TARGETS, VALUES, MASK, beta=0.5),
        np.where(MASK, -weight * LOGPROBS, 0),
    )
    got = gradients(lambda lp: offline.awac(lp, TARGETS, VALUES, MASK, beta=0.5), LOGPROBS)[0]
    assert_close(got, np.where(MASK, -weight, 0))
    far = run(offline.awac, LOGPROBS, 1e4 * np.ones(MASK.shape), VALUES, MASK)
    assert_close(far, np.where(MASK, -math.exp(20) * LOGPROBS, 0))


def test_polyak_of_pytrees():
    target, online = {"a": [VALUES], "b": TARGETS}, {"a": [TARGETS], "b": VALUES}
    got = run(offline.polyak, target, online, rate=0.1)
    assert_close(got["a"][0], 0.9 * VALUES + 0.1 * TARGETS)
    assert_close(got["b"], 0.9 * TARGETS + 0.1 * VALUES)
    with pytest.raises(ValueError, match=r"target \[3, 4\] but online \[3\]"):
        offline.polyak({"w": VALUES}, {"w": VALUES[:, 0]})


REWARDS = np.array(
    [[1.0, 3.0, 2.0, 3.0], [np.nan, 0.5, np.nan, -1.0], [np.nan] * 4, [2.0, 2.0, 2.0, 2.0]]
)


@pytest.mark.parametrize("percentile", [0.0, 0.5, 0.7, 1.0])
def test_rft_keeps_the_best_samples(percentile):
    want = np.zeros(REWARDS.shape, bool)
    for i, row in enumerate(REWARDS):
        scored = row[~np.isnan(row)]
        if len(scored):
            want[i] = row >= np.quantile(scored, percentile)
    np.testing.assert_array_equal(run(offline.rft, REWARDS, percentile=percentile), want)


def test_best_of_n():
    assert run(offline.best_of_n, REWARDS).tolist() == [1, 1, 0, 0]


def test_optimal_value():
    def definition(row):
        scored = [r for r in row if not math.isnan(r)]
        return (
            0.3 * math.log(sum(math.exp(r / 0.3) for r in scored) / len(scored)) if scored else 0.0
        )

    assert_close(
        run(offline.optimal_value, REWARDS, beta=0.3), [definition(row) for row in REWARDS]
    )
    np.testing.assert_allclose(
        run(offline.optimal_value, REWARDS, beta=1e-4)[[0, 1, 3]], [3.0, 0.5, 2.0], atol=1e-3
    )
    np.testing.assert_allclose(
        run(offline.optimal_value, REWARDS, beta=1e4)[[0, 1, 3]], [2.25, -0.25, 2.0], atol=1e-3
    )


def test_a_star_is_zero_at_the_optimum():
    rewards, values = np.array([1.0, 0.0]), np.array([0.4, 0.3])
    ref = np.array([-5.0, -7.0])
    best = ref + (rewards - values) / 0.2  # log π* = log ref + (r - V*) / β
    assert_close(run(offline.a_star, best, ref, rewards, values, beta=0.2), [0.0, 0.0])
    off = run(offline.a_star, best + 1.0, ref, rewards, values, beta=0.2)
    assert_close(off, [0.04, 0.04])


def test_wrong_ranks_are_refused():
    for fn in (offline.rft, offline.best_of_n, offline.optimal_value):
        with pytest.raises(ValueError, match=r"\[P, G\].* \[4\].*groups.split"):
            fn(REWARDS[0])


def test_targets_are_the_returns_of_one_step():
    got = run(offline.td_targets, TARGETS, 0 * VALUES, MASK)
    assert_close(got, run(advantages.returns, TARGETS, MASK, discount=0.0))
