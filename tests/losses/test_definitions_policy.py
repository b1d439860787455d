"""Groups, masks, importance weights, sequence surrogates, controllers and presets against slow definitions, in float64."""

import functools
import math
import statistics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import assert_close, run

from rlhf import losses
from rlhf.losses import (
    advantages,
    controllers,
    covariance,
    groups,
    importance,
    kl,
    masks,
    metrics,
    moments,
    policy,
    presets,
    ratios,
    value,
    weights,
)
from rlhf.training import policy_gradient

RNG = np.random.default_rng(0)
IDS = np.array(
    [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1], [1, 2, 2, 2, 3, 3], [0, 0, 0, 0, 0, 0]], np.int32
)
MASK = (RNG.random(IDS.shape) < 0.7) & (IDS > 0)
MASK[0, 3:5], MASK[1, 2:4], MASK[2, 4:] = (
    True,
    (True, False),
    False,
)  # the third sequence of row 2 has no trained token
OLD = -RNG.uniform(0.5, 3, IDS.shape)
NEW = OLD + 0.4 * RNG.normal(size=IDS.shape)
ADVANTAGES = RNG.normal(size=IDS.shape)


def sequences(mask=MASK, ids=IDS):
    """`(row, columns of its trained tokens)` of every sequence that has any."""
    for row in range(len(ids)):
        for segment in range(1, 4):
            columns = [t for t in range(ids.shape[1]) if ids[row, t] == segment and mask[row, t]]
            if columns:
                yield row, columns


# ---- groups ---------------------------------------------------------------------------------------------------------

REWARDS = np.array(
    [
        [1.0, 0.0, 0.5, 2.0],
        [3.0, 3.0, 3.0, 3.0],
        [np.nan, 1.0, np.nan, np.nan],
        [0.0, np.nan, 1.0, 5.0],
        [np.nan] * 4,
        [0.0] * 4,
    ]
)


def by_group(definition):
    """`definition(reward, the group's scored rewards, the others')` of every sample that is not alone; 0 for the rest."""
    out = np.zeros(REWARDS.shape)
    for p, row in enumerate(REWARDS):
        scored = [r for r in row if not math.isnan(r)]
        for g, r in enumerate(row):
            if not math.isnan(r) and len(scored) > 1:
                others = [x for h, x in enumerate(row) if h != g and not math.isnan(x)]
                out[p, g] = definition(r, scored, others)
    return out


def over(x, spread, eps):
    return x / (spread + eps) if spread > 0 else x


mean = statistics.fmean
ALL = [r for r in REWARDS.flat if not math.isnan(r)]
GROUPS = {
    "group_relative": lambda r, group, others: over(r - mean(group), statistics.stdev(group), 1e-4),
    "dr_grpo": lambda r, group, others: r - mean(group),
    "lite_ppo": lambda r, group, others: over(r - mean(group), statistics.stdev(ALL), 1e-4),
    "rloo": lambda r, group, others: r - mean(others),
    "leave_one_out": lambda r, group, others: over(
        r - mean(others), statistics.stdev(others) if len(others) > 1 else 0.0, 1e-6
    ),
    "max_rl": lambda r, group, others: over(r - mean(group), mean(group), 1e-4),
    "gpg": lambda r, group, others: len(ALL) / sum(x != 0 for x in ALL) * (r - mean(group)),
    "pass_at_k": lambda r, group, others: max(r - max(others), 0.0),
}


@pytest.mark.parametrize("name", GROUPS)
def test_group_advantages(name):
    assert_close(run(getattr(groups, name), REWARDS), by_group(GROUPS[name]))


def test_group_statistics_of_other_kinds():
    population = functools.partial(groups.group_std, correction=0)
    want = by_group(lambda r, group, others: over(r - mean(group), statistics.pstdev(group), 1e-8))
    assert_close(
        run(functools.partial(groups.group_relative, std=population), REWARDS, eps=1e-8), want
    )
    scale_only = functools.partial(groups.group_relative, mean=None, std=groups.group_std)
    assert_close(
        run(scale_only, REWARDS),
        by_group(lambda r, group, others: over(r, statistics.stdev(group), 1e-4)),
    )
    best = functools.partial(groups.pass_at_k, std=groups.group_std)
    want = by_group(
        lambda r, group, others: over(max(r - max(others), 0.0), statistics.stdev(group), 1e-4)
    )
    assert_close(run(best, REWARDS), want)


