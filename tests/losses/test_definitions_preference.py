"""Objectives on pairs and on labelled completions: slow definitions, identities and finite differences, in float64."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contracts.preference import CASES
from definitions import assert_close, gradients, jit, run

from rlhf.losses import divergence, online, preference, reference_free, unpaired

N = 6  # pairs
RNG = np.random.default_rng(0)
PAIR = RNG.normal(size=(4, N))
CHOSEN, REJECTED, REF_CHOSEN, REF_REJECTED = PAIR
LENGTHS = {
    "chosen_length": np.array([1, 2, 3, 4, 5, 0]),
    "rejected_length": np.array([3, 1, 0, 2, 7, 5]),
}
PROBABLE = -RNG.uniform(0.1, 9, size=(2, N))
DESIRABLE = np.array([True, False, False, True, True, False])
MASK = RNG.random((4, 5)) < 0.7
MASK[1], MASK[2] = True, False
TOKENS, REF_TOKENS = -RNG.uniform(0.1, 3, size=(2, *MASK.shape))


def logistic(z):
    return 1 / (1 + math.exp(-z))


def cost(z):
    return math.log(1 + math.exp(-z))


# ---- divergences ------------------------------------------------------------------------------------------------------

LOG_RATIOS = np.array([-3.0, -0.7, 0.0, 0.4, 2.5])
GENERATORS = {  # f of the divergence E_ref[f(π/ref)]; a score is f'(π/ref) - f'(1)
    "reverse_kl": (lambda t: t * math.log(t), {}),
    "forward_kl": (lambda t: -math.log(t), {}),
    "js": (lambda t: t * math.log(2 * t / (1 + t)) + math.log(2 / (1 + t)), {}),
    "alpha": (lambda t: (t**0.3 - 1) / (0.3 * (0.3 - 1)), {"alpha": 0.3}),
}


@pytest.mark.parametrize("name", GENERATORS)
def test_divergence(name):
    f, knobs = GENERATORS[name]
    slope = lambda t: (f(t * (1 + 1e-5)) - f(t * (1 - 1e-5))) / (2e-5 * t)
    want = [slope(math.exp(x)) - slope(1.0) for x in LOG_RATIOS]
    np.testing.assert_allclose(
        run(getattr(divergence, name), LOG_RATIOS, **knobs), want, rtol=1e-7, atol=1e-7
    )


def test_alpha_divergence_has_its_limits():
    assert_close(run(divergence.alpha, LOG_RATIOS, alpha=1.0), LOG_RATIOS)
    assert_close(
        run(divergence.alpha, LOG_RATIOS, alpha=0.0), run(divergence.forward_kl, LOG_RATIOS)
    )
    near = run(divergence.alpha, LOG_RATIOS, alpha=1 + 1e-9)
    np.testing.assert_allclose(near, LOG_RATIOS, atol=1e-8)
    assert_close(gradients(divergence.alpha, LOG_RATIOS, alpha=1.0)[0], np.ones(5))


# ---- pairs ------------------------------------------------------------------------------------------------------------

SCORES = {
    "reverse_kl": lambda x: x,
    "forward_kl": lambda x: 1 - math.exp(-x),
    "js": lambda x: math.log(2 * math.exp(x) / (1 + math.exp(x))),
    "alpha": lambda x: -2 * (math.exp(-x / 2) - 1),
}


def nca(c, r):
    return cost(c) + 0.5 * cost(-c) + 0.5 * cost(-r)


def exo(z, smoothing):
    """`KL(q | labels)` over the two completions."""
    q = (logistic(z), 1 - logistic(z))
    return sum(q * math.log(q / p) for q, p in zip(q, (1 - smoothing, smoothing), strict=True))


def robust(z, e):
    return ((1 - e) * cost(z) - e * cost(-z)) / (1 - 2 * e)


def discopop(z, tau):
    m = logistic(z / tau)
    return (1 - m) * cost(z) + m * math.exp(-z)


OF_SCORES = {  # of the difference of scores, times β
    "sigmoid": (cost, {}),
    "hinge": (lambda z: max(0.0, 1 - z), {}),
    "exo": (lambda z: exo(z, 0.2), {"label_smoothing": 0.2}),
    "robust": (lambda z: robust(z, 0.2), {"label_smoothing": 0.2}),
    "discopop": (lambda z: discopop(z, 0.5), {"tau": 0.5}),
}
OF_REWARDS = {  # of both rewards, β times the log-ratios
    "nca": nca,
    "bco_pair": lambda c, r: cost(c) + cost(-r),
    "sppo": lambda c, r: (c / 0.3 - 0.5 / 0.3) ** 2 + (r / 0.3 + 0.5 / 0.3) ** 2,
    "apo_zero": lambda c, r: 1 - logistic(c) + logistic(r),
    "apo_down": lambda c, r: logistic(c) + 1 - logistic(c - r),
}


def by_pair(pair=PAIR):
    return [(c - rc, r - rr) for c, r, rc, rr in pair.T]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("name", OF_SCORES)
def test_pairs_by_scores(name, score):
    of_margin, knobs = OF_SCORES[name]
    s = SCORES[score]
    want = [of_margin(0.3 * (s(c) - s(r))) for c, r in by_pair()]
    static = {"divergence": getattr(divergence, score)}
    assert_close(
        run(getattr(preference, name), *PAIR, static=static.items(), beta=0.3, **knobs), want
    )


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("name", "of_difference"), [
    ("sigmoid_norm", lambda d: cost(0.3 * d)), ("ipo", lambda d: (d - 1 / 0.6) ** 2),
])  # fmt: skip
def test_pairs_by_the_token(name, of_difference, score):
    s = SCORES[score]
    per_token = [
        s(c) / max(n, 1) - s(r) / max(m, 1)
        for (c, r), n, m in zip(by_pair(), *LENGTHS.values(), strict=True)
    ]
    static = {"divergence": getattr(divergence, score)}
    got = run(getattr(preference, name), *PAIR, static=static.items(), beta=0.3, **LENGTHS)
    assert_close(got, [of_difference(d) for d in per_token])


@pytest.mark.parametrize("name", OF_REWARDS)
def test_pairs_by_rewards(name):
    want = [OF_REWARDS[name](0.3 * c, 0.3 * r) for c, r in by_pair()]
    assert_close(run(getattr(preference, name), *PAIR, beta=0.3), want)


def smoothed(z, e):
    return (1 - e) * cost(z) + e * cost(-z)


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_label_smoothing(e):
    margins = [0.3 * (c - r) for c, r in by_pair()]
    want = [smoothed(z, e) for z in margins]
    assert_close(run(preference.logistic, np.array(margins), label_smoothing=e), want)
    assert_close(run(preference.sigmoid, *PAIR, beta=0.3, label_smoothing=e), want)
    means = [
        0.3 * (c / max(n, 1) - r / max(m, 1))
        for (c, r), n, m in zip(by_pair(), *LENGTHS.values(), strict=True)
    ]
    got = run(preference.sigmoid_norm, *PAIR, beta=0.3, label_smoothing=e, **LENGTHS)
    assert_close(got, [smoothed(z, e) for z in means])


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_optimal_transport(e):
    differences = zip(sorted(CHOSEN - REJECTED), sorted(REF_CHOSEN - REF_REJECTED), strict=True)
    want = [smoothed(0.3 * (policy - reference), e) for policy, reference in differences]
    assert_close(run(preference.aot, *PAIR, beta=0.3, label_smoothing=e), want)
    unpaired_differences = zip(
        sorted(CHOSEN - REF_CHOSEN), sorted(REJECTED - REF_REJECTED), strict=True
    )
    want = [smoothed(0.3 * (chosen - rejected), e) for chosen, rejected in unpaired_differences]
    assert_close(run(preference.aot_unpaired, *PAIR, beta=0.3, label_smoothing=e), want)
    shuffled = [
        PAIR[0],
        PAIR[1][::-1],
        PAIR[2],
        PAIR[3][::-1],
    ]  # rejected completions of other prompts
    assert_close(run(preference.aot_unpaired, *shuffled, beta=0.3, label_smoothing=e), want)


def test_robust_is_unbiased():
    """Its mean over labels that are flipped with probability ε is DPO's loss on clean ones."""
    flipped = (REJECTED, CHOSEN, REF_REJECTED, REF_CHOSEN)
    right, wrong = (
        run(preference.robust, *x, beta=0.3, label_smoothing=0.2) for x in (PAIR, flipped)
    )
    assert_close(0.8 * right + 0.2 * wrong, run(preference.sigmoid, *PAIR, beta=0.3))


