"""Objectives against slow definitions in NumPy (loops and double sums), and identities between them, in float64."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from definitions import assert_close, run

from rlhf import losses
from rlhf.losses import kl, preference, segments, weights

SEGMENTS = 3  # most sequences in a row


def packed(rng):
    """Rows of up to three sequences, gaps in the mask, padding at the end; one sequence has no trained token."""
    lengths = np.array([[4, 3, 5], [1, 7, 0], [12, 0, 0], [2, 2, 2]])
    ids = np.array([np.repeat([1, 2, 3, 0], [*row, 13 - row.sum()]) for row in lengths]).astype(
        np.int32
    )
    mask = (rng.random(ids.shape) < 0.6) & (ids > 0)
    mask[0, :4] = False, True, False, True
    mask[1, 1:8] = True
    mask[3, 2:4] = False
    return ids, mask


def sequences(ids, mask):
    """`(row, slot, the columns of its trained tokens)` of every sequence that a row could have."""
    for row in range(len(ids)):
        for slot in range(SEGMENTS):
            yield (
                row,
                slot,
                [t for t in range(ids.shape[1]) if ids[row, t] == slot + 1 and mask[row, t]],
            )


RNG = np.random.default_rng(0)
IDS, MASK = packed(RNG)
VALUES, REWARDS = RNG.normal(size=(2, *MASK.shape))
PER_SEQUENCE = RNG.normal(size=len(IDS) * SEGMENTS)


# ---- advantages -------------------------------------------------------------------------------------------------------


def gae_by_definition(rewards, values, mask, bootstrap, ids, discount, lam):
    """`A_i = Σ_k (γλ)^(k-i) δ_k` over the trained tokens of a sequence, in order."""
    advantages = np.zeros_like(rewards)
    for row, slot, columns in sequences(ids, mask):
        following = [*values[row, columns[1:]], bootstrap[row * SEGMENTS + slot]]
        deltas = [
            rewards[row, t] + discount * v - values[row, t]
            for t, v in zip(columns, following, strict=bool(columns))
        ]
        for i, t in enumerate(columns):
            advantages[row, t] = sum(
                (discount * lam) ** (k - i) * deltas[k] for k in range(i, len(deltas))
            )
    return advantages, np.where(mask, advantages + values, 0)


def gae(**knobs):
    return run(losses.gae, REWARDS, VALUES, MASK, bootstrap=PER_SEQUENCE, segment_ids=IDS, **knobs)


@pytest.mark.parametrize(
    ("discount", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.97, 0.0), (1.0, 1.0), (0.0, 0.5)]
)
def test_gae(discount, lam):
    want = gae_by_definition(REWARDS, VALUES, MASK, PER_SEQUENCE, IDS, discount, lam)
    for got, expected in zip(gae(discount=discount, lam=lam), want, strict=True):
        assert_close(got, expected)


def test_gae_with_lambda_1_is_monte_carlo_minus_value():
    _, returns = gae(discount=0.9, lam=1.0)
    for row, slot, columns in sequences(IDS, MASK):
        for i, t in enumerate(columns):
            rest = [REWARDS[row, k] for k in columns[i:]] + [PER_SEQUENCE[row * SEGMENTS + slot]]
            assert_close(returns[row, t], sum(0.9**n * r for n, r in enumerate(rest)))


def test_gae_with_lambda_0_is_the_temporal_difference():
    advantages, _ = gae(discount=0.9, lam=0.0)
    for row, slot, columns in sequences(IDS, MASK):
        for t, after in zip(columns, [*columns[1:], None], strict=bool(columns)):
            following = PER_SEQUENCE[row * SEGMENTS + slot] if after is None else VALUES[row, after]
            assert_close(advantages[row, t], REWARDS[row, t] + 0.9 * following - VALUES[row, t])


def test_token_rewards():
    want = np.where(MASK, -REWARDS, 0)
    for row, slot, columns in sequences(IDS, MASK):
        if columns:
            want[row, columns[-1]] += PER_SEQUENCE[row * SEGMENTS + slot]
    got = run(losses.token_rewards, PER_SEQUENCE, REWARDS, MASK, segment_ids=IDS)
    assert_close(got, want)


def test_group_relative():
    nan = np.nan
    rewards = np.array([
        [1.0, 0.0, 2.5, -1.0], [1.0, nan, 0.0, 0.5], [nan, nan, 3.0, nan], [nan] * 4, [2.0] * 4, [0.1, 0.1, nan, 0.1],
    ])  # fmt: skip
    want = np.zeros_like(rewards)
    for row, group in enumerate(rewards):
        scored = [r for r in group if not math.isnan(r)]
        for sample, r in enumerate(group):
            if len(scored) > 1 and not math.isnan(r):
                want[row, sample] = (r - statistics.fmean(scored)) / (
                    statistics.stdev(scored) + 1e-4
                )
    got = run(losses.group_relative, rewards)
    assert_close(got, want)
    assert not got[2:5].any()  # a group of one, of none, without spread
    assert not run(losses.group_relative, rewards[:, :1]).any()


def test_full_kl_leaves_out_what_policy_and_reference_ban():
    logits, ref_logits = (
        np.array([[0.3, -np.inf, 1.2], [0.1, 0.5, -np.inf]]),
        np.array([[0.9, -np.inf, 0.2], [0.4, 0.3, 0.1]]),
    )
    probs, ref_probs = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (logits, ref_logits))
    expected = np.where(
        probs > 0, probs * np.log(np.where(probs > 0, probs / np.maximum(ref_probs, 1e-9), 1)), 0
    ).sum(-1)
    assert_close(run(losses.kl.full, logits, ref_logits), expected)
    for gradient in jax.grad(lambda *x: losses.kl.full(*x).sum(), argnums=(0, 1))(
        jnp.array(logits), jnp.array(ref_logits)
    ):
        assert np.isfinite(gradient).all()


def test_siblings_that_are_alike_have_no_spread_at_all():
    """Not even the rounding of a difference, by which a reward would be divided."""
    rewards = np.full((2, 6), 3.9120001792907715, np.float32)
    rewards[0, 5], rewards[1] = 28.412429809570312, [0.3147003650665283] * 5 + [-16.07008171081543]
    spread = np.asarray(jax.jit(losses.groups.leave_one_out_std)(rewards))
    assert (spread == 0).tolist() == [[False] * 5 + [True]] * 2


def test_group_relative_of_two_is_leave_one_out_in_standard_deviations():
    rewards = RNG.normal(size=(5, 2))
    leave_one_out = rewards - rewards[:, ::-1]
    assert_close(
        run(losses.group_relative, rewards, eps=0.0),
        leave_one_out / 2 / rewards.std(-1, ddof=1, keepdims=True),
    )


def test_whiten():
    trained = VALUES[MASK]
    want = (VALUES - trained.mean()) / np.sqrt(trained.var(ddof=1) + 1e-3)
    assert_close(run(losses.whiten, VALUES, MASK, eps=1e-3), np.where(MASK, want, 0))
    assert not run(
        losses.whiten, VALUES, np.arange(MASK.size).reshape(MASK.shape) == 5, eps=1e-8
    ).any()


# ---- sequences and weights --------------------------------------------------------------------------------------------


def test_segment_sum():
    want = np.zeros(len(IDS) * SEGMENTS)
    for row, slot, columns in sequences(IDS, MASK):
        want[row * SEGMENTS + slot] = sum(VALUES[row, t] for t in columns)
    assert_close(
        run(losses.segment_sum, VALUES, MASK, IDS, static={"max_segments": SEGMENTS}.items()), want
    )
    rows = [
        sum(VALUES[row, t] for t in range(MASK.shape[1]) if MASK[row, t])
        for row in range(len(MASK))
    ]
    assert_close(run(losses.segment_sum, VALUES, MASK), rows)
    first_two = want.reshape(-1, SEGMENTS)[:, :2].reshape(
        -1
    )  # sequences with higher ids are left out
    assert_close(
        run(losses.segment_sum, VALUES, MASK, IDS, static={"max_segments": 2}.items()), first_two
    )


def test_places():
    last, first, count = np.zeros_like(MASK), np.zeros_like(MASK), np.zeros(MASK.shape)
    ends = np.zeros((len(IDS), SEGMENTS), int)
    for row, slot, columns in sequences(IDS, MASK):
        tokens = [t for t in range(IDS.shape[1]) if IDS[row, t] == slot + 1]
        if tokens:
            first[row, tokens[0]], ends[row, slot] = True, tokens[-1]
        count[row, tokens] = len(columns)
        if columns:
            last[row, columns[-1]] = True
    np.testing.assert_array_equal(run(segments.last_trained, MASK, IDS), last)
    np.testing.assert_array_equal(run(segments.starts, IDS), first)
    np.testing.assert_array_equal(run(segments.count, MASK, IDS), count)
    np.testing.assert_array_equal(
        run(segments.last_columns, IDS, static={"max_segments": SEGMENTS}.items()), ends
    )
    np.testing.assert_array_equal(run(segments.count, MASK), MASK * 0 + MASK.sum(-1, keepdims=True))
    own = np.broadcast_to(
        np.arange(1, MASK.shape[1] + 1), MASK.shape
    )  # every token a sequence of its own
    np.testing.assert_array_equal(run(segments.count, MASK, own.astype(np.int32)), MASK.astype(int))
    np.testing.assert_array_equal(run(segments.ids_or_ones, MASK, None), np.ones(MASK.shape))
    np.testing.assert_array_equal(run(segments.ids_or_ones, MASK, IDS), IDS)


@pytest.mark.parametrize("whole_rows", [True, False])
def test_weights(whole_rows):
    ids = np.ones_like(IDS) if whole_rows else IDS
    trained = [(row, columns) for row, _, columns in sequences(ids, MASK) if columns]
    tokens = sum(len(columns) for _, columns in trained)
    wanted = {
        weights.token_mean: lambda n: 1 / tokens,
        weights.sequence_mean: lambda n: 1 / (len(trained) * n),
        weights.sequence_sum: lambda n: 1 / len(trained),
        weights.constant: lambda n: 1 / (len(trained) * 7.0),
        weights.token_share: lambda n: 1 / n,
    }
    for fn, weight in wanted.items():
        want = np.zeros(MASK.shape)
        for row, columns in trained:
            want[row, columns] = weight(len(columns))
        knobs = {"length": 7.0} if fn is weights.constant else {}
        assert_close(run(fn, MASK, None if whole_rows else IDS, **knobs), want)
    assert run(weights.number_of_sequences, MASK, None if whole_rows else IDS) == len(trained)


def test_weighted_sum():
    w = np.where(MASK, VALUES, 0)
    dirty = np.where(MASK, REWARDS, np.nan)
    want = sum(w[place] * REWARDS[place] for place in np.ndindex(w.shape) if MASK[place])
    got, gradient = run(jax.value_and_grad(losses.weighted_sum), dirty, w)
    assert_close(got, want)
    assert_close(gradient, w)


# ---- distributions ----------------------------------------------------------------------------------------------------

LOGITS = RNG.normal(size=(3, 5)) * 2
PROBABILITIES = np.array(
    [[math.exp(x) / sum(math.exp(y) for y in row) for x in row] for row in LOGITS]
)


def test_entropy_and_token_logprob():
    want = [-sum(p * math.log(p) for p in row) for row in PROBABILITIES]
    assert_close(run(losses.logits.entropy, LOGITS), want)
    tokens = np.array([4, 0, 2])
    assert_close(
        run(losses.logits.token_logprob, LOGITS, tokens),
        [math.log(PROBABILITIES[i, t]) for i, t in enumerate(tokens)],
    )
    shifted = LOGITS + 1e4  # a shift of the logits changes nothing, and nothing overflows
    np.testing.assert_allclose(run(losses.logits.entropy, shifted), want, rtol=1e-9)
    logprobs = run(losses.logits.token_logprob, LOGITS, tokens)
    np.testing.assert_allclose(
        run(losses.logits.token_logprob, shifted, tokens), logprobs, rtol=1e-9
    )


def test_entropy_of_impossible_tokens():
    gradient = jax.grad(lambda x: losses.logits.entropy(x).sum())
    without = np.delete(LOGITS, 1, axis=1)
    barred = LOGITS.copy()
    barred[:, 1] = -np.inf
    assert_close(run(losses.logits.entropy, barred), run(losses.logits.entropy, without))
    assert_close(np.delete(run(gradient, barred), 1, axis=1), run(gradient, without))


def test_kl_estimators_are_bounded():
    far, zero, mask = np.array([100.0, -100.0, 0.3]), np.zeros(3), np.ones(3, bool)
    want = np.array([20.0, -20.0, 0.3])
    assert_close(run(kl.k1, far, zero, mask), want)
    assert_close(run(kl.k2, far, zero, mask), want**2 / 2)
    assert_close(run(kl.k3, far, zero, mask), np.exp(-want) - 1 + want)
    assert_close(run(losses.ratios.token_log_ratio, far, zero, mask), want)
    for fn in (kl.k1, kl.k2, kl.k3, losses.ratios.token_log_ratio):
        gradient = run(jax.grad(lambda *x, fn=fn: fn(*x).sum()), far, zero, mask)
        assert not gradient[:2].any()
        assert gradient[2] != 0


def kl_by_enumeration(fn):
    """The expectation under π of an estimator, and of its gradient, over every token of a small vocabulary."""
    reference = jnp.asarray(jax.nn.log_softmax(LOGITS[1]))

    def expected(logits):
        logprobs = jax.nn.log_softmax(logits)
        return jnp.sum(
            jax.lax.stop_gradient(jnp.exp(logprobs)) * fn(logprobs, reference, jnp.ones(5, bool))
        )

    return jax.value_and_grad(expected)(jnp.asarray(LOGITS[0]))


def exact_kl(p, q):
    return jnp.sum(jnp.exp(p) * (p - q))


def test_kl_estimators_by_enumeration():
    with jax.enable_x64(True):
        logits, reference = jnp.asarray(LOGITS[0]), jax.nn.log_softmax(jnp.asarray(LOGITS[1]))
        reverse, reverse_gradient = jax.value_and_grad(
            lambda x: exact_kl(jax.nn.log_softmax(x), reference)
        )(logits)
        forward_gradient = jax.grad(lambda x: exact_kl(reference, jax.nn.log_softmax(x)))(logits)
        exact = reverse, reverse_gradient, forward_gradient
        estimates = [kl_by_enumeration(fn) for fn in (kl.k1, kl.k2, kl.k3)]
        (reverse, reverse_gradient, forward_gradient), estimates = jax.tree.map(
            np.asarray, (exact, estimates)
        )
    (k1, k1_gradient), (k2, k2_gradient), (k3, k3_gradient) = estimates
    assert_close(k1, reverse)
    assert_close(k3, reverse)
    assert abs(k2 - reverse) > 0.1 * reverse
    assert_close(k1_gradient, np.zeros(5))
    assert_close(k2_gradient, reverse_gradient)
    assert_close(k3_gradient, forward_gradient)
    assert np.abs(k3_gradient - reverse_gradient).max() > 0.1 * np.abs(reverse_gradient).max()


# ---- objectives -------------------------------------------------------------------------------------------------------

SURROGATE = jax.value_and_grad(lambda *x, **knobs: losses.clipped_surrogate(*x, **knobs).sum())
VALUE_LOSS = jax.value_and_grad(lambda *x, **knobs: losses.clipped_value_loss(*x, **knobs).sum())


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.5, 0.75, 0.9, 1.1, 1.25, 1.5])
def test_clipped_surrogate(ratio, advantage):
    """The bounds are 0.8 and 1.3: beyond one the loss is flat only where going on would win."""
    low, high = 0.2, 0.3
    flat = ratio > 1 + high if advantage > 0 else ratio < 1 - low
    bound = 1 + high if advantage > 0 else 1 - low
    one = lambda x: np.array([x, np.nan])
    value, gradient = run(
        SURROGATE,
        one(math.log(ratio) - 1), one(-1.0), one(advantage), np.array([True, False]), clip_low=low, clip_high=high,
    )  # fmt: skip
    assert_close(value, -advantage * (bound if flat else ratio))
    assert_close(gradient, [0.0 if flat else -advantage * ratio, 0.0])


@pytest.mark.parametrize("value", [0.0, 0.7, 0.9, 1.1, 1.3, 2.0])
@pytest.mark.parametrize("target", [0.5, 1.05, 3.0])
def test_clipped_value_loss(value, target):
    """Old value 1, clip 0.2: flat where the clipped value is the farther one."""
    clipped = min(max(value, 0.8), 1.2)
    flat = abs(clipped - target) > abs(value - target)
    got, gradient = run(
        VALUE_LOSS,
        np.array([value]), np.ones(1), np.array([target]), np.ones(1, bool), clip=0.2,
    )  # fmt: skip
    assert_close(got, ((clipped if flat else value) - target) ** 2 / 2)
    assert_close(gradient, [0.0 if flat else value - target])


def test_ratio_1_has_the_gradient_of_reinforce():
    logits, tokens = RNG.normal(size=(*MASK.shape, 5)), RNG.integers(5, size=MASK.shape)

    def surrogate(logits):
        logprobs = losses.logits.token_logprob(logits, tokens)
        old = jax.lax.stop_gradient(logprobs)
        return losses.weighted_sum(
            losses.clipped_surrogate(logprobs, old, VALUES, MASK), weights.token_mean(MASK)
        )

    def reinforce(logits):
        return -jnp.sum(losses.logits.token_logprob(logits, tokens) * VALUES * MASK) / MASK.sum()

    assert_close(run(jax.grad(surrogate), logits), run(jax.grad(reinforce), logits))


def test_preferences():
    chosen, rejected, ref_chosen, ref_rejected = x = RNG.normal(size=(4, 6)) * 3
    margins = [0.3 * ((c - rc) - (r - rr)) for c, r, rc, rr in x.T]
    want = [math.log1p(math.exp(-margin)) for margin in margins]
    assert_close(run(preference.sigmoid, *x, beta=0.3), want)
    got = run(preference.log_ratios, *x)
    assert_close(got, (chosen - ref_chosen, rejected - ref_rejected))
    differences = zip(sorted(chosen - rejected), sorted(ref_chosen - ref_rejected), strict=True)
    assert_close(
        run(preference.aot, *x, beta=0.3),
        [math.log1p(math.exp(-0.3 * (d - ref))) for d, ref in differences],
    )


def test_preferences_at_the_start_are_ln_2():
    chosen, rejected = RNG.normal(size=(2, 6)) * 3
    for fn in (preference.sigmoid, preference.aot):
        assert_close(run(fn, chosen, rejected, chosen, rejected, beta=0.3), np.full(6, math.log(2)))


def test_bradley_terry():
    chosen, rejected, margin = RNG.normal(size=(3, 6))
    differences = zip(chosen, rejected, margin, strict=True)
    want = [math.log1p(math.exp(-(c - r - m))) + 0.01 * (c + r) ** 2 for c, r, m in differences]
    assert_close(run(losses.bradley_terry, chosen, rejected, margin, center_coef=0.01), want)
    zero = np.zeros(6)  # DPO is Bradley-Terry on log-ratios
    assert_close(
        run(losses.bradley_terry, chosen, rejected),
        run(preference.sigmoid, chosen, rejected, zero, zero, beta=1.0),
    )


def test_cross_entropy():
    assert_close(run(losses.cross_entropy, VALUES, MASK), np.where(MASK, -VALUES, 0))


def test_token_rewards_of_an_unscorable_sequence_are_the_penalties_alone():
    mask = jnp.array([[True, True], [True, True]])
    rewards = losses.token_rewards(jnp.array([jnp.nan, jnp.inf]), jnp.full((2, 2), 0.5), mask)
    np.testing.assert_array_equal(rewards, [[-0.5, -0.5], [-0.5, jnp.inf]])