def test_rloo_is_a_scaled_dr_grpo():
    assert_close(run(groups.rloo, REWARDS[:1]), 4 / 3 * run(groups.dr_grpo, REWARDS[:1]))


def test_opo_weighs_the_baseline_by_length():
    lengths = RNG.integers(1, 9, REWARDS.shape).astype(float)
    want = np.zeros(REWARDS.shape)
    for p, row in enumerate(REWARDS):
        scored = [g for g in range(4) if not math.isnan(row[g])]
        for g in scored if len(scored) > 1 else ():
            want[p, g] = row[g] - sum(lengths[p, h] * row[h] for h in scored) / sum(
                lengths[p, h] for h in scored
            )
    assert_close(run(groups.opo, REWARDS, lengths), want)


def test_several_rewards():
    three, of = np.stack([REWARDS, REWARDS[::-1], 0 * REWARDS + 1], -1), np.array([1.0, 0.5, 2.0])
    want = np.nansum(three * of, -1)
    want[np.isnan(three).all(-1)] = np.nan
    np.testing.assert_allclose(run(groups.weighted_rewards, three, of), want)
    each = [run(groups.group_relative, three[..., k]) for k in range(3)]
    each = [np.where(np.isnan(three[..., k]), np.nan, each[k]) for k in range(3)]
    total = np.nansum(np.stack(each, -1) * of, -1)
    scored = ~np.isnan(three).all(-1)
    want = np.where(
        scored, (total - total[scored].mean()) / (total[scored].std(ddof=1) + 1e-4), 0.0
    )
    assert_close(run(groups.gdpo, three, of), want)
    with pytest.raises(ValueError, match=r"rewards \[6, 4, 3\] but weights \[2\]"):
        groups.weighted_rewards(jnp.asarray(three), jnp.ones(2))
    with pytest.raises(ValueError, match=r"\[P, G, K\].* \[6, 4\]"):
        groups.gdpo(jnp.asarray(REWARDS), jnp.ones(4))


def test_groups_must_divide_the_batch():
    with pytest.raises(
        ValueError, match="groups of 3 samples but a batch of 8: the group size must divide it"
    ):
        groups.split(jnp.ones(8), size=3)