def test_exo_is_least_where_the_policy_agrees_with_the_labels():
    z = math.log(0.8 / 0.2)
    zero = np.zeros(1)
    arrays = (np.array([z]), zero, zero, zero)
    assert_close(run(preference.exo, *arrays, beta=1.0, label_smoothing=0.2), [0.0])
    assert_close(
        gradients(lambda *x: preference.exo(*x, beta=1.0, label_smoothing=0.2), *arrays)[0], [0.0]
    )


def test_at_the_start():
    """Where policy and reference agree."""
    arrays = (CHOSEN, REJECTED, CHOSEN, REJECTED)
    ln2, ones = math.log(2), {"chosen_length": np.ones(N), "rejected_length": np.ones(N)}
    starts = {
        "sigmoid": ln2,
        "aot": ln2,
        "aot_unpaired": ln2,
        "robust": ln2,
        "hinge": 1,
        "apo_zero": 1,
        "apo_down": 1,
    }
    starts |= {
        "nca": 2 * ln2,
        "bco_pair": 2 * ln2,
        "sppo": 50,
        "discopop": (ln2 + 1) / 2,
        "sigmoid_norm": ln2,
        "ipo": 25,
    }
    for name, want in starts.items():
        knobs = ones if name in ("sigmoid_norm", "ipo") else {}
        assert_close(run(getattr(preference, name), *arrays, beta=0.1, **knobs), np.full(N, want))