def test_optimal_token_baseline():
    rewards, squares = RNG.normal(size=(4, 3)), np.log(RNG.uniform(0.1, 0.9, (4, 3)))
    lp, rho = -RNG.uniform(0.1, 2, (4, 3)), RNG.uniform(0.5, 1.5, (4, 3))
    mask = np.array([[1, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 0]], bool)
    path, togo, want = np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    for i, t in zip(*np.nonzero(mask), strict=True):
        energy = [
            rho[i, u] ** 2 * (1 - 2 * math.exp(lp[i, u]) + math.exp(squares[i, u]))
            for u in range(t + 1)
        ]
        path[i, t], togo[i, t] = sum(energy), rewards[i, t:][mask[i, t:]].sum()
    for i, t in zip(*np.nonzero(mask), strict=True):
        siblings = [j for j in (0, 1, 2, 3) if j // 2 == i // 2 and mask[j, t]]
        baseline = sum(path[j, t] * togo[j, t] for j in siblings) / (
            sum(path[j, t] for j in siblings) + 1e-8
        )
        want[i, t] = togo[i, t] - baseline
    got = run(
        groups.optimal_token_baseline,
        rewards,
        lp,
        squares,
        mask,
        importance=rho,
        static={"num_samples": 2}.items(),
    )
    assert_close(got, want)


# ---- returns --------------------------------------------------------------------------------------------------------


def test_returns_pass_over_gaps():
    rewards, want = RNG.normal(size=IDS.shape), np.zeros(IDS.shape)
    for row, columns in sequences():
        for i, t in enumerate(columns):
            want[row, t] = sum(0.9**k * rewards[row, u] for k, u in enumerate(columns[i:]))
    assert_close(
        run(
            advantages.returns, rewards, MASK, segment_ids=IDS, bootstrap=np.zeros(12), discount=0.9
        ),
        want,
    )
    assert_close(
        run(advantages.returns, rewards, MASK, discount=0.9, segment_ids=np.where(IDS > 0, IDS, 9)),
        want,
    )
    greedy = RNG.normal(size=12)
    spread = np.zeros(IDS.shape)
    for row, columns in sequences():
        spread[row, columns] = greedy[row * 3 + IDS[row, columns[0]] - 1]
    undiscounted = run(advantages.returns, rewards, MASK, segment_ids=IDS, bootstrap=np.zeros(12))
    assert_close(
        run(advantages.remax, rewards, greedy, MASK, segment_ids=IDS), undiscounted - spread
    )


def test_length_adaptive_lam_and_decoupled_gae():
    want = np.zeros(IDS.shape)
    for row, columns in sequences():
        want[row, columns] = min(max(1 - 1 / (0.4 * len(columns)), 0), 1)
    lam = run(advantages.length_adaptive_lam, MASK, IDS, alpha=0.4)
    assert_close(lam, want)
    rewards, values = RNG.normal(size=(2, *IDS.shape))
    both = run(
        advantages.decoupled_gae,
        rewards,
        values,
        MASK,
        bootstrap=np.zeros(12),
        segment_ids=IDS,
        policy_lam=lam,
        value_lam=0.3,
    )
    for row, columns in sequences():
        following = [*values[row, columns[1:]], 0.0]
        deltas = [
            rewards[row, t] + v - values[row, t] for t, v in zip(columns, following, strict=True)
        ]
        for i, t in enumerate(columns):
            rest = range(len(columns) - i)
            np.testing.assert_allclose(
                both[0][row, t], sum(lam[row, t] ** k * deltas[i + k] for k in rest), atol=1e-10
            )
            np.testing.assert_allclose(
                both[1][row, t],
                values[row, t] + sum(0.3**k * deltas[i + k] for k in rest),
                atol=1e-10,
            )


# ---- sequences' ratios and surrogates -------------------------------------------------------------------------------


def test_ratios_of_sequences():
    means, products = np.zeros(IDS.shape), np.zeros(IDS.shape)
    for row, columns in sequences():
        differences = [NEW[row, t] - OLD[row, t] for t in columns]
        means[row, columns], products[row, columns] = mean(differences), sum(differences)
    assert_close(run(ratios.sequence_log_ratio, NEW, OLD, MASK, IDS), means)
    assert_close(run(ratios.sequence_token_log_ratio, NEW, OLD, MASK, IDS), means)
    assert_close(run(ratios.product_log_ratio, NEW, OLD, MASK, IDS), products)
    assert_close(run(ratios.product_log_ratio, NEW + 30, OLD, MASK, IDS), 20.0 * MASK)


def test_surrogates_of_packed_sequences():
    gspo, gmpo, topr, vespo, sizes = (np.zeros(IDS.shape) for _ in range(5))
    joined, given = (
        0.3 * RNG.normal(size=IDS.shape),
        np.where(np.arange(IDS.shape[1]) % 3 == 1, 0.0, ADVANTAGES),
    )
    for row, columns in sequences():
        x, a = [NEW[row, t] - OLD[row, t] for t in columns], [given[row, t] for t in columns]
        bounds = lambda d, b: min(d, 0.2) if b > 0 else max(d, -0.3) if b < 0 else 0.0
        s, bounded = math.exp(mean(x)), list(map(bounds, x, a))
        product, weight = math.exp(sum(x)), math.exp(sum(x) + sum(joined[row, t] for t in columns))
        for t, b in zip(columns, a, strict=True):
            sizes[row, t] = len(columns)
            gspo[row, t] = -min(s * b, min(max(s, 0.9), 1.1) * b)
            gmpo[row, t] = -mean(a) * math.exp(mean(bounded))
            topr[row, t] = -(1.0 if b >= 0 else min(product, 1.0)) * b * NEW[row, t]
            k, lam = (2, 3) if b >= 0 else (3, 2)
            vespo[row, t] = -(weight**k) * math.exp(lam * (1 - weight)) * b * NEW[row, t]
    arrays = NEW, OLD, given, MASK
    assert_close(run(policy.gspo, *arrays, segment_ids=IDS, clip_low=0.1, clip_high=0.1), gspo)
    assert_close(
        run(policy.gspo_token, *arrays, segment_ids=IDS, clip_low=0.1, clip_high=0.1), gspo
    )
    assert_close(
        run(policy.luspo, *arrays, segment_ids=IDS, clip_low=0.1, clip_high=0.1), sizes * gspo
    )
    assert_close(run(policy.gmpo, *arrays, segment_ids=IDS, clip_low=0.3, clip_high=0.2), gmpo)
    assert_close(run(policy.topr, *arrays, segment_ids=IDS), topr)
    assert_close(run(policy.vespo, *arrays, segment_ids=IDS, log_importance=joined), vespo)
    by_length = run(weights.sequence_sum, MASK, IDS)
    by_mean = run(weights.sequence_mean, MASK, IDS)
    np.testing.assert_allclose((sizes * gspo * by_mean).sum(), (gspo * by_length).sum(), rtol=1e-10)


def test_binary_divergences():
    p, q = np.exp(NEW), np.exp(OLD)
    p = np.minimum(p, 0.99)
    assert_close(run(kl.binary_tv, np.log(p), OLD, MASK), np.where(MASK, abs(p - q), 0))
    expected = q * np.log(q / p) + (1 - q) * np.log((1 - q) / (1 - p))
    np.testing.assert_allclose(
        run(kl.binary_kl, np.log(p), OLD, MASK), np.where(MASK, expected, 0), atol=1e-12
    )


def test_kl_cov_penalises_the_largest_covariance():
    flat = np.flatnonzero(MASK)
    centred = lambda x: x.flat[flat] - x.flat[flat].mean()
    cov = centred(ADVANTAGES) * centred(NEW)
    x = (NEW - OLD).flat[flat]
    pays = np.argsort(-cov)[: int(0.3 * len(flat))]
    want = np.zeros(IDS.shape)
    want.flat[flat] = -np.exp(x) * ADVANTAGES.flat[flat]
    want.flat[flat[pays]] += 0.5 * abs(x[pays])
    assert_close(run(covariance.kl_cov, NEW, OLD, ADVANTAGES, MASK, share=0.3, kl_coef=0.5), want)


def test_clip_cov_is_the_clipped_surrogate_but_for_what_it_drops():
    knobs = dict(clip_low=0.1, clip_high=0.4)
    ours = run(
        covariance.clip_cov,
        NEW,
        OLD,
        ADVANTAGES,
        MASK,
        key=jax.random.key(0),
        share=0.2,
        cov_low=0.0,
        **knobs,
    )
    whole = run(policy.clipped_surrogate, NEW, OLD, ADVANTAGES, MASK, **knobs)
    kept = ours != 0
    assert_close(ours[kept], whole[kept])
    assert 0 < (whole != 0).sum() - kept.sum() <= int(0.2 * MASK.sum())
    ratio = np.exp(NEW - OLD)[kept]
    assert (ratio > 1.4).any(), "the upper bound shows"
    assert (ratio < 0.9).any(), "the lower bound shows"


# ---- masks ----------------------------------------------------------------------------------------------------------


def test_finished_only():
    finished = RNG.random(12) < 0.5
    want = np.zeros(IDS.shape, bool)
    for row, columns in sequences():
        want[row, columns] = finished[row * 3 + IDS[row, columns[0]] - 1]
    np.testing.assert_array_equal(run(masks.finished_only, MASK, finished, IDS), want)


def test_on_policy_enough():
    want = np.zeros(IDS.shape, bool)
    for row, columns in sequences():
        drift = mean([OLD[row, t] - NEW[row, t] for t in columns])
        for t in columns:
            want[row, t] = ADVANTAGES[row, t] >= 0 or drift <= 0.05
    got = run(masks.on_policy_enough, NEW, OLD, ADVANTAGES, MASK, threshold=0.05, segment_ids=IDS)
    np.testing.assert_array_equal(got, want)
    assert 0 < want.sum() < MASK.sum()


@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_top_entropy(share):
    entropy = RNG.uniform(0, 3, IDS.shape)
    want = MASK & (entropy >= np.quantile(entropy[MASK], 1 - share))
    np.testing.assert_array_equal(run(masks.top_entropy, entropy, MASK, share=share), want)


@pytest.mark.parametrize("threshold", [0.001, 0.02, 0.1, 9.0])
def test_second_moment(threshold):
    squares = sorted(((NEW - OLD) ** 2)[MASK])
    kept = max(n for n in range(len(squares) + 1) if n == 0 or mean(squares[:n]) <= threshold)
    got = run(masks.second_moment, NEW, OLD, MASK, threshold=threshold)
    assert got.sum() == kept
    assert sorted(((NEW - OLD) ** 2)[got]) == squares[:kept]


@pytest.mark.parametrize(
    "pool", [None, losses.segments.total, losses.segments.mean, losses.segments.largest]
)
def test_within(pool):
    of = {
        None: None,
        losses.segments.total: sum,
        losses.segments.mean: mean,
        losses.segments.largest: max,
    }[pool]
    want = np.zeros(IDS.shape, bool)
    for row, columns in sequences():
        for t in columns:
            statistic = (
                ADVANTAGES[row, t] if of is None else of([ADVANTAGES[row, u] for u in columns])
            )
            want[row, t] = -0.5 <= statistic <= 0.7
    fn = functools.partial(masks.within, pool=pool)
    np.testing.assert_array_equal(
        run(fn, ADVANTAGES, MASK, low=-0.5, high=0.7, segment_ids=IDS), want
    )


def test_the_largest_and_the_first_of_equals():
    assert run(
        masks.top, np.array([1.0, 2.0, 2.0, 2.0]), np.array([1, 1, 1, 1], bool), number=2
    ).tolist() == [0, 1, 1, 0]


# ---- importance, weights, metrics -----------------------------------------------------------------------------------


def test_importance_weights():
    rho = np.where(MASK, np.exp(NEW - OLD), 0)
    assert_close(run(importance.weights, NEW, OLD, MASK), rho)
    missing = np.where(np.arange(6) == 1, np.nan, OLD)
    assert_close(
        run(importance.weights, NEW, missing, MASK), np.where((np.arange(6) == 1) & MASK, 1, rho)
    )
    assert_close(
        run(importance.truncated, rho, max_weight=1.2, min_weight=0.8),
        np.minimum(np.maximum(rho, 0.8), 1.2),
    )
    band = (rho >= 0.8) & (rho <= 1.2)
    assert_close(
        run(importance.masked, rho, max_weight=1.2, min_weight=0.8), np.where(band, rho, 0)
    )
    assert_close(
        run(importance.icepop, NEW, OLD, MASK, max_weight=1.2, min_weight=0.8),
        np.where(band, rho, 0),
    )
    kept = rho[MASK]
    assert_close(run(importance.batch_normalized, rho, MASK), np.where(MASK, rho / kept.mean(), 0))
    assert_close(
        run(importance.effective_sample_size, rho, MASK),
        kept.sum() ** 2 / (len(kept) * (kept**2).sum()),
    )
    assert float(run(importance.effective_sample_size, jnp.zeros_like(rho), MASK)) == 0


def test_mismatch():
    d = NEW - OLD
    of = [[d[row, t] for t in columns] for row, columns in sequences()]
    want = {
        "kl": mean([-x for s in of for x in s]),
        "k3": mean([math.exp(x) - 1 - x for s in of for x in s]),
        "perplexity_ratio": mean([math.exp(-mean(s)) for s in of]),
        "chi2_token": mean([math.exp(2 * x) for s in of for x in s]) - 1,
        "chi2_sequence": mean([math.exp(2 * sum(s)) for s in of]) - 1,
        "max_difference": max(abs(x) for s in of for x in s),
    }
    got = run(importance.mismatch, NEW, OLD, MASK, segment_ids=IDS)
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-10, err_msg=name)