def test_dpo_raises_chosen_and_lowers_rejected():
    by_chosen, by_rejected, *rest = gradients(lambda *x: preference.sigmoid(*x, beta=0.3), *PAIR)
    want = [0.3 * (1 - logistic(0.3 * (c - r))) for c, r in by_pair()]  # DPO, eq. 7's gradient
    assert_close(by_chosen, np.negative(want))
    assert_close(by_rejected, want)
    assert not any(x.any() for x in rest)


def test_ld_weights():
    other = MASK[::-1]
    for got, mask in zip(
        run(preference.ld_weights, MASK, other, alpha=0.3), (MASK, other), strict=True
    ):
        for row in range(len(MASK)):
            shared, seen = min(MASK[row].sum(), other[row].sum()), 0
            for t in range(MASK.shape[1]):
                seen += mask[row, t]
                assert_close(got[row, t], (1.0 if seen <= shared else 0.3) if mask[row, t] else 0.0)
    assert_close(run(preference.ld_weights, MASK, other, alpha=1.0), (MASK, other))


def test_ld_masks_are_boolean():
    for masks in ((MASK.astype(int), MASK), (MASK, MASK.astype(float))):
        with pytest.raises(TypeError, match="mask must be bool"):
            preference.ld_weights(*masks)


def test_wpo_weights():
    want = []
    for row in range(len(MASK)):
        differences = [
            TOKENS[row, t] - REF_TOKENS[row, t] for t in range(MASK.shape[1]) if MASK[row, t]
        ]
        want.append(math.exp(sum(differences) / len(differences)) if differences else 0.0)
    assert_close(run(preference.wpo_weights, TOKENS, REF_TOKENS, MASK), want)
    uniform = np.full(
        (*MASK.shape, 7), 1 / 7
    )  # every token is as likely as a distribution lets it be
    tokens, squares = np.log(uniform[..., 0]), np.log((uniform**2).sum(-1))
    assert_close(run(preference.wpo_weights, tokens, squares, MASK), MASK.any(-1))


def test_a_divergence_must_keep_the_shape():
    with pytest.raises(ValueError, match=r"divergence \[\] but chosen \[6\]"):
        preference.sigmoid(*PAIR, divergence=jnp.sum)


# ---- without a reference ----------------------------------------------------------------------------------------------


def means(pair=PROBABLE):
    return [
        (c / max(n, 1), r / max(m, 1)) for c, r, n, m in zip(*pair, *LENGTHS.values(), strict=True)
    ]


@pytest.mark.parametrize("e", [0.0, 0.2])
def test_without_a_reference(e):
    want = [smoothed(0.3 * (c - r), e) for c, r in PROBABLE.T]
    for fn in (reference_free.cpo, reference_free.tpo):
        assert_close(run(fn, *PROBABLE, beta=0.3, label_smoothing=e), want)
    want = [smoothed(2.5 * (c - r) - 0.7, e) for c, r in means()]
    knobs = {"beta": 2.5, "gamma": 0.7, "label_smoothing": e}
    for fn in (reference_free.simpo, reference_free.tpo_l):
        assert_close(run(fn, *PROBABLE, *LENGTHS.values(), **knobs), want)
    reward = lambda mean: (1 - math.exp(mean) ** -0.4) / 0.4
    want = [smoothed(2.5 * (reward(c) - reward(r)) - 0.7, e) for c, r in means()]
    assert_close(
        run(reference_free.alphapo, *PROBABLE, *LENGTHS.values(), alpha=0.4, **knobs), want
    )


def test_reference_free_forms_are_those_of_a_uniform_reference():
    uniform = np.full(N, -9.0)
    free = run(reference_free.cpo, CHOSEN, REJECTED, beta=0.3)
    assert_close(free, run(preference.sigmoid, CHOSEN, REJECTED, uniform, uniform, beta=0.3))
    by_token = run(reference_free.simpo, CHOSEN, REJECTED, *LENGTHS.values(), beta=2.5, gamma=0.0)
    zero = np.zeros(N)
    assert_close(
        by_token, run(preference.sigmoid_norm, CHOSEN, REJECTED, zero, zero, beta=2.5, **LENGTHS)
    )


@pytest.mark.parametrize("alpha", [0.0, 1e-7])
def test_alphapo_ends_in_simpo(alpha):
    arrays = (*PROBABLE, *LENGTHS.values())
    got = run(reference_free.alphapo, *arrays, alpha=alpha)
    np.testing.assert_allclose(
        got, run(reference_free.simpo, *arrays), rtol=1e-5 if alpha else 1e-12
    )
    lengths = list(LENGTHS.values())
    got = gradients(lambda *x: reference_free.alphapo(*x, *lengths, alpha=alpha), *PROBABLE)
    want = gradients(lambda *x: reference_free.simpo(*x, *lengths), *PROBABLE)
    np.testing.assert_allclose(got, want, rtol=1e-5 if alpha else 1e-12)


def test_orpo():
    odds = lambda mean: math.exp(mean) / (1 - math.exp(mean))
    want = [0.3 * cost(math.log(odds(c) / odds(r))) for c, r in means()]
    assert_close(run(reference_free.orpo, *PROBABLE, *LENGTHS.values(), beta=0.3), want)