def test_prompt_mean():
    prompts = np.array([0, 5, 0, 7, 7, 7, 5, 0, 0, 1, 1, 1])  # of every sequence
    tokens = {}
    for row, columns in sequences():
        tokens.setdefault(prompts[row * 3 + IDS[row, columns[0]] - 1], []).extend(
            (row, t) for t in columns
        )
    want = np.zeros(IDS.shape)
    for places in tokens.values():
        for place in places:
            want[place] = 1 / (len(tokens) * len(places))
    assert_close(run(weights.prompt_mean, MASK, IDS, prompt_ids=prompts), want)


def test_metrics_of_a_policy():
    weight = run(weights.token_mean, MASK)
    r = np.exp(NEW - OLD)
    want = {
        "clip_low": (weight * ((r < 0.8) & (ADVANTAGES < 0))).sum(),
        "clip_high": (weight * ((r > 1.3) & (ADVANTAGES > 0))).sum(),
        "approx_kl": (weight * (OLD - NEW)).sum(),
        "ratio": (weight * r).sum(),
        "entropy": (weight * -OLD).sum(),
    }
    knobs = dict(weights=weight, entropy=-OLD, clip_low=0.2, clip_high=0.3)
    got = run(metrics.of_policy, NEW, OLD, ADVANTAGES, MASK, **knobs)
    for name, x in want.items():
        np.testing.assert_allclose(got[name], x, rtol=1e-10, err_msg=name)
    assert 0 < want["clip_low"] < 1
    assert 0 < want["clip_high"] < 1