def test_log_odds_of_what_is_nearly_certain():
    improbable = np.array([1e-3, 1e-6, 1e-8])  # -log p, and 1 - p to as many digits
    want = -np.log(improbable) - improbable / 2
    np.testing.assert_allclose(run(reference_free.log_odds, -improbable), want, rtol=1e-7)
    with jax.enable_x64(False):
        np.testing.assert_allclose(
            reference_free.log_odds(jnp.asarray(-improbable)), want, rtol=1e-6
        )
        slope = jax.grad(lambda x: reference_free.log_odds(x).sum())(
            jnp.array([-1e-6, 0.0, 0.5, -90.0])
        )
    np.testing.assert_allclose(slope, [1e6, 0.0, 0.0, 1.0], rtol=1e-5)


# ---- single completions -----------------------------------------------------------------------------------------------


def test_kto():
    want, plain = [], []
    for c, rc, label in zip(CHOSEN, REF_CHOSEN, DESIRABLE, strict=True):
        above = 0.3 * (c - rc - 0.8)
        want.append(1.3 * (1 - logistic(above)) if label else 0.7 * (1 - logistic(-above)))
        x = 0.3 * (c - rc)
        plain.append(1.3 * (1 - logistic(x)) if label else 0.7 * logistic(x))
    knobs = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    assert_close(run(unpaired.kto, CHOSEN, REF_CHOSEN, DESIRABLE, np.array(0.8), **knobs), want)
    assert_close(run(unpaired.apo_zero, CHOSEN, REF_CHOSEN, DESIRABLE, **knobs), plain)


def test_unpaired_apo_is_the_paired_one_in_two():
    on_chosen = run(unpaired.apo_zero, CHOSEN, REF_CHOSEN, np.ones(N, bool), beta=0.3)
    on_rejected = run(unpaired.apo_zero, REJECTED, REF_REJECTED, np.zeros(N, bool), beta=0.3)
    assert_close(on_chosen + on_rejected, run(preference.apo_zero, *PAIR, beta=0.3))


def test_kto_kl():
    difference = [c - rc for c, rc in zip(CHOSEN, REF_CHOSEN, strict=True)]
    if sum(difference) < 0:
        difference = [-x for x in difference]
    difference = np.array(difference)
    zero = np.zeros(N)
    assert_close(run(unpaired.kto_kl, difference, zero), sum(difference) / N)
    assert run(unpaired.kto_kl, -difference, zero) == 0.0
    assert not np.any(gradients(unpaired.kto_kl, difference, zero))
    counted = difference[DESIRABLE]
    assert_close(
        run(unpaired.kto_kl, difference, zero, DESIRABLE), max(0.0, sum(counted) / len(counted))
    )


def test_bco():
    want = []
    for c, rc, label in zip(CHOSEN, REF_CHOSEN, DESIRABLE, strict=True):
        probability = logistic(0.3 * (c - rc) - 0.4)
        want.append(-math.log(probability if label else 1 - probability))
    assert_close(run(unpaired.bco, CHOSEN, REF_CHOSEN, DESIRABLE, np.array(0.4), beta=0.3), want)
    shift = np.array(0.0)
    on_chosen = run(unpaired.bco, CHOSEN, REF_CHOSEN, np.ones(N, bool), shift, beta=0.3)
    on_rejected = run(unpaired.bco, REJECTED, REF_REJECTED, np.zeros(N, bool), shift, beta=0.3)
    assert_close(on_chosen + on_rejected, run(preference.bco_pair, *PAIR, beta=0.3))


def test_density_ratio():
    p = np.array([0.0, 0.2, 0.6, 0.6, 0.95, 1.0])
    want = [
        1.0 if label else min(max(x / (1 - x), 0.5) if x < 1 else 3.0, 3.0)
        for x, label in zip(p, DESIRABLE, strict=True)
    ]
    got = run(unpaired.density_ratio, p, DESIRABLE, min_ratio=0.5, max_ratio=3.0)
    np.testing.assert_allclose(got, want, rtol=1e-7)  # 1e-8 is added to the divisor