def test_metrics_of_pairs():
    got = run(
        metrics.of_pairs,
        np.array([1.0, 2.0, 3.0]),
        np.array([0.0, 2.0, 5.0]),
        weights=np.full(3, 1 / 3),
    )
    assert_close(
        [got[name] for name in ("chosen", "rejected", "margin", "accuracy")],
        [2.0, 7 / 3, -1 / 3, 1 / 3],
    )


def test_values():
    error = NEW - OLD
    huber = np.where(abs(error) < 0.3, error**2 / 2, 0.3 * abs(error) - 0.045)
    assert_close(run(value.huber_value_loss, NEW, OLD, MASK, delta=0.3), np.where(MASK, huber, 0))
    explained = 1 - np.var(error[MASK]) / np.var(OLD[MASK])
    assert_close(run(value.explained_variance, NEW, OLD, MASK), explained)
    assert run(value.explained_variance, NEW, 0 * OLD, MASK) == 0


# ---- states ---------------------------------------------------------------------------------------------------------


def test_running_moments_are_those_of_everything_seen():
    running = moments.running()
    batches = [RNG.normal(size=n) + n for n in (1, 5, 3)]
    batches[1][2] = np.nan

    def seen(*batches):
        state = running.init()
        for batch in batches:
            state = running.update(state, batch)
        return tuple(state)

    finite = [x for batch in batches for x in batch if math.isfinite(x)]
    assert_close(run(seen, *batches), [len(finite), mean(finite), statistics.variance(finite)])
    assert_close(run(seen, batches[0]), [1, batches[0][0], 1.0])