@pytest.mark.parametrize("labels", [DESIRABLE.astype(int), DESIRABLE.astype(float)])
def test_labels_are_boolean(labels):
    for fn in (
        lambda: unpaired.apo_zero(CHOSEN, REF_CHOSEN, labels),
        lambda: unpaired.density_ratio(CHOSEN, labels),
    ):
        with pytest.raises(TypeError, match=f"desirable must be bool.*{labels.dtype.name[:3]}"):
            fn()


# ---- online -----------------------------------------------------------------------------------------------------------


def test_pairs_by_score():
    nan = math.nan
    scores = np.array([
        [0.1, 2.0, -1.0, 2.0], [1.0, 1.0, 1.0, 1.0], [nan, 0.5, 0.7, nan], [nan, nan, 3.0, nan], [nan] * 4,
        [-1.0, -9.0, -9.0, -1.0], [-3.0, nan, -2.0, nan],
    ])  # fmt: skip
    chosen, rejected, margin = run(online.pairs_by_score, scores)
    assert chosen.tolist()[:3] + chosen.tolist()[5:] == [1, 0, 2, 0, 2]
    assert rejected.tolist()[:3] + rejected.tolist()[5:] == [2, 3, 1, 2, 0]
    assert_close(margin, [3.0, 0.0, 0.2, 0.0, 0.0, 8.0, 1.0])
    two, best = RNG.normal(size=(9, 2)), RNG.normal(size=9)
    chosen, rejected, margin = run(online.pairs_by_score, two)
    assert (chosen == (two[:, 1] > two[:, 0])).all()
    assert (rejected == 1 - chosen).all()
    assert_close(margin, np.abs(two[:, 0] - two[:, 1]))
    assert run(online.pairs_by_score, np.stack([best, best], axis=1))[0].tolist() == [0] * 9


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_pairs_need_two(shape):
    with pytest.raises(ValueError, match=r"scores must be \[P, G\] with G of at least 2"):
        online.pairs_by_score(np.zeros(shape))


def test_xpo():
    sampled = np.where(
        DESIRABLE, REJECTED, CHOSEN
    )  # the policy's sample is the better one where True
    want = [cost(0.3 * (c - r)) + 0.2 * lp for (c, r), lp in zip(by_pair(), sampled, strict=True)]
    static = {"loss": functools.partial(preference.sigmoid, beta=0.3)}
    assert_close(
        run(online.xpo, *PAIR, from_reference=sampled, static=static.items(), alpha=0.2), want
    )
    by_sampled = jax.grad(lambda x: online.xpo(*PAIR, from_reference=x, alpha=0.2).sum())(
        jnp.asarray(sampled)
    )
    np.testing.assert_allclose(by_sampled, np.full(N, 0.2), rtol=1e-6)
    with pytest.raises(ValueError, match=r"loss \[\] but chosen \[6\]"):
        online.xpo(*PAIR, from_reference=sampled, loss=lambda *x: jnp.zeros(()))


def test_nash_md():
    preferred = np.array([0.9, 0.2, 0.5, 0.7])
    value, slope = np.zeros(MASK.shape), np.zeros(MASK.shape)
    for row, t in zip(*np.nonzero(MASK), strict=True):
        slope[row, t] = 0.3 * (TOKENS[row, t] - REF_TOKENS[row, t]) - (preferred[row] - 0.5)
        value[row, t] = slope[row, t] * TOKENS[row, t]
    assert_close(
        run(online.nash_md, TOKENS, REF_TOKENS, MASK, preferred=preferred, beta=0.3), value
    )
    got = gradients(
        lambda *x: online.nash_md(*x, MASK, preferred=preferred, beta=0.3), TOKENS, REF_TOKENS
    )
    assert_close(got, (slope, np.zeros(MASK.shape)))