def test_adaptive_kl_goes_the_right_way():
    controller = controllers.adaptive_kl(target=2.0, horizon=100, init_coef=0.1)
    update = lambda observed: controller.update(controller.init(), observed, 50).coef
    for observed, factor in ((9.0, 1.1), (2.2, 1.05), (2.0, 1.0), (0.0, 0.9)):
        np.testing.assert_allclose(update(observed), 0.1 * factor, rtol=1e-6)
    assert jax.grad(update)(2.2) == 0.0


def test_adaptive_entropy_pushes_only_below_the_target():
    controller = controllers.adaptive_entropy(target=1.0, delta=0.1, max_coef=0.15, init_coef=0.05)
    state, seen = controller.init(), []
    for entropy in (0.5, 0.5, 1.5, 1.5, 1.5, 1.0):
        state = controller.update(state, entropy)
        seen.append((round(float(state.coef), 6), round(float(state.pushed), 6)))
    assert seen == [(0.15, 0.15), (0.15, 0.15), (0.05, 0.0), (0.0, 0.0), (0.0, 0.0), (0.1, 0.1)]


def test_fixed_stays():
    controller = controllers.fixed(0.3)
    assert controller.update(controller.init(), 99.0) == controller.init()


# ---- presets --------------------------------------------------------------------------------------------------------

WHOLE = np.array([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], bool)
LP, BEFORE = np.log(RNG.uniform(0.2, 0.9, (2, 4, 3)))
BEFORE[1] = LP[1] + 0.5  # beyond the lower bounds, where the advantage is negative
SCORES = np.array([[1.0, 0.0], [0.5, np.nan]])
TWO: dict[str, Any] = {"clip_low": 0.1, "clip_high": 0.2}
CLIPPED = functools.partial(policy.clipped_surrogate, **TWO)
SEQUENCE = functools.partial(CLIPPED, log_ratio=ratios.sequence_log_ratio)
PRESETS = {  # the preset, and its three parts written out
    "grpo": (presets.grpo(**TWO), groups.group_relative, CLIPPED, weights.sequence_mean),
    "dapo": (presets.dapo(**TWO), groups.group_relative, CLIPPED, weights.token_mean),
    "dr_grpo": (
        presets.dr_grpo(length=5, **TWO),
        groups.dr_grpo,
        CLIPPED,
        functools.partial(weights.constant, length=5),
    ),
    "lite_ppo": (presets.lite_ppo(**TWO), groups.lite_ppo, CLIPPED, weights.token_mean),
    "max_rl": (presets.max_rl(**TWO), groups.max_rl, CLIPPED, weights.token_mean),
    "gspo": (presets.gspo(**TWO), groups.group_relative, SEQUENCE, weights.sequence_mean),
    "luspo": (
        presets.luspo(**TWO),
        groups.group_relative,
        functools.partial(policy.luspo, **TWO),
        weights.sequence_mean,
    ),
    "gmpo": (
        presets.gmpo(**TWO),
        groups.group_relative,
        functools.partial(policy.gmpo, **TWO),
        weights.sequence_mean,
    ),
    "cispo": (
        presets.cispo(max_ratio=1.2),
        groups.group_relative,
        functools.partial(policy.cispo, max_ratio=1.2),
        weights.token_mean,
    ),
    "sapo": (presets.sapo(), groups.group_relative, policy.sapo, weights.sequence_mean),
    "vespo": (presets.vespo(), groups.group_relative, policy.vespo, weights.token_mean),
    "dppo": (presets.dppo(), groups.dr_grpo, policy.dppo, weights.token_mean),
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset(name):
    preset, group, loss, weight = PRESETS[name]
    spread = run(group, SCORES).reshape(4, 1) * WHOLE
    assert_close(run(preset.advantages, SCORES, WHOLE), spread)
    assert_close(run(preset.loss, LP, BEFORE, spread, WHOLE), run(loss, LP, BEFORE, spread, WHOLE))
    assert_close(run(preset.weights, WHOLE), run(weight, WHOLE))
    # Packed: the same numbers, two sequences a row.
    packed = lambda x: x.reshape(2, 6)
    ids = packed(np.repeat([[1], [2], [1], [2]], 3, axis=1))
    assert_close(run(preset.advantages, SCORES, packed(WHOLE), segment_ids=ids), packed(spread))
    got = run(
        preset.loss, packed(LP), packed(BEFORE), packed(spread), packed(WHOLE), segment_ids=ids
    )
    assert_close(got, packed(run(loss, LP, BEFORE, spread, WHOLE)))
    assert_close(run(preset.weights, packed(WHOLE), segment_ids=ids), packed(run(weight, WHOLE)))


def test_presets_with_the_kl_in_the_reward():
    penalties = 0.1 * RNG.uniform(size=WHOLE.shape)
    paid = np.array([[1.0, 0.0], [0.5, 0.3]])
    net = paid - (penalties * WHOLE).sum(-1).reshape(2, 2)
    assert_close(
        run(presets.rloo().advantages, paid, WHOLE, penalties),
        (net - net[:, ::-1]).reshape(4, 1) * WHOLE,
    )
    got = run(presets.rloo(**TWO).loss, LP, BEFORE, WHOLE * 1.0, WHOLE)
    r = np.exp(((LP - BEFORE) * WHOLE).sum(-1, keepdims=True))
    assert_close(got, np.where(WHOLE, -np.minimum(r, np.minimum(np.maximum(r, 0.9), 1.2)), 0))
    got = run(presets.rloo(**TWO).loss, LP, BEFORE, WHOLE * -1.0, WHOLE)
    assert_close(got, np.where(WHOLE, np.maximum(r, np.minimum(np.maximum(r, 0.9), 1.2)), 0))
    rewards = np.zeros(WHOLE.shape)
    for i, (score, kept) in enumerate(zip(paid.reshape(-1), WHOLE, strict=True)):
        last = np.flatnonzero(kept)[-1]
        rewards[i] = -penalties[i] * kept
        rewards[i, last] += score
    togo = np.array(
        [[rewards[i, t:].sum() if WHOLE[i, t] else 0 for t in range(3)] for i in range(4)]
    )
    whitened = (togo - togo[WHOLE].mean()) / math.sqrt(togo[WHOLE].var(ddof=1) + 1e-8)
    assert_close(
        run(presets.reinforce_pp().advantages, paid, WHOLE, penalties), np.where(WHOLE, whitened, 0)
    )


def test_reinforce_pp_baseline_whitens_over_tokens():
    spread = run(groups.dr_grpo, SCORES).reshape(4, 1) * WHOLE
    want = (spread - spread[WHOLE].mean()) / math.sqrt(spread[WHOLE].var(ddof=1) + 1e-8)
    assert_close(
        run(presets.reinforce_pp_baseline().advantages, SCORES, WHOLE), np.where(WHOLE, want, 0)
    )


def test_ppo_is_gae_and_the_clipped_surrogate():
    preset = presets.ppo(discount=0.9, lam=0.8, **TWO)
    arrays = ADVANTAGES, OLD, MASK
    knobs = dict(bootstrap=np.zeros(12), segment_ids=IDS)
    for got, want in zip(
        run(preset.advantages, *arrays, **knobs),
        run(losses.gae, *arrays, discount=0.9, lam=0.8, **knobs),
        strict=True,
    ):
        assert_close(got, want)
    assert_close(
        run(preset.loss, NEW, OLD, ADVANTAGES, MASK), run(CLIPPED, NEW, OLD, ADVANTAGES, MASK)
    )


@pytest.mark.parametrize(
    "weight",
    [weights.token_mean, weights.sequence_sum, functools.partial(weights.constant, length=9)],
)
@pytest.mark.parametrize(
    ("loss", "knobs"),
    [
        (policy.gspo, {}),
        (policy.gmpo, {}),
        (functools.partial(policy.luspo, clip_low=0.1), {}),
        (policy.clipped_surrogate, {"log_ratio": ratios.sequence_log_ratio}),
        (
            policy.cispo,
            {"log_ratio": functools.partial(ratios.product_log_ratio, segment_ids=None)},
        ),
    ],
)
def test_one_ratio_for_a_sequence_is_not_summed_over_its_tokens(loss, knobs, weight):
    with pytest.raises(
        ValueError,
        match=r"one ratio for a whole sequence, but weights\.\w+ sums over tokens.*sequence_mean",
    ):
        presets.objective(groups.dr_grpo, loss, weight, **knobs)
    presets.objective(groups.dr_grpo, loss, weights.sequence_mean, **knobs)
    presets.objective(groups.dr_grpo, policy.gspo_token, weight)


@pytest.mark.parametrize(
    "preset", [presets.ppo, presets.reinforce_pp, presets.reinforce_pp_baseline]
)
def test_clip_bounds_of_presets_without_groups(preset):
    """Each on its side."""
    arrays, bounds = (NEW, OLD, ADVANTAGES, MASK), dict(clip_low=0.05, clip_high=0.3)
    assert_close(
        run(preset(**bounds).loss, *arrays), run(policy.clipped_surrogate, *arrays, **bounds)
    )


def test_an_objective_is_token_level_where_no_token_looks_at_another():
    token_level = {
        name: preset(**({"length": 4} if name == "dr_grpo" else {})).is_token_level
        for name, preset in policy_gradient.ALGORITHMS.items()
    }
    assert {name for name, is_so in token_level.items() if not is_so} == {
        "gspo",
        "luspo",
        "gmpo",
        "vespo",
    }
    for name, preset in policy_gradient.ALGORITHMS.items():
        objective = preset(**({"length": 4} if name == "dr_grpo" else {}))
        # One token of a row moves: what the others say stays where each is by itself.
        run = lambda logprobs, loss=objective.loss: np.asarray(
            loss(jnp.asarray(logprobs), OLD[1:2], ADVANTAGES[1:2], np.ones((1, 6), bool))
        )
        near = OLD[1:2] + 1e-5
        moved = run(near + 0.05 * (np.arange(6) == 5))
        assert (moved == run(near))[:, :-1].all() == token_level[name], name
        assert moved[0, -1] != run(near)[0, -1], name
    assert not presets.rloo().is_token_level
    assert presets.ppo().is_token_level
    of_sequences = {"log_ratio": ratios.sequence_token_log_ratio}
    mine = presets.objective(
        groups.dr_grpo, policy.clipped_surrogate, weights.sequence_mean, **of_sequences
    )
    assert not mine.is_token_level
    bound = functools.partial(policy.clipped_surrogate, **of_sequences)
    assert not presets.replaced(presets.grpo(), loss=bound).is_token_level
    assert presets.replaced(presets.gspo(), loss=policy.cispo).is_token_level
    assert not presets.replaced(presets.grpo(), loss=lambda *arrays: arrays[0]).is_token_level