def test_nash_md_descends_the_regularised_game():
    """Over all completions of one token: the gradient of `β KL(π | ref) - E_π[P]`."""
    logits, ref_logits = RNG.normal(size=(2, 7))
    preferred, mask = RNG.random(7), np.ones((7, 1), bool)

    def game(logits):
        logprobs, reference = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
        return jnp.sum(jnp.exp(logprobs) * (0.3 * (logprobs - reference) - preferred))

    def surrogate(logits):
        logprobs, reference = (
            jax.nn.log_softmax(logits)[:, None],
            jax.nn.log_softmax(ref_logits)[:, None],
        )
        per_token = online.nash_md(logprobs, reference, mask, preferred=preferred, beta=0.3)
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logprobs)) * per_token)

    assert_close(gradients(surrogate, logits), gradients(game, logits))


# ---- all of them ------------------------------------------------------------------------------------------------------

MODULES = {
    module.__name__.split(".")[-1]: module
    for module in (divergence, online, preference, reference_free, unpaired)
}
STOPPED = {"online.nash_md"}  # the gradient is not that of the value: it has its own tests
DIFFERENTIABLE = [name for name, case in CASES.items() if case.flow and name not in STOPPED]


@functools.cache
def differentiated(name):
    """Jitted `(flowing, rest, knobs) -> ((a weighted sum, the outputs), its gradient)`."""
    module, fn = name.split(".")
    fn = CASES[name].fn or getattr(MODULES[module], fn)

    def total(flowing, rest, knobs):
        out = fn(**flowing, **rest, **knobs)
        return sum(
            (x * (2 + jnp.cos(jnp.arange(x.size).reshape(x.shape)))).sum()
            for x in jax.tree.leaves(out)
        ), out

    return jit(jax.value_and_grad(total, has_aux=True))


def arrays_of(name, dtype, scale=1.0):
    """What gradients flow through, and the rest."""
    arrays = CASES[name].inputs(np.random.default_rng(0))
    arrays = {
        key: (scale * x).astype(dtype) if x.dtype == np.float64 else x for key, x in arrays.items()
    }
    return {key: arrays[key] for key in CASES[name].flow}, {
        key: x for key, x in arrays.items() if key not in CASES[name].flow
    }


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_finite_differences(name):
    flowing, rest = arrays_of(name, np.float64)
    with jax.enable_x64(True):
        gradient = differentiated(name)(flowing, rest, CASES[name].knobs)[1]
        for key in flowing:
            direction, step = np.random.default_rng(1).normal(size=flowing[key].shape), 1e-6
            ends = [flowing | {key: flowing[key] + sign * step * direction} for sign in (1, -1)]
            up, down = (differentiated(name)(x, rest, CASES[name].knobs)[0][0] for x in ends)
            np.testing.assert_allclose(
                np.vdot(gradient[key], direction), (up - down) / (2 * step), rtol=1e-6, atol=1e-8
            )


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.flow])
@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_extremes_are_finite(name, scale):
    """In single precision: each array's entries of either sign, or all 0."""
    flowing, rest = arrays_of(name, np.float32, scale)
    (_, out), gradient = differentiated(name)(flowing, rest, CASES[name].knobs)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, gradient)))


@pytest.mark.parametrize("score", [divergence.forward_kl, divergence.js, divergence.alpha])
def test_extreme_scores_are_finite(score):
    pair = (
        np.float32(1e4) * np.array([[1, 1, -1, -1, 0, 0], [1, -1, 1, -1, 1, -1], [0] * 6, [0] * 6])
    ).astype(np.float32)

    def total(pair):
        more = {name: LENGTHS for name in ("sigmoid_norm", "ipo")}
        fns = ("sigmoid", "hinge", "exo", "robust", "discopop", "sigmoid_norm", "ipo")
        out = {
            name: getattr(preference, name)(*pair, divergence=score, **more.get(name, {}))
            for name in fns
        }
        return sum(x.sum() for x in out.values()), out

    (_, out), gradient = jit(jax.value_and_grad(total, has_aux=True))(pair)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((out, gradient)))
